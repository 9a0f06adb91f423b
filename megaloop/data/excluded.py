"""Samples that a run excludes because training on them went wrong: ranges of the global order."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ExcludedSamples", "past_excluded"]

ExcludedSamples = Sequence[tuple[int, int]]
"""[start, stop) of global sample numbers."""


def past_excluded(start: int, count: int, excluded: ExcludedSamples) -> int:
    """The first sample from ``start`` on that begins ``count`` samples with no excluded one among them."""
    for begin, end in sorted(excluded):
        if begin < start + count and start < end:
            start = end
    return start
