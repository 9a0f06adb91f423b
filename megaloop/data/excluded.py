"""Samples that a run passes over, because training on them went wrong: ranges of the global order."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Holes", "past_holes"]

Holes = Sequence[tuple[int, int]]
"""[start, stop) of global sample numbers."""


def past_holes(start: int, count: int, holes: Holes) -> int:
    """The first sample from ``start`` on that begins ``count`` samples with no hole in them."""
    for begin, end in sorted(holes):
        if begin < start + count and start < end:
            start = end
    return start
