"""The report's arithmetic, by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaloop.cli.report import print_report
from megaloop.errors import MegaloopError
from megaloop.evaluation.tasks import TASKS
from megaloop.report.page import make_report
from megaloop.report.read import read_run
from megaloop.report.savings import choose_baseline, differences, flops_to_reach, group_runs, savings
from tests.report.rundirs import evaluated, write_run, written_by_tokenizer


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


def test_configurations_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / str(depth) / f"same-seed{seed}", f"same-seed{seed}", depth=str(depth), seed=seed, grown_at=50
        )
        for depth in (8, 9)
        for seed in range(2)
    ]
    assert [group.label for group in group_runs([read_run(run) for run in runs])] == ["same (8/same)", "same (9/same)"]
    report, page = make_report(runs, baseline="same (9/same)")
    assert [item["label"] for item in report.runs] == [
        f"same-seed{s} ({d}/same-seed{s})" for d in (8, 9) for s in range(2)
    ]
    assert page.count("<td>same-seed0 (8/same-seed0)</td>") == 1  # in the list of changes of depth
    assert report.baseline == "same (9/same)"


def test_nats_of_other_data_or_tokenizers_are_not_compared(tmp_path: Path) -> None:
    """The second run has fewer tokens a byte, so more nats per token at the same bits per byte."""

    def runs(folder: Path, **changes: Any) -> list[Path]:
        base = write_run(folder / "b", "baseline", loss=_falling)
        return [base, write_run(folder / "o", "other", loss=lambda step: 3 * _faster(step), bits=1 / 6, **changes)]

    report, page = make_report(
        runs(tmp_path / "data", data={"sources": [{"path": "data/code"}], "sequence_length": 128})
    )
    assert report.compared_by == "bits per byte"
    assert report.savings[1]["difference_percent"] == pytest.approx(100 * (1.0 / 2.0 - 1))
    assert report.savings[1]["fraction_to_baseline_loss"] == pytest.approx(0.75)
    assert "compared in bits per byte of text" in report.summary[0]
    assert "ended with bits per byte of validation text 50.00% lower (0.5000)" in report.summary[1]
    assert "loss, bits per byte" in page
    paths = runs(tmp_path / "tokenizer")
    for path, sha in zip(paths, "ab", strict=True):
        written_by_tokenizer(path, sha * 64)
    assert make_report(paths)[0].compared_by == "bits per byte"
    same = {"sources": [{"path": "data/text", "weight": 2.0}], "sequence_length": 128}  # another mixture, the same text
    report, page = make_report(runs(tmp_path / "same", data=same))
    assert report.compared_by == "nats per token"
    assert report.savings[1]["difference_percent"] == pytest.approx(100 * (3.0 / 2.0 - 1))
    assert "loss, nats per token" in page


def test_runs_of_one_configuration_but_other_tokenizers_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    runs = [
        written_by_tokenizer(write_run(tmp_path / str(number), "run", seed=number), sha * 64)
        for number, sha in enumerate("aba")
    ]
    groups = group_runs([read_run(run) for run in [*runs[:2], write_run(tmp_path / "new", "run", seed=4)]])
    assert [len(group.runs) for group in groups] == [2, 1]


def test_a_path_that_holds_other_data_than_it_did_is_other_data(tmp_path: Path) -> None:
    """And the same data is the same wherever it lies."""

    def compared(folder: Path, validation: str, path: str) -> str:
        other = {"sources": [{"path": path}], "sequence_length": 128}
        runs = [
            written_by_tokenizer(write_run(folder / "b", "baseline"), "a" * 64, "b" * 64),
            written_by_tokenizer(write_run(folder / "o", "other", depth="4", data=other), "a" * 64, validation),
        ]
        return make_report(runs)[0].compared_by

    assert compared(tmp_path / "again", "c" * 64, "data/text") == "bits per byte"  # prepared again with its tokenizer
    assert compared(tmp_path / "moved", "b" * 64, "moved/text") == "nats per token"
    seeds = [
        written_by_tokenizer(write_run(tmp_path / str(number), "run", seed=number), "a" * 64, validation * 64)
        for number, validation in enumerate("bcb")
    ]
    assert [len(group.runs) for group in group_runs([read_run(run) for run in seeds])] == [2, 1]


@pytest.mark.parametrize(
    ("events", "restarts"),
    [
        ("start stop:stop_at resume start", 0),
        ("start stop:finished resume start stop:finished", 0),  # more steps were asked for
        ("start signal stop:signal_SIGTERM resume start", 0),
        ("start rollback stop:rollback resume start stop:finished", 0),  # the same processes
        ("start resume start", 1),  # killed
        ("start stop:error:_disk resume start stop:stop_at resume start", 1),
        ("start resume start resume stop:error resume start", 2),
        ("resume stop:error start", 0),  # the first start was refused
    ],
)
def test_restarts_are_those_that_nobody_wanted(tmp_path: Path, events: str, restarts: int) -> None:
    run = write_run(tmp_path / "run", "run", steps=30)
    with (run / "events.jsonl").open("w", encoding="utf-8") as file:
        for event in events.split():
            kind, _, reason = event.partition(":")
            file.write(
                json.dumps({"event": kind, "step": 1, "reason": reason.replace("_", " ")}).replace("stop at", "stop_at")
                + "\n"
            )
    assert read_run(run).restarts == restarts


def test_a_run_without_a_finite_loss_has_a_page(tmp_path: Path) -> None:
    """Alone, and beside one that has losses; it does not seem to have ended with an earlier loss."""
    lost = write_run(tmp_path / "lost", "lost", loss=lambda step: math.nan)
    diverged = write_run(
        tmp_path / "div", "diverged", depth="9", loss=lambda step: _falling(step) if step < 60 else math.inf
    )
    base = write_run(tmp_path / "b", "baseline", depth="10", loss=_falling)
    for paths in ([lost], [lost, base], [diverged, base], [lost, diverged]):
        report, page = make_report(paths)
        assert json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))
        assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S).lower().replace("nanosecond", "")
        assert report.savings[0]["val_loss"] is None
        assert "did not reach" not in " ".join(report.summary)


@pytest.mark.slow
def test_what_was_tampered_with_in_a_run_is_passed_over(tmp_path: Path) -> None:
    """Any value of any line may have become any other: a page is made, or the error is one line."""
    whole = write_run(tmp_path / "whole", "whole", grown_at=10, growth={"start": 4, "end": 0.4}, steps=30)
    evaluated(whole, "p-hop", 0.3)
    evaluated(whole, "validation", 2.0, loops=2)
    files = {
        name: (whole / name).read_text().splitlines() for name in ("metrics.jsonl", "events.jsonl", "evaluation.jsonl")
    }
    chance = random.Random(0)
    run = shutil.copytree(whole, tmp_path / "run")
    for wrong in (
        None,
        "[/red]",
        -1,
        "NaN",
        10**29,
        10**400,
        [[1]],
        {"order": [[1], {}]},
        {"order": [1] * 9},
    ):
        for name, lines in files.items():
            changed = []
            for line in map(json.loads, lines):
                line |= dict.fromkeys(chance.sample(sorted(line), 2), math.nan if wrong == "NaN" else wrong)
                changed.append(json.dumps(line))
            (run / name).write_text("{}\n[]\n{\n" + "\n".join(changed) + "\n")
        with contextlib.suppress(MegaloopError):  # no step is left
            report, _ = make_report([run])
            json.dumps(dataclasses.asdict(report), allow_nan=False)
            print_report(report, None, as_json=False)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "[/red]$x^$\x1b[31m" * 50},
        {"name": ["a"], "seed": {"a": [1]}},
        {"seed": "x" * 10**5, "model": 3, "data": {"sources": [1, {"path": [2]}]}},
        {"data": {"sources": 5}, "depth": None, "init": "[bold]"},
        {"model": {"hidden_size": 10**25, "num_heads": 1, "num_kv_heads": 1, "ffn_size": 10**25}},
        {"train": {"steps": 10**29}, 5: {None: 1}},
    ],
)
def test_a_configuration_that_was_tampered_with_has_a_page(
    tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = write_run(tmp_path / "run", "run", steps=30), write_run(tmp_path / "other", "other", steps=30)
    config = yaml.safe_load((run / "config.yaml").read_text()) | change
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    report, _ = make_report([run, other])
    print_report(report, None, as_json=False)
    assert "\x1b" not in capsys.readouterr().out
    assert len(json.dumps(dataclasses.asdict(report), allow_nan=False)) < 20_000


_BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "", "[1", "a: 1", "train: {steps: 0}", "train: {steps: true}", "train: {steps: [1]}", f"train: {{steps: {10**40}}}",
        f"train: {{steps: {'9' * 5000}}}", "train: {steps: 5}\nname: 2024-13-45", "train: {steps: !!int abc}", "a: !!bool abc",
        "a: !!timestamp abc", "[" * 3000, _BOMB + "train: {steps: 5}", "train: {steps: 5, a: &a [*a]}", "a: !!python/name:os.system",
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", "run", steps=30)
    (run / "config.yaml").write_text(text)
    with pytest.raises(MegaloopError, match=r"config\.yaml (cannot be read|is no configuration)") as caught:
        make_report([run])
    assert len(str(caught.value)) < 500


def test_the_baseline_is_named_or_the_dearest(tmp_path: Path) -> None:
    cheap = read_run(write_run(tmp_path / "c", "cheap", flops=10**11))
    dear = read_run(write_run(tmp_path / "d", "dear", depth="9"))
    groups = group_runs([cheap, dear])
    assert choose_baseline(groups, None).label == "dear"
    assert choose_baseline(groups, "cheap").label == "cheap"
    with pytest.raises(MegaloopError, match="--baseline chea: there is cheap, dear; did you mean cheap"):
        choose_baseline(groups, "chea")
    with pytest.raises(MegaloopError, match="--baseline zzz: there is cheap, dear; choose one of these"):
        choose_baseline(groups, "zzz")


@pytest.mark.parametrize("lead", [0.0125, 0.0175])
def test_primitives_are_of_the_trained_depth_and_their_mean_of_all_tasks(tmp_path: Path, lead: float) -> None:
    """A lead of 2.5 standard errors of the difference is no difference, one of 3.5 is."""
    run, other = write_run(tmp_path / "r", "r"), write_run(tmp_path / "o", "o", depth="9")
    for number, task in enumerate(TASKS):
        evaluated(run, task, 0.3 + number / 100)
        evaluated(run, task, 0.9, loops=2)
        evaluated(other, task, 0.3 + lead * (8 / len(TASKS)) ** 0.5 + number / 100)
    report, page = make_report([run, other])
    means = {
        primitive["group"]: primitive["accuracy"] for primitive in report.primitives if primitive["task"] == "mean"
    }
    mean = 0.3 + (len(TASKS) - 1) / 200
    assert means["r"]["value"] == pytest.approx(mean)
    assert means["r"]["error"] == pytest.approx(0.01 / len(TASKS) ** 0.5)
    assert [loop["mean_accuracy"]["value"] for loop in report.loops if loop["group"] == "r"] == pytest.approx(
        [mean, 0.9]
    )
    clear = lead > 0.015
    assert ("less than three standard errors behind: no difference is shown" in report.summary[-2]) is not clear
    assert page.count("<b>") == int(clear)


def test_a_copy_of_a_run_is_no_other_seed(tmp_path: Path) -> None:
    """Its interval would be that of more seeds than there are."""
    runs = [write_run(tmp_path / "a" / f"r-seed{seed}", f"r-seed{seed}", seed=seed) for seed in (0, 1)]
    copy = tmp_path / "b" / "r-seed0"
    shutil.copytree(runs[0], copy)
    groups = group_runs([read_run(run) for run in (*runs, copy)])
    assert [(group.label, len(group.runs)) for group in groups] == [("r (a/r)", 2), ("r (b/r)", 1)]


def test_a_lead_of_which_no_error_is_known_is_not_set_in_bold_face(tmp_path: Path) -> None:
    """A single question of each has none."""
    run, other = write_run(tmp_path / "r", "r"), write_run(tmp_path / "o", "o", depth="9")
    evaluated(run, "copy-real", 0.0, error=math.nan)
    evaluated(other, "copy-real", 1.0, error=math.nan)
    report, page = make_report([run, other])
    assert "no difference is shown" in report.summary[-2]
    assert "<b>" not in page


def test_chance_is_each_tasks_own_and_versions_are_not_mixed(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "r", "r"), write_run(tmp_path / "o", "o", depth="9")
    for task in ("copy-real", "p-hop"):
        evaluated(run, task, 0.4)
        evaluated(other, task, 0.5, version=2)
        evaluated(other, task, 0.3)
    evaluated(run, "copy-words", 0.9, version=2)
    report, page = make_report([run, other])
    found = {(item["group"], item["task"]): item for item in report.primitives}
    assert {task: found["r", task]["chance"] for task in ("copy-real", "p-hop", "mean")} == pytest.approx(
        {"copy-real": 0.1, "p-hop": 0.2, "mean": 0.15}
    )
    assert found["o", "copy-real"]["accuracy"]["value"] == 0.3
    assert "copy-words" not in page
    assert "Primitives of earlier versions than 3 are left out" in page


def test_runs_that_only_an_earlier_version_evaluated_are_shown_as_they_were(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "r")
    for task in ("copy-words", "p-hop"):
        evaluated(run, task, 0.4, version=2)
    report, page = make_report([run])
    assert [(item["task"], item["chance"]) for item in report.primitives] == [
        ("p-hop", 0.2),
        ("copy-words", 0.2),
        ("mean", 0.2),
    ]
    assert "are left out" not in page


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
