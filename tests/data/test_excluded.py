"""Excluded samples: nobody reads them, and everybody reads all others, each once."""

from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from megaloop.data import past_excluded
from megaloop.data.loader import _slices

EXCLUDED = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda item: (item[0], item[0] + item[1])), max_size=4
)


def test_without_holes_nothing_is_passed_over() -> None:
    assert past_excluded(8, 4, []) == 8
    assert past_excluded(8, 4, [(4, 8), (12, 16)]) == 8


def test_a_batch_that_would_reach_into_a_hole_begins_after_it() -> None:
    assert past_excluded(8, 4, [(8, 12)]) == 12
    assert past_excluded(7, 4, [(8, 12)]) == 12
    assert past_excluded(8, 4, [(12, 16), (4, 10)]) == 16, "out of one range, into the next"


@given(st.integers(0, 70), st.integers(1, 8), EXCLUDED)
def test_what_is_found_has_no_hole_in_it(start: int, count: int, excluded: list[tuple[int, int]]) -> None:
    found = past_excluded(start, count, excluded)
    assert found >= start
    assert not any(begin < found + count and found < end for begin, end in excluded if begin < end)


@given(EXCLUDED, st.sampled_from([1, 2, 4]))
def test_replicas_together_read_what_one_reads(excluded: list[tuple[int, int]], replicas: int) -> None:
    alone = [numbers for _, numbers in islice(_slices(0, 4, 1, 0, 1, excluded), 40)]
    ranks = [(numbers for _, numbers in _slices(0, 4, 1, rank, replicas, excluded)) for rank in range(replicas)]
    together = [number for _ in range(10) for rank in ranks for number in islice(rank, 4 // replicas)]
    assert together == alone
    read = [number for numbers in alone for number in numbers]
    assert sorted(set(read)) == read, "each once, in order"
    assert not any(begin <= number < end for number in read for begin, end in excluded)
