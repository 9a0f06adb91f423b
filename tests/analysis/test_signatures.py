"""Signatures find what is there, and can say that it is not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megaloop.analysis import signatures
from megaloop.analysis.signatures import (
    bootstrap,
    depth_score_signature,
    late_layers,
    mean_of,
    middle_permutable,
    period,
    period_test,
    repeat_gain,
    score_by_difficulty,
)

Array = signatures.Array


def _sizes(depth: int, lag: int | None, seed: int) -> Array:
    """What attention adds, [L]: random by layer, or a random pattern that repeats with a little noise; both on a falling trend."""
    generator = np.random.default_rng(seed)
    pattern = generator.normal(size=depth if lag is None else lag)
    noise = 0.0 if lag is None else 0.2 * generator.normal(size=depth)
    return np.asarray(np.exp(np.resize(pattern, depth) + noise - 0.1 * np.arange(depth)))


def _of_prompts(sizes_L: Array, prompts: int = 12, spread: float = 0.02) -> Array:
    """The same of prompts that differ a little, [P, L]."""
    generator = np.random.default_rng(0)
    return np.asarray(sizes_L * np.exp(spread * generator.normal(size=(prompts, len(sizes_L)))))


# --- the period


def test_layers_that_repeat_with_a_period_of_four_are_found_to() -> None:
    """29 of 30: one of the random patterns happens to be nearly flat."""
    found = [period_test(_of_prompts(_sizes(24, 4, seed)), 4) for seed in range(30)]
    assert sum(row.verdict == "seen" for row in found) == 29


def test_random_layers_have_no_period_but_for_the_level_of_the_test() -> None:
    """7 of 200 here; at a level of 5% more than 16 come up once in forty such tests."""
    found = [period_test(_of_prompts(_sizes(24, None, seed)), 4, seed) for seed in range(200)]
    seen = sum(row.verdict == "seen" for row in found)
    assert seen <= stats.binom.ppf(0.975, 200, 0.05)
    assert seen >= 1  # a test that never sees anything is none
    assert {row.verdict for row in found} == {"seen", "not seen"}


def test_another_period_is_not_this_one() -> None:
    assert all(period_test(_of_prompts(_sizes(24, 3, seed)), 4).verdict == "not seen" for seed in range(20))


@pytest.mark.parametrize(
    ("depth", "lag", "verdict"),
    [(6, 2, "not seen"), (8, 2, "not seen"), (12, 4, "not seen"), (30, 4, "not seen"), (6, 3, "unclear"), (8, 4, "unclear")],
)  # fmt: skip
def test_a_period_is_not_seen_only_where_there_are_layers_enough_to_see_it(depth: int, lag: int, verdict: str) -> None:
    """Of patterns that repeat perfectly the test finds half with 8 layers and a period of 4, and all with 8 and 2."""
    found = [period_test(_of_prompts(_sizes(depth, None, seed)), lag) for seed in range(4)]
    missed = [row for row in found if row.p is not None and row.p >= 0.05]
    assert len(missed) >= 2
    assert {row.verdict for row in missed} == {verdict}
    assert all(("perfect patterns" in row.why) == (verdict == "unclear") for row in missed)


def test_few_layers_show_a_period_that_is_plain() -> None:
    """One layer of four far above the others, twice."""
    row = period_test(_of_prompts(np.array([4.0, 1.0, 1.0, 1.0] * 2)), 4)
    assert row.verdict == "seen"
    assert row.low is not None
    assert row.low > 0


def test_a_period_of_one_prompt_among_many_is_unclear() -> None:
    """It shows in the mean, but would not among others of such prompts."""
    sizes_PL = np.stack([1e3 * _sizes(24, 4, 0), *(_sizes(24, None, seed) for seed in range(1, 8))])
    row = period_test(sizes_PL, 4)
    assert row.p is not None
    assert row.p < 0.05
    assert row.low is not None
    assert row.low < 0
    assert (row.verdict, row.why) == ("unclear", "prompts differ too much")


def test_the_interval_of_the_period_is_that_of_resampled_prompts() -> None:
    """Both of 1,000 resamplings, drawn in different ways: their ends differ by 5% of its width."""
    sizes_PL = _of_prompts(_sizes(24, 4, 0), spread=0.5)
    row = period_test(sizes_PL, 4)
    slow = bootstrap(lambda chosen: period(sizes_PL[chosen].mean(0), 4), [np.arange(len(sizes_PL))], seed=1)
    assert slow is not None
    assert (row.low, row.high) == pytest.approx(slow, abs=0.1 * (slow[1] - slow[0]))


def test_a_trend_over_the_layers_is_no_period() -> None:
    assert period(np.exp(-0.3 * np.arange(24.0)), 4) == pytest.approx(0.0, abs=1e-9)


def test_the_contrast_is_that_of_correlations_by_hand() -> None:
    sizes = _sizes(12, 4, 0)
    places = np.arange(12)
    x = np.log(sizes)
    x = x - np.polyval(np.polyfit(places, x, 1), places)
    by_lag = {lag: np.corrcoef(x[:-lag], x[lag:])[0, 1] for lag in range(1, 9)}
    expected = by_lag[4] - np.mean([by_lag[lag] for lag in (1, 2, 3, 5, 6, 7)])
    assert period(sizes, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("depth", "lag", "why"),
    [(4, 2, "4 layers are too few for a period of 2"), (7, 4, "7 layers are too few"), (12, 1, "blocks of one layer have no period")],
)  # fmt: skip
def test_what_stands_in_the_way_of_a_period_is_said(depth: int, lag: int, why: str) -> None:
    row = period_test(_of_prompts(_sizes(depth, None, 0)), lag)
    assert (row.value, row.verdict) == (None, "-")
    assert row.why.startswith(why)


# --- losses under interventions


def _losses(rise_L: Array, prompts: int = 40, seed: int = 0) -> tuple[Array, Array, Array]:
    """Losses with each place changed, without change, and targets: prompts differ by far more than places do."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(20, 60, prompts).astype(np.float64)
    without = generator.uniform(0.5, 3.0, prompts) * targets
    noise = generator.normal(scale=0.02, size=(prompts, len(rise_L)))
    return without[:, None] + (rise_L + noise) * targets[:, None], without, targets


@pytest.mark.parametrize(("late", "verdict"), [(0.5, "seen"), (0.1, "unclear"), (0.0, "not seen")])
def test_late_layers_are_indispensable_where_the_loss_rises_more_without_them(late: float, verdict: str) -> None:
    rise = np.array([0.8, 0.8, 0.1, 0.1, 0.1, 0.1, late, late])
    changed, without, targets = _losses(rise)
    row = late_layers(changed, without, targets)
    assert row.verdict == verdict
    assert row.value == pytest.approx(late - 0.1, abs=0.01)
    assert row.low is not None
    assert row.high is not None
    assert row.low < row.value < row.high  # type: ignore[operator]


@pytest.mark.parametrize(("middle", "verdict"), [(0.05, "seen"), (0.6, "not seen")])
def test_the_middle_is_permutable_where_swaps_at_the_ends_hurt_more(middle: float, verdict: str) -> None:
    rise = np.array([0.4, 0.4, middle, middle, middle, 0.2, 0.2])
    row = middle_permutable(*_losses(rise))
    assert row.verdict == verdict
    assert row.value == pytest.approx(0.3 - middle, abs=0.01)


def test_repeating_a_block_gains_where_it_does() -> None:
    row = repeat_gain(*_losses(np.array([0.3, 0.1, -0.2, 0.1])))
    assert row.verdict == "seen"
    assert row.value == pytest.approx(0.2, abs=0.01)


def test_the_best_of_many_blocks_that_do_nothing_gains_nothing() -> None:
    """Chosen and measured on the same prompts the best of 28 would seem to gain; here none of 12 does."""
    found = [repeat_gain(*_losses(np.zeros(28), seed=seed)) for seed in range(12)]
    assert sum(row.verdict == "seen" for row in found) <= 1
    changed, without, targets = _losses(np.zeros(28), seed=0)
    cheating = ((without[:, None] - changed).sum(0) / targets.sum()).max()
    assert abs(np.mean([row.value for row in found if row.value is not None])) < cheating / 3


def test_a_model_that_is_too_shallow_has_no_middle() -> None:
    losses = _losses(np.zeros(3))
    assert late_layers(*losses).value is None
    assert middle_permutable(*losses).value is None


# --- depth scores and means


def test_depth_scores_grow_with_difficulty_where_they_do() -> None:
    generator = np.random.default_rng(0)
    difficulty = np.repeat([1, 2, 4], 20)
    effects = generator.uniform(0, 0.1, (60, 8))
    effects[np.arange(60), difficulty + 1] += 1.0
    row = score_by_difficulty(effects, difficulty)
    assert row.verdict == "seen"
    assert row.value == pytest.approx(0.75, abs=0.1)  # diluted by what other layers have
    shuffled = score_by_difficulty(effects, generator.permutation(difficulty))
    assert shuffled.verdict == "unclear"
    alike = score_by_difficulty(effects, np.full(60, -1))
    assert alike.value is None
    assert "difficult" in alike.why


def test_numbers_without_a_side_have_no_verdict() -> None:
    effects = np.random.default_rng(0).uniform(0.5, 1.0, (20, 8))
    score = depth_score_signature(effects)
    assert score.verdict == "-"
    assert score.low is not None
    assert score.high is not None
    assert score.low < 3.5 < score.high
    overlap = mean_of("overlap", np.full(10, 30.0), np.full(10, 40.0))
    assert (overlap.value, overlap.low, overlap.high) == (0.75, 0.75, 0.75)


# --- few prompts


def test_one_prompt_has_numbers_but_no_interval_and_no_verdict() -> None:
    losses = _losses(np.array([0.8, 0.8, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5]), prompts=1)
    for row in (late_layers(*losses), middle_permutable(losses[0][:, :7], *losses[1:])):
        assert row.value is not None
        assert (row.low, row.high, row.verdict) == (None, None, "unclear")
    repeated = period_test(_sizes(24, 4, 0)[None], 4)
    assert repeated.p is not None
    assert repeated.p < 0.05
    assert (repeated.low, repeated.high, repeated.verdict) == (None, None, "unclear")
    overlap = mean_of("overlap", np.array([3.0]), np.array([4.0]))
    assert (overlap.value, overlap.low, overlap.verdict) == (0.75, None, "-")


def test_one_prompt_of_a_difficulty_shows_no_growth_with_it() -> None:
    effects = np.ones((10, 8))
    effects[np.arange(10), [1, 1, 1, 1, 1, 5, 5, 5, 5, 7]] += 1.0
    levels = np.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert score_by_difficulty(effects, levels).verdict == "unclear"
    assert score_by_difficulty(effects[:9], levels[:9]).verdict == "seen"
    few = score_by_difficulty(effects[:8], levels[:8])
    assert (few.verdict, few.why) == ("unclear", "8 prompts are too few for a verdict")


@pytest.mark.parametrize("prompts", [2, 5, 8])
def test_few_prompts_give_no_verdict_where_there_is_nothing_to_see(prompts: int) -> None:
    """Without the rule 27 of 60 with two prompts, 12 with five; 9 with eight."""
    judged = 0
    for seed in range(60):
        loss_PI = np.random.default_rng(seed).normal(size=(prompts, 8))
        row = late_layers(loss_PI, np.zeros(prompts), np.ones(prompts))
        judged += row.verdict != "unclear"
        assert ("too few" in row.why) == (prompts < 8)
        assert row.low is not None  # the interval is shown
    assert judged <= 9


def test_a_resampling_keeps_prompts_to_choose_on_and_to_measure_on() -> None:
    """All gain the same, so every resampling of ten prompts does; one without a half would gain less."""
    targets = np.full(10, 10.0)
    row = repeat_gain(np.full((10, 3), 18.0), np.full(10, 20.0), targets)
    assert (row.value, row.low, row.high) == pytest.approx((0.2, 0.2, 0.2))
    assert row.verdict == "seen"
