"""Keys and values of many sequences for every use of every layer, in tensors of a fixed size.

R rows, one per sequence; T slots, one per token of it; B rows and S tokens of one pass; K key-value heads, H head size.

A looped layer has keys and values of its own in each iteration. ``shared`` keeps fewer: iteration i reads and writes slot
i mod k (arXiv 2502.05171, section 6.2); with one, tokens look at what the last iteration made of those before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from megaloop.depth import LayerCall
from megaloop.errors import MegaloopError
from megaloop.model import AttentionContext, Decoder
from megaloop.model.layers import KeyValueCache
from megaloop.text import parse_whole, printable

__all__ = ["CachePolicy", "Following", "LoopCaches", "Place", "Recorded", "loop_iterations"]


def loop_iterations(calls: Sequence[LayerCall]) -> int:
    """How often a loop runs at most; 1 without one."""
    return max((call.iterations or 1 for call in calls), default=1)


@dataclass(frozen=True)
class CachePolicy:
    """Which iterations of a loop keep keys and values.

    Attributes:
        shared: iterations that are kept, the last of each i mod ``shared``; None: all, which alone is exact.
    """

    shared: int | None = None

    @classmethod
    def parse(cls, text: str) -> CachePolicy:
        """``full``, ``last`` or ``shared=2``."""
        name, separator, number = text.partition("=")
        if text in ("full", "last"):
            return cls(None if text == "full" else 1)
        kept = parse_whole(number)
        if name != "shared" or not separator or not kept:
            raise MegaloopError(
                f"--cache {printable(text, 60)}: expected full, last or shared=N with a number of iterations"
            )
        return cls(kept)

    def __str__(self) -> str:
        return {None: "full", 1: "last"}.get(self.shared, f"shared={self.shared}")


@dataclass(frozen=True)
class Place:
    """Where the tokens [B, S] of a pass stand.

    Attributes:
        rows_B: the row of the caches that each belongs to; None: the first B, in order.
        slots_BS: where their keys and values go.
        length: slots that are looked at: [0, length).
        context: their positions, and which slots each sees.
        start: the first slot, where it is the same in all rows and the others follow it.
    """

    rows_B: Tensor | None
    slots_BS: Tensor
    length: int
    context: AttentionContext
    start: int | None = None

    def select(self, rows_b: Tensor, columns_bs: Tensor) -> Place:
        """Some of the tokens: [b, s], of rows ``rows_b`` of the pass."""
        rows_b1, context = rows_b.unsqueeze(1), self.context
        cos, sin = (table[rows_b1, 0, columns_bs].unsqueeze(1) for table in (context.cos_Sh, context.sin_Sh))
        slots_bs = self.slots_BS[rows_b1, columns_bs]
        if context.mask_BSS is None:
            mask = torch.arange(self.length, device=slots_bs.device) <= slots_bs.unsqueeze(-1)
        else:
            mask = context.mask_BSS[rows_b1, columns_bs]
        return Place(
            rows_b if self.rows_B is None else self.rows_B[rows_b],
            slots_bs,
            self.length,
            AttentionContext(cos, sin, mask),
        )

    def column(self, column: int) -> Place:
        """One token of each row."""
        at, context = slice(column, column + 1), self.context
        cos, sin = (table[:, :, at] for table in (context.cos_Sh, context.sin_Sh))
        mask = None if context.mask_BSS is None else context.mask_BSS[:, at]
        start = None if self.start is None else self.start + column
        if mask is None:  # plain causal: nothing after it
            assert start is not None
            return Place(self.rows_B, self.slots_BS[:, at], start + 1, AttentionContext(cos, sin), start)
        return Place(self.rows_B, self.slots_BS[:, at], self.length, AttentionContext(cos, sin, mask), start)

    def where(self, who_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and slots of some of the tokens."""
        rows_N, columns_N = who_BS.nonzero(as_tuple=True)
        return (rows_N if self.rows_B is None else self.rows_B[rows_N]), self.slots_BS[rows_N, columns_N]


class LoopCaches:
    """Room for ``rows`` sequences of up to ``length`` tokens.

    Args:
        calls: the executions of layers that will be run.

    Raises:
        ValueError: a loop whose iterations are not whole, of which two executions would share what they keep.
    """

    def __init__(
        self, model: Decoder, calls: Sequence[LayerCall], rows: int, length: int, policy: CachePolicy = CachePolicy()
    ):
        self._iterations = loop_iterations(calls)
        self._kept = min(policy.shared or self._iterations, self._iterations)
        uses = [(call.layer_id, call.iteration) for call in calls if call.iteration is not None]
        looped = list(dict.fromkeys(layer_id for layer_id, _ in uses))
        if len(set(uses)) != len(uses) or len(uses) != self._iterations * len(looped):
            raise ValueError("every layer of the loop must run once in each iteration; an edited order has no caches")
        # one tensor for all of the loop: what is lent goes from iteration to iteration of all its layers at once
        self._loop = _Tensors.new(model, (self._kept, len(looped)), rows, length)
        self._rest = _Tensors.new(model, (len(calls) - self._iterations * len(looped),), rows, length)
        outside = iter(range(len(calls)))
        self._of_call = [
            self._rest.of(next(outside))
            if call.iteration is None
            else self._loop.of(call.iteration % self._kept, looped.index(call.layer_id))
            for call in calls
        ]

    @property
    def is_full(self) -> bool:
        """Every iteration has its own keys and values."""
        return self._kept == self._iterations

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensors in (self._loop, self._rest) for tensor in tensors)

    def at(self, calls: range, place: Place) -> list[KeyValueCache]:
        """What those calls (by their number) are given: they write to a place and see what is before it."""
        return [_Window(self._of_call[number], place) for number in calls]

    def lend(self, place: Place, who_BS: Tensor | None, ran: int) -> None:
        """Tokens that ran ``ran`` iterations: those that they did not run see their last one (``latest``, arXiv 2502.05171).

        Args:
            who_BS: which tokens of the place; None: all.
        """
        if ran >= self._kept:  # an iteration that shares its slot with one that ran has what that left there
            return
        if who_BS is None and place.rows_B is None and place.start is not None:
            rows, count = place.slots_BS.shape
            for tensor in self._loop:
                slots = tensor[:, :, :rows, :, place.start : place.start + count]
                slots[ran:] = slots[ran - 1 : ran]
            return
        rows_M, slots_M = place.where(torch.ones_like(place.slots_BS, dtype=torch.bool) if who_BS is None else who_BS)
        for tensor in self._loop:
            tensor[ran:, :, rows_M, :, slots_M] = tensor[ran - 1 : ran, :, rows_M, :, slots_M]

    def take(self, full: LoopCaches, rows: range, length: int) -> None:
        """The first ``length`` tokens of the rows of other caches, which keep every iteration, into these rows here.

        What shares a slot gets the last of it.
        """
        for source, target in zip(full._of_call, self._of_call, strict=True):
            for of, to in zip(source, target, strict=True):
                to[rows.start : rows.stop, :, :length] = of[: len(rows), :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """A row takes another's place."""
        for tensors in (self._loop, self._rest):
            for tensor in tensors:
                tensor[..., target, :, :length, :] = tensor[..., source, :, :length, :]


class _Tensors(NamedTuple):
    """Keys and values [..., R, K, T, H] of several calls, or of one."""

    keys: Tensor
    values: Tensor

    @classmethod
    def new(cls, model: Decoder, calls: tuple[int, ...], rows: int, length: int) -> Self:
        parameter = next(model.parameters())
        shape = (*calls, rows, model.config.num_kv_heads // model.tp.size, length, model.config.head_size)
        # zeros: rows look at as many slots as the longest, and what is masked must not be NaN
        return cls(parameter.new_zeros(shape), parameter.new_zeros(shape))

    def of(self, *place: int) -> _Tensors:
        return _Tensors(self.keys[place], self.values[place])


class _Window(KeyValueCache):
    """The part of a cache that a pass writes to and looks at."""

    def __init__(self, store: _Tensors, place: Place):
        self.k_BKTH, self.v_BKTH = store
        self.length = place.length
        self._place = place

    def append(self, k_BKSH: Tensor, v_BKSH: Tensor) -> tuple[Tensor, Tensor]:
        return self._written(self.k_BKTH, k_BKSH), self._written(self.v_BKTH, v_BKSH)

    def _written(self, kept_RKTH: Tensor, new_BKSH: Tensor) -> Tensor:
        place, (batch, _, count, _) = self._place, new_BKSH.shape
        if place.rows_B is None:
            seen_BKTH = kept_RKTH[:batch, :, : place.length]
            if place.start is not None:
                seen_BKTH[:, :, place.start : place.start + count] = new_BKSH
                return seen_BKTH
            rows_B1 = torch.arange(batch, device=new_BKSH.device).unsqueeze(1)
            kept_RKTH[rows_B1, :, place.slots_BS] = new_BKSH.transpose(1, 2)
            return seen_BKTH
        kept_RKTH[place.rows_B.unsqueeze(1), :, place.slots_BS] = new_BKSH.transpose(1, 2)
        return kept_RKTH[place.rows_B, :, : place.length]


class Recorded(KeyValueCache):
    """Keys and values of one execution over one sequence, which others follow."""

    def __init__(self) -> None:
        self.length = 0

    def append(self, k_BKSH: Tensor, v_BKSH: Tensor) -> tuple[Tensor, Tensor]:
        assert not self.length, "one sequence"
        self.k_BKTH, self.v_BKTH, self.length = k_BKSH, v_BKSH, k_BKSH.shape[2]
        return k_BKSH, v_BKSH


class Following(KeyValueCache):
    """What rows see in one execution: the same sequence before each, or nothing, and themselves; nothing is kept."""

    def __init__(self, before: Recorded | None):
        self._before, self.length = before, before.length if before is not None else 0

    def append(self, k_BKSH: Tensor, v_BKSH: Tensor) -> tuple[Tensor, Tensor]:
        if self._before is None:
            return k_BKSH, v_BKSH
        rows = len(k_BKSH)
        keys_BKCH, values_BKCH = (
            before.expand(rows, -1, -1, -1) for before in (self._before.k_BKTH, self._before.v_BKTH)
        )
        return torch.cat([keys_BKCH, k_BKSH], 2), torch.cat([values_BKCH, v_BKSH], 2)
