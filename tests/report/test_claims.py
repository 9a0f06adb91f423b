"""Claims and their verdicts, by hand; and that a loop is chosen on other seeds than it is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megaloop.report.claims import MARGIN, Claim, chosen_on_others, claims, verdict
from megaloop.report.difficulty import Loop, boards
from megaloop.report.read import read_run
from megaloop.report.reasoning import reasoning
from megaloop.report.savings import group_runs
from megaloop.report.statistics import Interval, holm, p_value
from tests.report.rundirs import HOPS, graded, write_run

ON_HOPS = {"sources": [{"path": HOPS}], "sequence_length": 64}


def _run(folder: Path, name: str, seed: int, accuracy: float, depth: str = "8", **options: Any) -> Path:
    """A run that ends with this accuracy at its hardest trained difficulty, 8."""
    run = write_run(
        folder / f"{name}-seed{seed}", f"{name}-seed{seed}", seed=seed, steps=20, depth=depth, data=ON_HOPS, **options
    )
    graded(run, 1, 0.99, step=20)
    graded(run, 8, accuracy, step=20)
    return run


def _claims(*runs: Path) -> list[Claim]:
    (board,) = boards(group_runs([read_run(run) for run in runs]))
    return claims(board)


# --- verdicts


@pytest.mark.parametrize(
    ("low", "mean", "high", "bound", "adjusted", "expected"),
    [
        (0.01, 0.03, 0.05, 0.0, 0.04, "seen"),
        (0.01, 0.03, 0.05, 0.0, 0.06, "unclear"),  # alone it would be seen; as one of many it is not
        (-0.05, -0.03, -0.01, 0.0, 0.01, "not seen"),
        (-0.005, 0.002, 0.009, 0.0, 0.9, "not seen"),  # no effect that matters
        (-0.005, 0.003, 0.011, 0.0, 0.9, "unclear"),
        (0.002, 0.005, 0.008, 0.0, 0.01, "seen"),  # however small
        (-0.015, 0.0, 0.015, -MARGIN, 0.03, "seen"),
        (-0.015, 0.0, 0.015, -MARGIN, 0.06, "unclear"),
        (-0.03, -0.01, 0.01, -MARGIN, 0.4, "unclear"),
        (-0.05, -0.035, -0.021, -MARGIN, 0.01, "not seen"),
        (-0.05, -0.03, -0.01, -MARGIN, 0.5, "unclear"),  # below zero, and perhaps above -2 points
    ],
)
def test_verdicts(low: float, mean: float, high: float, bound: float, adjusted: float, expected: str) -> None:
    assert verdict(Interval(mean, low, high, 5), bound, adjusted) == expected


def test_one_seed_is_unclear() -> None:
    assert verdict(Interval(0.5, None, None, 1), 0.0, None) == "unclear (one seed)"


# --- pairs


def test_effects_are_paired_by_seed_and_p_adjusted_over_all_claims(tmp_path: Path) -> None:
    """Seeds differ by far more than contenders do; a third seed of one contender alone has no partner."""
    base = {0: 0.60, 1: 0.75, 2: 0.90}
    looped = {seed: value + gain for (seed, value), gain in zip(base.items(), (0.05, 0.06, 0.055), strict=True)}
    runs = [_run(tmp_path, "baseline", seed, value) for seed, value in base.items()]
    runs += [_run(tmp_path, "looped-full", seed, value, "0-2x4-0") for seed, value in looped.items()]
    runs += [_run(tmp_path, "iso-params", seed, value - 0.1, "2") for seed, value in base.items() if seed < 2]
    found = _claims(*runs)
    assert [claim.text.partition(": ")[2] for claim in found] == [
        "looped-full against iso-params",
        "looped-full against iso-params (mean over difficulties)",
        "looped-full against baseline (not more than 2 points below)",
    ]
    effects = [claim.effect for claim in found if claim.effect is not None]
    assert [effect.count for effect in effects] == [2, 2, 3]
    # all have one hop at 99%, so that the mean over both difficulties has half the difference
    assert [effect.mean for effect in effects[:2]] == pytest.approx([0.155, 0.0775])
    expected = [
        stats.ttest_1samp([0.15, 0.16], 0.0).pvalue,
        stats.ttest_1samp([0.075, 0.08], 0.0).pvalue,
        stats.ttest_1samp([0.05, 0.06, 0.055], -0.02).pvalue,
    ]
    assert [claim.p for claim in found] == pytest.approx(expected)
    assert [claim.adjusted for claim in found] == pytest.approx(holm(expected))
    assert [claim.verdict for claim in found] == ["seen", "seen", "seen"]


def test_contenders_without_a_seed_in_common_are_not_compared(tmp_path: Path) -> None:
    (found,) = _claims(_run(tmp_path, "lidas", 0, 0.9), _run(tmp_path, "midas", 1, 0.8, "9"))
    assert found.verdict == "unclear (no seed in common)"
    assert found.effect is None


def test_one_seed_has_an_effect_and_no_verdict(tmp_path: Path) -> None:
    (found,) = _claims(_run(tmp_path, "lidas", 0, 0.9), _run(tmp_path, "midas", 0, 0.8, "9"))
    assert found.verdict == "unclear (one seed)"
    assert found.effect is not None
    assert found.effect.mean == pytest.approx(0.1)
    assert found.p is None


def test_unfinished_runs_decide_nothing(tmp_path: Path) -> None:
    """Nor those that were not evaluated at their last step."""
    runs = [_run(tmp_path, "midas", seed, 0.8, "9") for seed in range(4)]
    runs += [_run(tmp_path, "lidas", seed, 0.9 + seed / 100) for seed in range(2)]
    runs.append(_run(tmp_path, "lidas", 2, 0.1, done=15))
    early = write_run(tmp_path / "lidas-seed3", "lidas-seed3", seed=3, steps=20, data=ON_HOPS)
    graded(early, 1, 0.9, step=10)
    graded(early, 8, 0.2, step=10)
    (found,) = _claims(*runs, early)
    assert found.effect is not None
    assert found.effect.count == 2
    assert found.effect.mean == pytest.approx(0.105)


def test_what_growing_costs_stands_beside_it(tmp_path: Path) -> None:
    runs = [_run(tmp_path, "baseline", 0, 0.9), _run(tmp_path, "lidas", 0, 0.9, growth={"start": 4, "end": 0.5}, grown_at=10)]  # fmt: skip
    (found,) = _claims(*runs)
    assert found.note == "lidas took 0.750 of the FLOPs of baseline"


def test_runs_that_had_other_samples_are_said_to_have(tmp_path: Path) -> None:
    """A larger batch, another data set, or samples that a run left out when it rolled back."""
    pair = [_run(tmp_path, "lidas", 0, 0.9), _run(tmp_path, "midas", 0, 0.8, "9")]
    (found,) = _claims(*pair)
    assert found.note == ""
    with (pair[1] / "events.jsonl").open("a") as events:
        events.write(json.dumps({"event": "rollback", "step": 5}) + "\n")
    (found,) = _claims(*pair)
    assert found.note == "not on quite the same samples: a run that rolled back leaves some out"
    large = _run(tmp_path, "baseline", 0, 0.7, train={"steps": 20, "global_batch": 64})
    (found, _) = _claims(*pair, large)
    assert found.text.startswith("Growing keeps")
    assert found.note == (
        "lidas took 1.000 of the FLOPs of baseline; "
        "not on the same samples in the same order: data or train.global_batch are not the same"
    )


def test_contenders_are_told_by_their_whole_names(tmp_path: Path) -> None:
    assert _claims(_run(tmp_path, "my-lidas", 0, 0.9), _run(tmp_path, "midas", 0, 0.8, "9")) == []


def test_two_runs_of_one_contender_and_seed_are_said_to_leave_its_claims_out(tmp_path: Path) -> None:
    """Which of them is meant cannot be known; where there is nothing to compare it with, nothing is missing either."""
    twins = [_run(tmp_path / folder, "lidas", 0, 0.9) for folder in ("one", "other")]
    pair = [*twins, _run(tmp_path, "baseline", 0, 0.8, "9")]
    (sentence,) = reasoning(group_runs([read_run(run) for run in pair]), []).summary
    assert sentence.startswith(
        "Nothing is claimed about lidas: 2 groups of runs have that name (lidas (one/lidas), lidas (other/lidas))."
    )
    assert _claims(*pair) == []
    assert reasoning(group_runs([read_run(run) for run in twins]), []).summary == []
    assert len(reasoning(group_runs([read_run(run) for run in pair[1:]]), []).summary) == 1  # of the claim that is made
    unfinished = _run(tmp_path / "third", "lidas", 0, 0.9, done=15)
    assert len(_claims(*pair[1:], unfinished)) == 1  # what has no end yet is not meant


# --- loops at inference


def _looped(folder: Path, name: str, gains: list[list[float]], depth: str = "8") -> list[Path]:
    """Runs of one seed each: accuracy 0.5, and so much more with a loop that begins at layer 0, 1, ... and runs once more."""
    runs = []
    for seed, of_seed in enumerate(gains):
        runs.append(_run(folder, name, seed, 0.5, depth))
        for start, gain in enumerate(of_seed):
            block = f"{start}:{start + 2}"
            graded(runs[-1], 8, 0.5 + gain, step=20, loops=2, depth=f"{start}-2x2-{6 - start}", block=block)
    return runs


def test_a_loop_is_chosen_on_the_other_seeds(tmp_path: Path) -> None:
    """Seed 0 alone finds layer 0 best, by far; the others find layer 1, and seed 0 is measured with that."""
    (found,) = _claims(*_looped(tmp_path, "lidas", [[0.20, 0.02], [0.00, 0.04], [-0.05, 0.03]]))
    # for seed 1 the others' means are .075 and .025; for seed 2 they are .10 and .03
    assert found.effect is not None
    assert found.effect.mean == pytest.approx((0.02 + 0.00 - 0.05) / 3)
    assert found.note == (
        "chosen on the other seeds: layers 0 to 1, 1 extra time (2 of 3 seeds); layers 1 to 2, 1 extra time (1 of 3 seeds)"
    )


def test_one_seed_chooses_no_loop(tmp_path: Path) -> None:
    (found,) = _claims(*_looped(tmp_path, "lidas", [[0.20, 0.02]]))
    assert found.effect is None
    assert found.verdict == "unclear (one seed)"


def test_gains_of_two_models_are_compared_seed_by_seed(tmp_path: Path) -> None:
    runs = _looped(tmp_path, "lidas", [[0.0, 0.10], [0.0, 0.12], [0.0, 0.14]])
    runs += _looped(tmp_path, "baseline", [[0.0, 0.01], [0.0, 0.02], [0.0, 0.06]], "9")
    found = [claim for claim in _claims(*runs) if claim.text.startswith("Loops at inference")]
    means = [claim.effect.mean for claim in found if claim.effect is not None]
    assert means == pytest.approx([0.12, 0.03, 0.09])


def test_where_loops_add_nothing_none_is_found() -> None:
    """Of 28 loops that are noise alone, over five seeds, 400 times: choosing on all seeds finds a gain in a third of them."""
    chance = np.random.default_rng(0)
    loops = [Loop(extra, start, start + 2) for extra in range(1, 5) for start in range(7)]
    wrong = {"as claims do": 0, "without correction": 0, "chosen on all seeds": 0}
    means = []
    for _ in range(400):
        noise = chance.normal(size=(5, len(loops)))
        gains = {seed: dict(zip(loops, row, strict=True)) for seed, row in enumerate(noise.tolist())}
        chosen = [gain for _, gain in chosen_on_others(gains).values()]
        means.append(fmean(chosen))
        best = noise[:, noise.mean(axis=0).argmax()].tolist()
        wrong["as claims do"] += _is_found(chosen, left_out=True)
        wrong["without correction"] += _is_found(chosen)
        wrong["chosen on all seeds"] += _is_found(best)
    assert abs(fmean(means)) < 3 * (1 / (5 * 400)) ** 0.5 * 1.5  # unbiased
    assert wrong["as claims do"] < 0.05 * 400 < wrong["without correction"] < wrong["chosen on all seeds"]
    assert wrong["chosen on all seeds"] > 0.25 * 400


def _is_found(values: list[float], *, left_out: bool = False) -> bool:
    p = p_value(values, left_out=left_out)
    return p is not None and p < 0.05 and fmean(values) > 0
