"""The report's arithmetic, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megaloop.errors import MegaloopError
from megaloop.evaluation.tasks import TASKS
from megaloop.report.page import make_report
from megaloop.report.read import read_run
from megaloop.report.savings import choose_baseline, differences, flops_to_reach, group_runs, savings
from tests.report.rundirs import evaluated, write_run


def _falling(step: int) -> float:
    """5.0 at the start, 0.03 less with each step."""
    return 5.0 - 0.03 * step


def _faster(step: int) -> float:
    return 5.0 - 0.04 * step


def _raised(seed: int, factor: float) -> Callable[[int], float]:
    return lambda step: factor * (_falling(step) + seed / 10)


def test_savings_of_a_run_that_falls_faster(tmp_path: Path) -> None:
    """The baseline ends at 2.0; 0.04 a step gets there after 75 steps, halfway between two validations."""
    base = write_run(tmp_path / "b", "baseline", loss=_falling)
    fast = write_run(tmp_path / "f", "fast", loss=_faster, grown_at=50, growth={"start": 4, "end": 0.5})
    groups = group_runs([read_run(base), read_run(fast)])
    rows = savings(groups, choose_baseline(groups, None))
    assert rows[1].fraction == pytest.approx(0.75)  # half of the steps at half the price
    assert rows[1].reached.mean == pytest.approx(0.5e12 * 50 + 1e12 * 25)
    assert rows[1].reached_fraction == pytest.approx(0.5)
    assert rows[1].difference.mean == pytest.approx(100 * (1.0 / 2.0 - 1))
    assert rows[1].loss.deviation is None  # one seed has no spread
    assert rows[0].reached_fraction == 1.0
    assert rows[1].rank_hours == pytest.approx(100 * 0.5 * 2 / 3600)
    assert rows[1].tokens.mean == 100 * 1024


def test_a_loss_that_is_never_reached_says_so(tmp_path: Path) -> None:
    base = write_run(tmp_path / "b", "baseline", loss=_faster)
    slow = write_run(tmp_path / "s", "slow", loss=_falling, depth="9")
    report, page = make_report([base, slow])
    assert report.savings[1]["flops_to_baseline_loss"] is None
    assert "it did not reach the loss of baseline" in report.summary[0]
    assert "not reached" in page


def test_flops_to_reach_skips_what_is_not_finite(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "r", loss=lambda step: math.nan if step == 50 else _falling(step))
    assert flops_to_reach(read_run(run), _falling(55)) == pytest.approx(55e12)
    assert flops_to_reach(read_run(run), 0.0) is None


def test_seeds_make_a_group_with_a_spread(tmp_path: Path) -> None:
    """Losses 2.0, 2.1 and 2.2: mean 2.1, standard deviation 0.1; differences are of the same seeds."""
    runs = []
    for seed in range(3):
        base = write_run(tmp_path / f"b{seed}", f"baseline-seed{seed}", seed=seed, loss=_raised(seed, 1.0))
        other = write_run(tmp_path / f"o{seed}", f"other-seed{seed}", seed=seed, depth="9", loss=_raised(seed, 1.1))
        runs += [read_run(base), read_run(other)]
    groups = group_runs(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("baseline", 3), ("other", 3)]
    rows = savings(groups, groups[0])
    assert rows[0].loss.mean == pytest.approx(2.1)
    assert rows[0].loss.deviation == pytest.approx(0.1)
    assert rows[1].difference.mean == pytest.approx(10)
    assert rows[1].difference.deviation == pytest.approx(0, abs=1e-9)
    assert differences(groups) == [("depth", ["8", "9"])]


def test_fine_tuned_seeds_are_of_the_pretrained_seeds(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"{name}{seed}", f"{name}-seed{seed}", seed=seed, init=f"runs/{name}-seed{seed}/checkpoints"
        )
        for name in ("baseline", "lidas")
        for seed in range(3)
    ]
    groups = group_runs([read_run(run) for run in runs])
    assert [(group.label, len(group.runs)) for group in groups] == [("baseline", 3), ("lidas", 3)]


def test_configurations_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(depth), "same", depth=str(depth)) for depth in (8, 9)]
    assert [group.label for group in group_runs([read_run(run) for run in runs])] == ["same (1)", "same (2)"]


def test_the_baseline_is_named_or_the_dearest(tmp_path: Path) -> None:
    cheap = read_run(write_run(tmp_path / "c", "cheap", flops=10**11))
    dear = read_run(write_run(tmp_path / "d", "dear", depth="9"))
    groups = group_runs([cheap, dear])
    assert choose_baseline(groups, None).label == "dear"
    assert choose_baseline(groups, "cheap").label == "cheap"
    with pytest.raises(MegaloopError, match="--baseline chea: there is cheap, dear; did you mean cheap"):
        choose_baseline(groups, "chea")


@pytest.mark.parametrize("lead", [0.0125, 0.0175])
def test_primitives_are_of_the_trained_depth_and_their_mean_of_all_tasks(tmp_path: Path, lead: float) -> None:
    """A lead of 2.5 standard errors of the difference is no difference, one of 3.5 is."""
    run, other = write_run(tmp_path / "r", "r"), write_run(tmp_path / "o", "o", depth="9")
    for number, task in enumerate(TASKS):
        evaluated(run, task, 0.3 + number / 100)
        evaluated(run, task, 0.9, loops=2)
        evaluated(other, task, 0.3 + lead + number / 100)
    report, page = make_report([run, other])
    means = {each["group"]: each["accuracy"] for each in report.primitives if each["task"] == "mean"}
    assert means["r"]["value"] == pytest.approx(0.335)
    assert means["r"]["error"] == pytest.approx(0.01 / 8**0.5)
    assert [each["mean_accuracy"]["value"] for each in report.loops if each["group"] == "r"] == pytest.approx(
        [0.335, 0.9]
    )
    clear = lead > 0.015
    assert ("less than three standard errors behind: no difference is shown" in report.summary[-2]) is not clear
    assert page.count("<b>") == int(clear)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is no directory"),
        (lambda path: path.mkdir(), "holds no metrics.jsonl"),
        (lambda path: (write_run(path, "x") / "metrics.jsonl").write_text('{"torn'), "holds no step yet"),
        (lambda path: (write_run(path, "x") / "config.yaml").write_text("[1"), "config.yaml cannot be read"),
        (lambda path: (write_run(path, "x") / "config.yaml").write_text("a: 1"), "is no configuration"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "run")  # type: ignore[operator]
    with pytest.raises(MegaloopError, match=message):
        make_report([tmp_path / "run"])
