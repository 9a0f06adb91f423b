"""Intervals, paired tests and Holm's correction: by hand, against scipy, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from megaloop.report.statistics import holm, interval, p_value, paired

FIRST = {0: 0.81, 1: 0.78, 2: 0.84, 3: 0.80, 4: 0.77}
SECOND = {0: 0.74, 1: 0.75, 2: 0.76, 3: 0.77, 4: 0.72, 9: 0.10}


def test_an_interval_by_hand() -> None:
    """Values 1, 2, 3: mean 2, deviation 1, t(2) = 4.302653."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.margin == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)


def test_one_seed_has_neither_interval_nor_p() -> None:
    assert (interval([0.5]).low, interval([0.5]).high, interval([0.5]).margin) == (None, None, None)
    assert p_value([0.5]) is None
    with pytest.raises(ValueError, match="needs values"):
        interval([])


def test_paired_differences_are_of_seeds_that_both_have() -> None:
    """Differences .07 .03 .08 .03 .05: mean .052, deviation .0228035, error .0101980, t = 5.09902."""
    found = paired(FIRST, SECOND)
    assert list(found) == [0, 1, 2, 3, 4]
    values = list(found.values())
    assert interval(values).mean == pytest.approx(0.052)
    assert interval(values).margin == pytest.approx(2.776445 * 0.0101980, rel=1e-5)
    assert p_value(values) == pytest.approx(2 * stats.t.sf(5.09902, 4), rel=1e-4)


@pytest.mark.parametrize("bound", [0.0, -0.02, 0.05, 0.2])
def test_tests_are_scipys(bound: float) -> None:
    values = list(paired(FIRST, SECOND).values())
    expected = stats.ttest_rel([FIRST[seed] - bound for seed in range(5)], [SECOND[seed] for seed in range(5)])
    assert p_value(values, bound) == pytest.approx(float(expected.pvalue))
    low, high = expected.confidence_interval(0.95)
    found = interval([value - bound for value in values])
    assert (found.low, found.high) == pytest.approx((float(low), float(high)))


def test_p_is_below_five_percent_where_the_interval_leaves_the_bound_out() -> None:
    values = [0.01, 0.03, -0.01, 0.04]
    low = interval(values).low
    assert low is not None
    for bound, inside in ((low - 1e-6, False), (low + 1e-6, True)):
        found = p_value(values, bound)
        assert found is not None
        assert (found > 0.05) is inside


def test_differences_that_are_all_the_same_are_certain() -> None:
    assert p_value([0.5, 0.5], 0.5) == 1.0
    assert p_value([0.5, 0.5]) == 0.0
    assert interval([0.5, 0.5]).margin == 0.0


def test_what_was_chosen_on_the_other_seeds_has_the_wider_interval() -> None:
    """Values 1, 2, 3: deviation 1, error sqrt(1/3 + 1/2) instead of sqrt(1/3)."""
    values = [1.0, 2.0, 3.0]
    assert interval(values, left_out=True).mean == 2.0
    assert interval(values, left_out=True).margin == pytest.approx(4.302653 * math.sqrt(5 / 6), rel=1e-6)
    assert p_value(values, left_out=True) == pytest.approx(2 * stats.t.sf(2 / math.sqrt(5 / 6), 2))


def test_holm_by_hand() -> None:
    """Four: times 4, 3, 2, 1 in order of size, and never smaller than one before; in the order in which they came."""
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_error_of_the_family() -> None:
    """Twelve true nulls, five seeds, correlated as claims are that share contenders: any is rejected in at most 5%; without it in more."""
    random = np.random.default_rng(0)
    families, claims, seeds = 1000, 12, 5
    # each claim is a difference of two of eight contenders
    scores = random.normal(size=(families, 8, seeds))
    pairs = [random.choice(8, 2, replace=False) for _ in range(claims)]
    wrong = wrong_without = 0
    for family in scores:
        found = [p_value(list(family[a] - family[b])) or 0.0 for a, b in pairs]
        wrong += min(holm(found)) < 0.05
        wrong_without += min(found) < 0.05
    error = math.sqrt(0.05 * 0.95 / families)
    assert wrong / families < 0.05 + 2 * error
    assert wrong_without / families > 0.2
