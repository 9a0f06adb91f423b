"""The order of samples is a pure function, exact per epoch, fair to weights, and local to shards."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from megaloop.data.order import BLOCK_SHARDS, SampleOrder, permute

shards = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(size=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


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


@settings(max_examples=50)
@given(weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=5))
def test_every_prefix_meets_the_weights(weights: list[float]) -> None:
    order = SampleOrder(0, [[7]] * len(weights), weights)
    counts = [0] * len(weights)
    for number in range(400):
        source, before = order.source(number)
        assert before == counts[source]  # the j-th sample of a source, counted without gap
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (number + 1) * weight / sum(weights)) < len(weights)


def test_a_walk_stays_within_few_shards() -> None:
    sizes = [50] * 40
    order = SampleOrder(3, [sizes], [1.0])
    for start in range(0, 2000, 50):
        touched = {order(start + i)[1] // 50 for i in range(50)}
        assert len(touched) <= 2 * BLOCK_SHARDS


def test_any_sample_number_is_found_at_once() -> None:
    order = SampleOrder(0, [[1000] * 50_000, [10] * 3], [0.7, 0.3])
    order(10**12)
    began = time.perf_counter()
    places = [order(10**9 + i) for i in range(200)]
    assert (time.perf_counter() - began) / 200 < 1e-3 * 5  # a walk from 0 would take minutes
    assert places == [order(10**9 + i) for i in range(200)]
