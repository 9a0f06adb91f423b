"""What a rank holds of a tensor: a box of it, or a flat fragment of that box.

A tensor-parallel rank holds a *box* (a rectangular region) of a weight. Under ZeRO-1 a data-parallel
rank holds, of masters and moments, a contiguous *range* of that box in row-major order. Checkpoints
record pieces, and any topology reads what any other wrote by asking for the piece it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KINDS", "Box", "Piece", "StatePiece"]

KINDS = ("model", "master", "exp_avg", "exp_avg_sq")
"""The kinds of state a parameter has: its training copy, the fp32 master, Adam's two moments."""


@dataclass(frozen=True)
class Box:
    """A rectangular region of a tensor: where it begins and how large it is, per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The region that both cover, or None."""
        begin = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        end = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        if any(b >= e for b, e in zip(begin, end, strict=True)):
            return None
        return Box(begin, tuple(e - b for b, e in zip(begin, end, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Index of this region inside a tensor that holds ``outer``."""
        return tuple(slice(b - o, b - o + n) for b, o, n in zip(self.offset, outer.offset, self.shape, strict=True))


@dataclass(frozen=True)
class Piece:
    """A part of one named tensor.

    Attributes:
        name: canonical name, such as ``layers.3.attention.wq.weight``.
        shape: shape of the whole tensor.
        box: the region of it (its tensor-parallel slice).
        flat: None for the whole box, or [start, stop) of the box's elements in row-major order.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    flat: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        return self.box.numel if self.flat is None else self.flat[1] - self.flat[0]


@dataclass(frozen=True)
class StatePiece:
    """A piece with its values, as one rank holds it.

    Attributes:
        kind: one of :data:`KINDS`.
        piece: which part of which tensor.
        data: the values: shaped like the box, or one-dimensional for a flat fragment.
        writes: this rank is the one that saves this piece (of several that hold the same).
    """

    kind: str
    piece: Piece
    data: Tensor
    writes: bool = True
