"""The order of samples: a pure function of (seed, global sample number), whatever the topology.

Two questions, both answered in constant time without replaying what came before: which source does global
sample n come from, and which of its samples is the j-th that the run takes from a source?

* Sources are interleaved by weight, in a pattern that repeats: among the first n samples, a source of share a has
  less than one sample more or fewer than n a, for every n and however many sources there are. Where the weights change
  at a sample (the cooldown), the pattern of the new ones begins there, and each source goes on where it was.
* A source is walked epoch by epoch. An epoch is a permutation: shards in shuffled order, one after another,
  and samples shuffled within blocks of a few shards' length, so that a reader streams through few shards at
  a time. Every sample occurs exactly once per epoch.

Permutations are Feistel networks (Black and Rogaway, CT-RSA 2002) over splitmix64: integers in, integers
out, the same on every machine and with every version of every library. Four rounds over very few items are far from
uniform (of the 120 orders of five, some come eight times as often as others), so up to 1,024 items are shuffled
outright; runs that began before that (version 1 of the order) keep the order that they began with.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import lcm

from megaloop.errors import MegaloopError

__all__ = ["CURRENT", "SampleOrder", "check_version", "permute", "shuffled"]

CURRENT = 2
"""The version of the order that new runs take. A run keeps the one that it began with: its checkpoints record it.

1: Feistel networks for any number of items. 2: up to ``_SHUFFLED`` items are shuffled, more are as in version 1.
"""
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_SHUFFLED = 1024
"""Items that are shuffled outright: a millisecond, once per block. (From 100 on, four rounds show no deviation.)"""
BLOCK_SHARDS = 4
"""Samples are shuffled within blocks as long as this many shards."""
_LONGEST_PATTERN = 1 << 16
"""Shares that need a longer pattern than this many samples are rounded to multiples of its reciprocal."""


def _mix(value: int) -> int:
    """splitmix64's finaliser."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = _mix(key ^ _mix(part & _MASK))
    return key


def permute(index: int, size: int, key: int) -> int:
    """The place of ``index`` in a permutation of range(size) chosen by ``key``."""
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:  # walk the cycle until it falls into range; the network spans at most four times the range
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key ^ (turn << 56) ^ right) & mask)
        index = (left << half) | right
        if index < size:
            return index


def shuffled(index: int, size: int, key: int) -> int:
    """As :func:`permute`; every permutation of few items is as likely as any other, over keys."""
    return _shuffle(size, key)[index] if size <= _SHUFFLED else permute(index, size, key)


@lru_cache(maxsize=256)
def _shuffle(size: int, key: int) -> tuple[int, ...]:
    """range(size), shuffled by Fisher and Yates with the numbers that splitmix64 gives from the seed ``key``."""
    items = list(range(size))
    for last in range(size - 1, 0, -1):
        chosen = _mix((key + last * _GAMMA) & _MASK) * (last + 1) >> 64
        items[last], items[chosen] = items[chosen], items[last]
    return tuple(items)


_PERMUTATIONS = {1: permute, 2: shuffled}


def check_version(version: int) -> None:
    """Raise MegaloopError for a version of the order that is not known here."""
    if version not in _PERMUTATIONS:
        raise MegaloopError(
            f"the run's samples are in an order of version {version}; this megaloop knows 1 to {CURRENT}: "
            "go on with the megaloop that began the run"
        )


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """Samples of each source in one pattern: as the weights say exactly, where a pattern need not be too long."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    if not all(shares):  # a source without a share has no place in the pattern
        rest = iter(_whole_shares([weight for weight in weights if weight]))
        return [next(rest) if weight else 0 for weight in weights]
    length = lcm(*(share.denominator for share in shares))
    if length <= _LONGEST_PATTERN:
        return [int(share * length) for share in shares]
    counts = [max(int(share * _LONGEST_PATTERN), 1) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * _LONGEST_PATTERN)
    for i in by_remainder[: max(_LONGEST_PATTERN - sum(counts), 0)]:  # none where tiny shares were raised to one
        counts[i] += 1
    return counts


def _interleave(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(source, how many of that source came before) for each place of a pattern with ``counts`` of each source.

    Just-in-time sequencing (Steiner and Yeomans, Management Science 39, 1993): the j-th sample of a source may stand
    only where the source is then neither a whole sample ahead of its share nor behind it. Taking the one whose last
    chance comes first always succeeds.
    """
    length, placed = sum(counts), [0] * len(counts)
    pattern = []
    for place in range(length):
        allowed = [i for i, count in enumerate(counts) if placed[i] * length < (place + 1) * count]
        source = min(allowed, key=lambda i: -(-(placed[i] + 1) * length // counts[i]))
        pattern.append((source, placed[source]))
        placed[source] += 1
    return pattern


class _Phase:
    """The pattern of one set of weights, from sample ``first`` on; ``before``: samples taken of each source till then."""

    def __init__(self, first: int, weights: Sequence[float], before: Sequence[int]):
        self.first, self._before = first, before
        self._counts = _whole_shares(weights)
        self._pattern = _interleave(self._counts)

    def source(self, number: int) -> tuple[int, int]:
        period, place = divmod(number - self.first, len(self._pattern))
        source, before = self._pattern[place]
        return source, self._before[source] + period * self._counts[source] + before

    def taken_before(self, number: int) -> list[int]:
        """Samples of each source among the first ``number`` of the order."""
        period, place = divmod(number - self.first, len(self._pattern))
        taken = [before + period * count for before, count in zip(self._before, self._counts, strict=True)]
        for source, _ in self._pattern[:place]:
            taken[source] += 1
        return taken


class SampleOrder:
    """Which sample of which source is global sample n.

    Args:
        seed: of the run.
        shard_sizes: for every source, the samples of each of its shards.
        weights: shares of the sources, relative to each other; 0 for none.
        changes: [(first sample, weights from there on), ...], by sample.
        version: of the order; that of the run, where it goes on.

    Raises:
        MegaloopError: a version that is not known.
    """

    def __init__(
        self,
        seed: int,
        shard_sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        changes: Sequence[tuple[int, Sequence[float]]] = (),
        version: int = CURRENT,
    ):
        check_version(version)
        self._permute = _PERMUTATIONS[version]
        self._seed = seed
        self._shards = tuple(tuple(sizes) for sizes in shard_sizes)
        self._sizes = [sum(sizes) for sizes in self._shards]
        self._blocks = [max(sizes) * BLOCK_SHARDS for sizes in self._shards]
        self._phases = [_Phase(0, weights, [0] * len(weights))]
        for first, changed in changes:
            self._phases.append(_Phase(first, changed, self._phases[-1].taken_before(first)))
        self._epoch = lru_cache(maxsize=16)(self._shuffled_shards)

    def __call__(self, number: int) -> tuple[int, int]:
        """(source, index of the sample in that source) of global sample ``number``."""
        source, turn = self.source(number)
        size = self._sizes[source]
        return source, self._in_epoch(source, turn // size, turn % size)

    def source(self, number: int) -> tuple[int, int]:
        """(source, how many samples of that source came before) of global sample ``number``."""
        return next(phase for phase in reversed(self._phases) if phase.first <= number).source(number)

    def _in_epoch(self, source: int, epoch: int, position: int) -> int:
        """The sample at ``position`` of an epoch's walk through a source."""
        size, block = self._sizes[source], self._blocks[source]
        start = position // block * block
        length = min(block, size - start)
        position = start + self._permute(position - start, length, _key(self._seed, source, epoch, 1, start // block))
        shards, ends = self._epoch(source, epoch)
        turn = bisect_right(ends, position)
        first, end = shards[turn]
        return first + position - (ends[turn] - (end - first))

    def _shuffled_shards(self, source: int, epoch: int) -> tuple[list[tuple[int, int]], list[int]]:
        """An epoch's shards in their order, as [first, end) samples, and where each ends in the walk."""
        sizes = self._shards[source]
        ends = list(accumulate(sizes))
        key = _key(self._seed, source, epoch, 0)
        order = [self._permute(i, len(sizes), key) for i in range(len(sizes))]
        return [(ends[i] - sizes[i], ends[i]) for i in order], list(accumulate(sizes[i] for i in order))
