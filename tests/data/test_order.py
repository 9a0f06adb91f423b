"""The order of samples is a pure function, exact per epoch, fair to weights, and local to shards."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaloop.data.order import BLOCK_SHARDS, SampleOrder, permute

shards = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(deadline=None)
@given(size=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@settings(deadline=None)
@given(sizes=shards, seed=st.integers(0, 2**32))
def test_every_sample_occurs_exactly_once_per_epoch(sizes: list[int], seed: int) -> None:
    order, size = SampleOrder(seed, [sizes], [1.0]), sum(sizes)
    for epoch in range(3):
        seen = [order(epoch * size + i) for i in range(size)]
        assert sorted(seen) == [(0, i) for i in range(size)]


def test_epochs_and_seeds_differ() -> None:
    size = 100
    walks = [
        [SampleOrder(seed, [[10] * 10], [1.0])(first + i) for i in range(size)]
        for seed in (0, 1)
        for first in (0, size)
    ]
    assert all(a != b for number, a in enumerate(walks) for b in walks[:number])


def _largest_deviation(weights: list[float], samples: int) -> Fraction:
    """From the weights, over all prefixes; a sample of a source that is skipped or repeated fails at once."""
    order = SampleOrder(0, [[7]] * len(weights), weights)
    exact = [Fraction(repr(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    counts, largest = [0] * len(weights), Fraction(0)
    for number in range(samples):
        source, before = order.source(number)
        assert before == counts[source]
        counts[source] += 1
        largest = max(largest, *(abs(n - (number + 1) * share) for n, share in zip(counts, shares, strict=True)))
    return largest


@settings(max_examples=50, deadline=None)
@given(hundredths=st.lists(st.integers(1, 60), min_size=2, max_size=8))
def test_every_prefix_meets_the_weights_to_within_one_sample(hundredths: list[int]) -> None:
    assert _largest_deviation([weight / 100 for weight in hundredths], 2 * sum(hundredths) + 3) < 1


@pytest.mark.parametrize("weights", [[1.0, 1 / 3, 0.123456789], [math.pi, math.e], [1.0, 1.0, 1e-9]])
def test_weights_without_a_short_pattern_are_met_too(weights: list[float]) -> None:
    assert _largest_deviation(weights, 3000) < 1 + Fraction(3000, 1 << 16)


def test_a_walk_stays_within_few_shards() -> None:
    sizes = [50] * 40
    order = SampleOrder(3, [sizes], [1.0])
    for start in range(0, 2000, 50):
        touched = {order(start + i)[1] // 50 for i in range(50)}
        assert len(touched) <= 2 * BLOCK_SHARDS


def test_any_sample_number_is_found_at_once() -> None:
    """A walk from 0 to here would take years; and what was asked before changes nothing."""
    far = range(10**18, 10**18 + 200)
    order = SampleOrder(0, [[1000] * 5000, [10] * 3], [0.7, 0.3])
    places = [order(number) for number in far]
    order(5)
    assert [order(number) for number in reversed(far)] == places[::-1]


def _taken(order: SampleOrder, samples: int, sources: int) -> list[list[tuple[int, int]]]:
    """(turn, sample) that each source gives, in the order in which it gives them."""
    taken: list[list[tuple[int, int]]] = [[] for _ in range(sources)]
    for number in range(samples):
        source, turn = order.source(number)
        assert order(number)[0] == source
        taken[source].append((turn, order(number)[1]))
    return taken


@settings(max_examples=50, deadline=None)
@given(
    first=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    second=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    change=st.integers(0, 60),
)
def test_a_change_of_weights_repeats_and_skips_no_sample(first: list[int], second: list[int], change: int) -> None:
    """Each source goes on where it was: across the change it is walked as if nothing had changed."""
    order, sizes = SampleOrder(5, [[4, 3]] * 3, first, [(change, second)]), 7
    for source, taken in enumerate(_taken(order, 120, 3)):
        alone = SampleOrder(5, [[4, 3]] * 3, [float(i == source) for i in range(3)])
        assert [turn for turn, _ in taken] == list(range(len(taken)))
        assert taken == [(turn, alone(turn)[1]) for turn in range(len(taken))]
        for epoch in range(len(taken) // sizes):
            assert sorted(sample for _, sample in taken[epoch * sizes : (epoch + 1) * sizes]) == list(range(sizes))
    for weights, numbers in ((first, range(change)), (second, range(change, 120))):
        counts = [sum(order.source(number)[0] == source for number in numbers) for source in range(3)]
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - len(numbers) * weight / sum(weights)) < 1
            assert weight or not count
