"""The order of samples is a pure function, exact per epoch, fair to weights, and local to shards."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaloop.data.order import BLOCK_SHARDS, CURRENT, SampleOrder, permute, shuffled
from megaloop.errors import MegaloopError

shards = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(deadline=None)
@given(size=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_permutations_are_permutations(size: int, key: int) -> None:
    for function in (permute, shuffled):
        assert sorted(function(i, size, key) for i in range(size)) == list(range(size))


@settings(deadline=None)
@given(sizes=shards, seed=st.integers(0, 2**32), version=st.sampled_from([1, 2]))
def test_every_sample_occurs_exactly_once_per_epoch(sizes: list[int], seed: int, version: int) -> None:
    order, size = SampleOrder(seed, [sizes], [1.0], version=version), sum(sizes)
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


# --- uniformity, and versions


def _deviations(outcomes: Iterable[Hashable], possible: int) -> float:
    """Pearson's chi-square of outcomes that ought to be equally likely, in standard deviations above its mean."""
    counts = Counter(outcomes)
    assert len(counts) <= possible
    expected = counts.total() / possible
    assert expected > 30
    square = sum((count - expected) ** 2 for count in counts.values()) + (possible - len(counts)) * expected**2
    return (square / expected - (possible - 1)) / math.sqrt(2 * (possible - 1))


@pytest.mark.parametrize("sizes", [[3], [2, 1], [4], [1, 1, 1, 1], [5], [2, 2, 1]])
def test_every_order_of_few_samples_is_as_likely_as_any_other(sizes: list[int]) -> None:
    possible = math.factorial(sum(sizes))
    seeds = range(40 * possible)
    assert _deviations(_walks(sizes, seeds), possible) < 4
    assert _deviations(_walks(sizes, seeds, epoch=10**9), possible) < 4


def test_the_deviation_of_version_1_is_what_the_statistics_see() -> None:
    assert _deviations(_walks([5], range(4800), version=1), 120) > 50


def _walks(sizes: list[int], seeds: Iterable[int], version: int = CURRENT, epoch: int = 0) -> list[tuple[int, ...]]:
    """The samples of an epoch in their order, for each seed."""
    orders = (SampleOrder(seed, [sizes], [1.0], version=version) for seed in seeds)
    numbers = range(epoch * sum(sizes), (epoch + 1) * sum(sizes))
    return [tuple(order(number)[1] for number in numbers) for order in orders]


@pytest.mark.parametrize("count", [7, 16])
def test_every_place_and_neighbour_is_as_likely_as_any_other(count: int) -> None:
    walks = _walks([count], range(5000))
    for place in (0, count // 2, count - 1):
        assert _deviations([walk[place] for walk in walks], count) < 4
        assert _deviations([walk.index(place) for walk in walks], count) < 4
    pairs = [(walk[0], walk[1]) for walk in walks] if count == 7 else [(b - a) % count for a, b, *_ in walks]
    assert _deviations(pairs, count * (count - 1) if count == 7 else count - 1) < 4


def test_epochs_and_sources_are_shuffled_independently() -> None:
    epochs, sources = [], []
    for seed in range(36 * 60):
        order = SampleOrder(seed, [[3], [3]], [0.5, 0.5])
        taken = _taken(order, 12, 2)
        epochs.append(tuple(sample for _, sample in taken[0]))  # two epochs of the first source
        sources.append(tuple(sample for source in taken for _, sample in source[:3]))
    assert _deviations(epochs, 36) < 4
    assert _deviations(sources, 36) < 4


def test_the_order_of_runs_that_began_with_version_1_is_what_it_was() -> None:
    one = SampleOrder(0, [[5]], [1.0], version=1)
    assert [one(number)[1] for number in range(15)] == [0, 1, 3, 2, 4, 3, 2, 4, 0, 1, 3, 0, 4, 2, 1]
    mixed = SampleOrder(7, [[3, 4], [16]], [0.7, 0.3], [(20, [1.0, 0.0])], version=1)
    walk = "01 02 1F 05 00 14 03 06 04 13 04 03 1A 02 01 17 00 05 06 1C 05 00 03 01 04 06 02 02 03 00"
    assert " ".join(f"{source}{index:X}" for source, index in map(mixed, range(30))) == walk
    large = SampleOrder(3, [[1000] * 50, [700, 800]], [0.9, 0.1], version=1)
    places = [large(number) for number in [*range(2000), *range(10**12, 10**12 + 2000)]]
    digest = "88904f1607a0e72529fe2d30adc142e991b01d257d318b7d9329049d1c9164a7"
    assert hashlib.sha256(repr(places).encode()).hexdigest() == digest


def test_the_order_of_new_runs_is_the_same_everywhere() -> None:
    order = SampleOrder(7, [[3, 4], [16]], [0.7, 0.3], [(20, [1.0, 0.0])], version=2)
    walk = "06 04 10 02 03 18 01 00 05 1A 03 02 12 00 01 1F 05 06 04 16 02 00 03 01 04 06 05 01 02 06"
    assert " ".join(f"{source}{index:X}" for source, index in map(order, range(30))) == walk


def test_a_version_of_the_future_is_refused() -> None:
    with pytest.raises(MegaloopError, match=f"in an order of version 99; this megaloop knows 1 to {CURRENT}"):
        SampleOrder(0, [[5]], [1.0], version=99)
