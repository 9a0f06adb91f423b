"""What a rank holds of a tensor: a box of it, or a flat fragment of that box.

A tensor-parallel rank holds a *box* (a rectangular region) of a weight. Under ZeRO-1 a data-parallel
rank holds, of masters and moments, a contiguous *range* of that box in row-major order. Checkpoints
record pieces, and any topology reads what any other wrote by asking for the piece it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STATE_NAMES", "Box", "Piece", "StatePiece"]

STATE_NAMES = ("model", "master", "exp_avg", "exp_avg_sq")
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
        # one loop that ends early: planning the growth of a large model on many ranks asks hundreds of thousands of times
        begin, size = [], []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            first = max(a, b)
            count = min(a + n, b + m) - first
            if count <= 0:
                return None
            begin.append(first)
            size.append(count)
        return Box(tuple(begin), tuple(size))

    def minus(self, other: Box) -> list[Box]:
        """What of this region the other does not cover, as boxes that do not overlap."""
        common = self.intersect(other)
        if common is None:
            return [self]
        rest = []
        offset, shape = list(self.offset), list(self.shape)
        for axis, (begin, size) in enumerate(zip(common.offset, common.shape, strict=True)):
            low, high = offset[axis], offset[axis] + shape[axis]
            for start, stop in ((low, begin), (begin + size, high)):
                if start < stop:
                    rest.append(
                        Box(
                            (*offset[:axis], start, *offset[axis + 1 :]),
                            (*shape[:axis], stop - start, *shape[axis + 1 :]),
                        )
                    )
            offset[axis], shape[axis] = begin, size
        return rest

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

    def rectangles(self) -> Iterator[tuple[Box, int]]:
        """The piece as boxes, each with the position in ``box`` (row-major) at which it begins."""
        yield from _rectangles(self.box, *(self.flat or (0, self.box.numel)))


def _rectangles(box: Box, start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """A flat range of a box as boxes: of a matrix, the end of a row, whole rows, and the beginning of a row."""
    if start >= stop:
        return
    if (start, stop) == (0, box.numel):
        yield box, 0
        return
    (origin, *origins), (_, *sizes) = box.offset, box.shape
    inner = Box(tuple(origins), tuple(sizes))
    row = inner.numel
    first, last = start // row, stop // row
    cut = []  # the rows of which only a part belongs to the range
    if start % row:
        cut.append((first, start % row, min(stop - first * row, row)))
        first += 1
    if first <= last and stop % row:
        cut.append((last, 0, stop % row))
    for index, begin, end in cut:
        for part, at in _rectangles(inner, begin, end):
            yield Box((origin + index, *part.offset), (1, *part.shape)), index * row + at
    if first < last:
        yield Box((origin + first, *origins), (last - first, *sizes)), first * row


@dataclass(frozen=True)
class StatePiece:
    """A piece with its values, as one rank holds it.

    Attributes:
        state_name: one of :data:`STATE_NAMES`.
        piece: which part of which tensor.
        data: the values: shaped like the box, or one-dimensional for a flat fragment.
        writes: this rank is the one that saves this piece (of several that hold the same).
    """

    state_name: str
    piece: Piece
    data: Tensor
    writes: bool = True

    def regions(self) -> Iterator[tuple[Box, Tensor]]:
        """The values as rectangles: each box with a view of its shape."""
        flat = self.data.reshape(-1) if self.piece.flat is None else self.data.view(-1)
        first = 0 if self.piece.flat is None else self.piece.flat[0]
        for box, at in self.piece.rectangles():
            yield box, flat[at - first : at - first + box.numel].view(box.shape)
