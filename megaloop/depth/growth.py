"""Growth operators: a plan in, a deeper plan out, and for every new layer the one whose state it copies.

The operators and their sources, for L layers and a block of b (all counted from 0):

- ``lidas`` (arXiv 2512.08819): copy the exact middle, positions [(L-b)/2, (L+b)/2), right after itself, as the paper
  does (section 3.1, figure 2); ``insert_at: middle``, a variant of ours, puts the copy at L/2.
- ``midas`` (arXiv 2409.19044): of the n = L/b blocks, copy number ceil(n/2), counted from 1, right after itself.
- ``stack`` (G_stack, arXiv 2405.15319): repeat the whole stack g times in one step.
- ``last`` (gradual stacking): copy the last block to the end.
- ``random``: a control; fresh layers where ``lidas`` would put its copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from megaloop.depth.plan import DepthPlan
from megaloop.errors import MegaloopError

__all__ = ["Growth", "InsertAt", "Operator", "before_growth", "copied_block", "grow"]

Operator = Literal["lidas", "midas", "stack", "last", "random"]
InsertAt = Literal["after", "middle"]


@dataclass(frozen=True)
class Growth:
    """A deeper plan, and where its new layers come from.

    Attributes:
        plan: the plan after growing; layers that were there keep their ids and their order.
        lineage: for every id that the plan before did not have, the id *of the plan before* whose state it copies,
            or None for a layer that starts from fresh values.
        new_loop: the plan before had no loop: what parameters the loop itself has (:class:`LoopStyle`) start fresh.
        new_gate: its loop had no gate: that starts fresh.
    """

    plan: DepthPlan
    lineage: Mapping[int, int | None]
    new_loop: bool = False
    new_gate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "lineage", MappingProxyType(dict(self.lineage)))

    @classmethod
    def none(cls, plan: DepthPlan) -> Growth:
        """No growth: the plan as it is."""
        return cls(plan, {})

    @classmethod
    def reordered(cls, before: DepthPlan, after: DepthPlan) -> Growth:
        """No new layers: the same ones in another order."""
        return cls(after, {}).loop_of(before)

    def source(self, layer_id: int) -> int | None:
        """The layer of the plan before whose state a layer takes (its own, if it was there); None: fresh values."""
        return self.lineage.get(layer_id, layer_id)

    def then(self, following: Growth) -> Growth:
        """This growth and the next as one: its lineage leads back to the plan before both."""
        later = {new: None if old is None else self.source(old) for new, old in following.lineage.items()}
        return Growth(
            following.plan,
            {**self.lineage, **later},
            self.new_loop or following.new_loop,
            self.new_gate or following.new_gate,
        )

    def loop_of(self, before: DepthPlan) -> Growth:
        """The same, from a plan whose loop, if it has one, may lack what the loop after has of its own."""
        after = self.plan
        return replace(
            self,
            new_loop=after.is_looped and not before.is_looped,
            new_gate=after.style.gate and not before.style.gate,
        )


def grow(plan: DepthPlan, operator: Operator, layers: int, block: int = 4, *, insert_at: InsertAt = "after") -> Growth:
    """Grow a plan to ``layers`` layers, block by block (``stack``: in one step).

    Args:
        block: layers that each step adds; ``stack`` repeats the whole plan instead.
        insert_at: where ``lidas`` and ``random`` put new layers.

    Raises:
        MegaloopError: ``layers`` is fewer than there are, cannot be reached by whole blocks, a block is larger than
            the plan, or the plan is looped.
    """
    if plan.is_looped:
        raise MegaloopError(f"growth: plan {plan} is looped; only a plan that runs every layer once can grow")
    if layers < plan.layers:
        raise MegaloopError(
            f"growth: from {plan.layers} to {layers} layers; growth never shrinks, choose a deeper target"
        )
    if operator == "stack":
        if layers % plan.layers:
            raise MegaloopError(
                f"growth: stack repeats all {plan.layers} layers, which never makes {layers}; "
                f"choose a multiple of {plan.layers}, for example {-(-layers // plan.layers) * plan.layers}"
            )
        copies = layers // plan.layers - 1
        return _insert(plan, plan.layers, plan.order * copies, copied=True)
    if block < 1 or block > plan.layers:
        raise MegaloopError(
            f"growth: a block of {block} layers, and {plan.layers} to copy from; choose a block of 1 to {plan.layers}"
        )
    if (layers - plan.layers) % block:
        near = plan.layers + round((layers - plan.layers) / block) * block
        raise MegaloopError(
            f"growth: {layers} layers cannot be reached from {plan.layers} by blocks of {block}; "
            f"choose for example {near} layers, or a block that divides {layers - plan.layers}"
        )
    growth = Growth.none(plan)
    while growth.plan.layers < layers:
        growth = growth.then(_step(growth.plan, operator, block, insert_at))
    return growth


def before_growth(plan: DepthPlan, layers: int) -> DepthPlan:
    """A grown plan as it was when it had ``layers`` layers: growth numbers new layers upwards, so the lowest ids."""
    ids = sorted(plan.ids)[:layers]
    return DepthPlan(
        tuple(layer_id for layer_id in plan.order if layer_id in ids),
        {child: parent for child, parent in plan.lineage.items() if child in ids},
    )


def copied_block(plan: DepthPlan) -> int | None:
    """Layers of the block that was copied last, told from ids and lineage alone; None where no layer is a copy.

    Those of a block have the highest ids, run one after the other, and so did their parents, all of which are older.
    ``stack`` copies as many layers as there were.
    """
    order, numbered = plan.ids, sorted(plan.ids)
    for block in range(min(len(order) // 2, len(plan.lineage)), 0, -1):
        new = tuple(numbered[-block:])
        at = order.index(new[0])
        older = tuple(layer_id for layer_id in order if layer_id < new[0])
        parents = tuple(plan.lineage.get(layer_id, -1) for layer_id in new)
        if order[at : at + block] == new and parents[0] in older:
            begin = older.index(parents[0])
            if older[begin : begin + block] == parents:
                return block
    return None


def _step(plan: DepthPlan, operator: Operator, block: int, insert_at: InsertAt) -> Growth:
    """One block more."""
    count = plan.layers
    if operator == "last":
        return _insert(plan, count, plan.order[count - block :], copied=True)
    if operator == "midas":
        if count % block:
            raise MegaloopError(
                f"growth: midas copies one of the whole blocks, but {count} layers are no multiple of block {block}; "
                "choose a block that divides them, or lidas"
            )
        blocks = count // block
        stop = (blocks + 1) // 2 * block
        return _insert(plan, stop, plan.order[stop - block : stop], copied=True)
    # an odd number of layers more than the block has no exact middle: one layer more stays after the copied range
    start = (count - block) // 2
    at = start + block if insert_at == "after" else count // 2
    return _insert(plan, at, plan.order[start : start + block], copied=operator != "random")


def _insert(plan: DepthPlan, at: int, sources: tuple[int, ...], *, copied: bool) -> Growth:
    """Put a new layer for each of ``sources`` into the plan, at position ``at``."""
    first = plan.next_id
    new = {first + index: source if copied else None for index, source in enumerate(sources)}
    parents = {layer_id: source for layer_id, source in new.items() if source is not None}
    order = (*plan.order[:at], *new, *plan.order[at:])
    return Growth(DepthPlan(order, {**plan.lineage, **parents}), new)
