"""How much of its depth a model uses, in known cases."""

from __future__ import annotations

import numpy as np
import pytest

from megaloop.analysis.effective_depth import (
    depth_score,
    first_below_half,
    first_overlap,
    last_crossing,
    score_interval,
)


@pytest.mark.parametrize(
    ("cosines", "layer"),
    [
        ([-0.1, -0.2, 0.1, 0.2], 3),
        ([-0.1, 0.1, -0.1, 0.1], 4),
        ([0.1, -0.1, 0.2, -0.3], 3),
        ([-0.1, 0.0, 0.2], 3),
        ([-0.1, 0.0, -0.2], None),
        ([0.0, 0.1], None),
        ([0.1, 0.2], None),
        ([0.2, -0.1], None),
        ([], None),
    ],
)
def test_the_last_crossing_is_the_last_layer_that_is_positive_after_a_negative_one(
    cosines: list[float], layer: int | None
) -> None:
    assert last_crossing(cosines) == layer


def test_the_lens_settles_at_the_first_place_past_its_threshold() -> None:
    assert first_below_half([4.0, 3.0, 2.0, 1.9, 2.5, 0.0]) == 3, "half itself is not below it"
    assert first_below_half([1.0, 5.0, 2.0]) == 0
    assert first_below_half([0.0, 0.0]) is None
    assert first_below_half([]) is None
    assert first_overlap([0.0, 0.2, 0.21, 0.1]) == 2
    assert first_overlap([0.0, 0.1]) is None


def test_the_depth_score_is_the_mean_layer_weighted_by_effects() -> None:
    assert depth_score([0.0, 0.0, 0.3, 0.0]) == 2, "layers are counted from 0"
    assert depth_score([0.5] * 7) == pytest.approx(3)
    assert depth_score([0.1, 0.3]) == pytest.approx(0.3 / 0.4)
    assert depth_score([0.0, 0.0]) is None


def test_the_interval_holds_the_true_score_about_as_often_as_it_says() -> None:
    """Effects are exponential with means 1 to 6: the score of the means is 70 / 21."""
    rng = np.random.default_rng(0)
    holds = 0
    for seed in range(200):
        effects_PL = rng.exponential(np.arange(1, 7), size=(30, 6))
        found = score_interval(effects_PL, 400, seed)
        assert found.low is not None
        assert found.high is not None
        holds += found.low <= 70 / 21 <= found.high
    # binomial: 95% of 200 is 190, with a standard deviation of 3; the bootstrap of 30 prompts is a little narrow. Measured: 184
    assert 177 <= holds <= 199


def test_the_interval_is_that_of_resampled_prompts() -> None:
    effects_PL = np.random.default_rng(1).exponential(size=(5, 4))
    found = score_interval(effects_PL, 300, seed=7)
    assert found == score_interval(effects_PL, 300, seed=7)
    assert found != score_interval(effects_PL, 300, seed=8)
    assert found.value == depth_score(effects_PL.mean(0))
    drawn = np.random.default_rng(7).integers(5, size=(300, 5))
    scores = [depth_score(effects_PL[one].mean(0)) for one in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(scores, [2.5, 97.5])))  # type: ignore[arg-type]


def test_prompts_that_say_nothing_have_no_interval() -> None:
    one = score_interval([[0.0, 1.0]])
    assert (one.value, one.low, one.high) == (1.0, None, None)
    none = score_interval(np.zeros((3, 2)))
    assert (none.value, none.low, none.high) == (None, None, None)
    same = score_interval([[1.0, 1.0]] * 4)
    assert (same.value, same.low, same.high) == pytest.approx((0.5, 0.5, 0.5))
    mostly_zero = score_interval([[0.0, 0.0]] * 5 + [[0.0, 1.0]])
    assert (mostly_zero.value, mostly_zero.low, mostly_zero.high) == (1.0, 1.0, 1.0)
