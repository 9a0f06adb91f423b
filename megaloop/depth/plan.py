"""``DepthPlan``: the order in which layers are executed, as a value.

A plan is a sequence of layer *ids*. An id names a layer for life; a *position* is a place in the
execution order. An unlooped model uses each id once; a looped model uses some ids several times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, get_args

from megaloop.errors import MegaloopError
from megaloop.text import quoted

__all__ = ["DepthPlan", "GateTraining", "Injection", "LayerCall", "Loop", "LoopStyle", "ResidualScale", "spelled_loop"]

Injection = Literal["none", "add", "concat"]
ResidualScale = Literal["none", "1/k"]
GateTraining = Literal["frozen", "joint"]
"""How a loop's gate is trained: alone, on a frozen model; or together with it."""

# nine digits: Python refuses to convert thousands of them
_PLAIN = re.compile(r"[0-9]{1,9}")
_LOOPED = re.compile(r"([0-9]{1,9})-([0-9]{1,9})x([0-9]{1,9})-([0-9]{1,9})")
_GROUP = re.compile(r"\(([0-9,]+)\)(?:x([0-9]{1,9}))?")
_MAX_DEPTH = 100_000


@dataclass(frozen=True)
class LoopStyle:
    """How a loop goes on from one time to the next; by default plain composition (arXiv 2502.17416).

    Attributes:
        injection: what becomes of the state that entered the loop. ``add``: it is added to the state at the beginning
            of each time but the first (arXiv 2409.15647); ``concat``: a linear adapter makes both into one at the beginning
            of each time (arXiv 2502.05171).
        residual_scale: ``1/k``: what looped layers add to the residual stream is divided by the number of times, so that
            the learning rate carries over between numbers (arXiv 2606.18524).
        norm: an RMSNorm of its own at the end of each time (arXiv 2502.05171).
        gate: a linear gate says after each iteration how likely a token is to stop there (arXiv 2510.25741). It reads the state and
            changes nothing in it.
    """

    injection: Injection = "none"
    residual_scale: ResidualScale = "none"
    norm: bool = False
    gate: bool = False

    def __post_init__(self) -> None:
        known = get_args(Injection), get_args(ResidualScale), (False, True), (False, True)
        for value, allowed in zip((self.injection, self.residual_scale, self.norm, self.gate), known, strict=True):
            if value not in allowed:
                raise MegaloopError(f"loop: {value!r} is none of {', '.join(map(str, allowed))}")

    @property
    def is_plain(self) -> bool:
        """The loop computes what its layers in a row compute: plain composition, with or without a gate."""
        return replace(self, gate=False) == LoopStyle()

    def to_json(self) -> dict[str, Any]:
        """A value that JSON can hold; without the gate where there is none, so that older readers know the rest."""
        values = asdict(self)
        if not self.gate:
            del values["gate"]
        return values


@dataclass(frozen=True)
class Loop:
    """Where a plan loops.

    Attributes:
        start: position of the looped layers' first use.
        block: how many they are.
        iterations: how often they run.
    """

    start: int
    block: int
    iterations: int

    @property
    def stop(self) -> int:
        """The first position after the loop."""
        return self.start + self.block * self.iterations


@dataclass(frozen=True)
class LayerCall:
    """One execution of a layer.

    Attributes:
        layer_id: which.
        iteration: of the loop, counted from 0; None outside of it.
        is_first, is_last: it is the first, the last layer of that time.
        iterations: how often that loop runs; None outside of it.
    """

    layer_id: int
    iteration: int | None = None
    is_first: bool = False
    is_last: bool = False
    iterations: int | None = None

    def is_frozen(self, backprop: int | None) -> bool:
        """No gradient passes through: it belongs to an iteration of the loop before the last ``backprop`` ones (None: to none)."""
        if backprop is None or self.iteration is None or self.iterations is None:
            return False
        return self.iteration < self.iterations - backprop


@dataclass(frozen=True)
class DepthPlan:
    """The order of execution of a decoder's layers.

    Attributes:
        order: layer ids in the order in which they run; an id may occur several times (a loop).
        lineage: for every id that was copied from another layer, the id of that parent. Ids that
            were freshly initialised do not occur as keys. A parent need not be part of ``order``.
        style: how its loop goes on; only a plan with one loop may have another than plain composition.

    Raises:
        MegaloopError: an empty order, a negative id, a lineage that names unknown layers or is circular.
    """

    order: tuple[int, ...]
    lineage: Mapping[int, int] = field(default_factory=dict)
    style: LoopStyle = LoopStyle()

    def __post_init__(self) -> None:
        if not self.order:
            raise MegaloopError("depth: a plan needs at least one layer; found none")
        if any(layer_id < 0 for layer_id in self.order):
            raise MegaloopError(f"depth: layer ids count from 0; found {min(self.order)}")
        object.__setattr__(self, "order", tuple(self.order))
        object.__setattr__(self, "lineage", MappingProxyType(dict(sorted(self.lineage.items()))))
        strangers = set(self.lineage) - set(self.order)
        if strangers:
            raise MegaloopError(f"depth: lineage names layers {sorted(strangers)} that the plan does not run")
        for layer_id in self.lineage:
            self.ancestors(layer_id)
        if self.style != LoopStyle() and self.loop is None:
            raise MegaloopError(f"depth: {self} must contain exactly one loop, which {self.style} describes")

    def __hash__(self) -> int:
        return hash((self.order, tuple(self.lineage.items()), self.style))

    def __reduce__(self) -> tuple[Any, ...]:
        # a mapping proxy does not pickle; worker processes receive plans
        return (DepthPlan, (self.order, dict(self.lineage), self.style))

    @classmethod
    def plain(cls, layers: int) -> DepthPlan:
        """A model of ``layers`` layers, each run once, with ids 0 .. layers-1."""
        return cls(tuple(range(layers)))

    @classmethod
    def parse(cls, text: str | int) -> DepthPlan:
        """Read ``"24"``, ``"4-4x4-4"`` (Loop(e-Lxk-d)) or what ``str(plan)`` wrote.

        ``e-Lxk-d`` is e layers, a block of L layers run k times, then d layers (arXiv 2502.17416).
        Layers of a plan whose ids are not consecutive are written out: ``(0,1,4)(2,3)x2(5)``.
        Lineage is no part of the text.
        """
        text = str(text).strip()
        if _PLAIN.fullmatch(text):
            return _from_counts(int(text), 0, 1, 0, text)
        if found := spelled_loop(text):
            return cls.looped(*found)
        if text and "".join(m[0] for m in _GROUP.finditer(text)) == text:
            return cls(tuple(_read_groups(text)))
        raise MegaloopError(
            f"depth: cannot read {quoted(text)}; expected a number of layers (24) or "
            "PRELUDE-RECURRENTxITERATIONS-CODA (4-4x4-4: 4 layers, 4 layers 4 times, 4 layers)"
        )

    @classmethod
    def looped(cls, prelude: int, block: int, iterations: int, coda: int) -> DepthPlan:
        """Loop(e-Lxk-d): what ``e-Lxk-d`` reads as.

        Raises:
            MegaloopError: no layer in the loop, or no time; deeper than any model.
        """
        text = f"{prelude}-{block}x{iterations}-{coda}"
        if block == 0 or iterations == 0:
            raise MegaloopError(
                f"depth: {quoted(text)} loops {block} layers {iterations} times; both must be at least 1"
            )
        return _from_counts(prelude, block, iterations, coda, text)

    @property
    def ids(self) -> tuple[int, ...]:
        """The unique layer ids in order of first use."""
        return tuple(dict.fromkeys(self.order))

    @property
    def depth(self) -> int:
        """Effective depth: the number of layer executions."""
        return len(self.order)

    @property
    def next_id(self) -> int:
        """The id of the next layer that is added: above all that the plan or its lineage names, so that none is used twice."""
        return max(*self.order, *self.lineage.values(), 0) + 1

    @property
    def layers(self) -> int:
        """The number of unique layers, those that hold parameters."""
        return len(self.ids)

    @property
    def is_looped(self) -> bool:
        return self.depth != self.layers

    @cached_property
    def loop(self) -> Loop | None:
        """The plan's one loop; None for a plan without loops, or with another pattern of repetition."""
        start, block, iterations = _find_loop(self.order)
        return Loop(start, block, iterations) if iterations > 1 else None

    def calls(self, iterations: int | None = None) -> tuple[LayerCall, ...]:
        """The executions of layers, in order.

        Args:
            iterations: how often the loop runs; default: as often as the plan says.

        Raises:
            MegaloopError: ``iterations`` of a plan that does not contain exactly one loop, or less than once.
        """
        loop = self.loop
        if loop is None:
            if iterations is not None:
                raise MegaloopError(
                    f"depth: {self} must contain exactly one loop; only then can its iterations be chosen"
                )
            return tuple(map(LayerCall, self.order))
        count = loop.iterations if iterations is None else iterations
        if count < 1:
            raise MegaloopError(f"depth: a loop runs at least once; found {count} times")
        block = self.order[loop.start : loop.start + loop.block]
        looped = (
            LayerCall(layer_id, iteration, index == 0, index == loop.block - 1, count)
            for iteration in range(count)
            for index, layer_id in enumerate(block)
        )
        return (*map(LayerCall, self.order[: loop.start]), *looped, *map(LayerCall, self.order[loop.stop :]))

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return self.depth

    def ancestors(self, layer_id: int) -> tuple[int, ...]:
        """Parent, grandparent and so on of a layer, the root last; empty for a layer that is no copy."""
        found: list[int] = []
        while layer_id in self.lineage:
            layer_id = self.lineage[layer_id]
            if layer_id in found:
                raise MegaloopError(f"depth: the lineage of layer {layer_id} is circular")
            found.append(layer_id)
        return tuple(found)

    def root(self, layer_id: int) -> int:
        """The freshly initialised layer from which a layer descends (itself, if it is no copy)."""
        return (layer_id, *self.ancestors(layer_id))[-1]

    def __str__(self) -> str:
        return _text(self.order)

    @property
    def notation(self) -> str:
        """The plan by places alone, whatever the layers' ids: 24, or 10-4x2-10."""
        number = {layer_id: index for index, layer_id in enumerate(self.ids)}
        return _text(tuple(number[layer_id] for layer_id in self.order))

    def to_json(self) -> dict[str, Any]:
        """A value that JSON can hold; :meth:`from_json` reads it back, lineage included."""
        value: dict[str, Any] = {"order": list(self.order), "lineage": {str(k): v for k, v in self.lineage.items()}}
        return value if self.style == LoopStyle() else value | {"style": self.style.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DepthPlan:
        style = LoopStyle(**value.get("style", {}))
        return cls(tuple(value["order"]), {int(k): v for k, v in value["lineage"].items()}, style)


def spelled_loop(depth: str) -> tuple[int, int, int, int] | None:
    """(prelude, block, iterations, coda) of a loop's text, even of one that runs once; None for anything else."""
    match = _LOOPED.fullmatch(depth.strip())
    return (int(match[1]), int(match[2]), int(match[3]), int(match[4])) if match else None


def _from_counts(prelude: int, block: int, iterations: int, coda: int, text: str) -> DepthPlan:
    if prelude + block * iterations + coda > _MAX_DEPTH:
        raise MegaloopError(f"depth: {quoted(text)} is deeper than {_MAX_DEPTH} layers")
    loop = tuple(range(prelude, prelude + block))
    return DepthPlan((*range(prelude), *loop * iterations, *range(prelude + block, prelude + block + coda)))


def _read_groups(text: str) -> Iterator[int]:
    """The ids of a plan written out in groups: ``(0,4)(1,2)x3``."""
    for match in _GROUP.finditer(text):
        try:
            ids = [int(part) for part in match[1].split(",")]
        except ValueError:
            raise MegaloopError(
                f"depth: {quoted(match[0])} is no list of layer ids; expected something like (0,1,4)"
            ) from None
        iterations = int(match[2] or 1)
        if iterations * len(ids) > _MAX_DEPTH:
            raise MegaloopError(f"depth: {quoted(match[0])} is deeper than {_MAX_DEPTH} layers")
        yield from ids * iterations


def _text(order: tuple[int, ...]) -> str:
    """The shortest of the three notations that reads back as ``order``."""
    if order == tuple(range(len(order))):
        return str(len(order))
    prelude, block, iterations = _find_loop(order)
    layers = tuple(dict.fromkeys(order))
    if iterations > 1 and layers == tuple(range(len(layers))):
        return f"{prelude}-{block}x{iterations}-{len(order) - prelude - block * iterations}"
    groups = [
        (order[:prelude], 1),
        (order[prelude : prelude + block], iterations),
        (order[prelude + block * iterations :], 1),
    ]
    return "".join(f"({','.join(map(str, ids))})" + (f"x{count}" if count > 1 else "") for ids, count in groups if ids)


def _find_loop(order: tuple[int, ...]) -> tuple[int, int, int]:
    """The one loop of a plan as (start, block, times), or (len, 0, 1) if it is not exactly one loop."""
    first_use: dict[int, int] = {}
    for position, layer_id in enumerate(order):
        if layer_id not in first_use:
            first_use[layer_id] = position
            continue
        start = first_use[layer_id]
        block = position - start
        iterations = 1
        loop = order[start:position]
        while order[start + iterations * block : start + (iterations + 1) * block] == loop:
            iterations += 1
        rest = order[:start] + loop + order[start + iterations * block :]
        if len(set(rest)) == len(rest):
            return start, block, iterations
        break
    return len(order), 0, 1
