"""Contenders are one configuration in thirteen ways, and the bench that trains them goes on where it was killed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaloop.bench.contenders import (
    CONTENDERS,
    GROWING_AND_LOOPING,
    REASONING,
    check_different,
    contender,
    counted_flops,
    looped_depth,
    looped_full_depth,
    looped_parameters_depth,
    total_flops,
)
from megaloop.cli import savings_data
from megaloop.cli.savings_data import PRESETS as _PRESETS
from megaloop.config import Config, load_config
from megaloop.errors import MegaloopError
from megaloop.runs.directory import is_locked
from tests.cli.test_cli import megaloop
from tests.data.corpus import write_corpus
from tests.processes import start
from tests.train.runs import configuration, hold, metrics, pace, release, steps_done, wait_for

VOCAB = 512


def _base(**changes: Any) -> Config:
    train = {"steps": 200, "global_batch": 4, "micro_batch": 4}
    values = configuration(
        Path("data"), Path("run"), **({"depth": "24", "train": train, "growth": {"start": 4}} | changes)
    )
    return Config.model_validate(values)


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_every_contender_of_the_presets_is_a_run(preset: str) -> None:
    config = load_config(_PRESETS / f"savings_{preset}.yaml")
    made = {name: contender(config, name, VOCAB, seed=1) for name in CONTENDERS}
    costs = {name: total_flops(item, VOCAB) for name, item in made.items()}
    base = costs["baseline"]
    assert costs["lidas"] == costs["midas"] < 0.785 * base
    assert costs["baseline-matched"] == pytest.approx(costs["lidas"], rel=2e-3)
    assert costs["looped"] == costs["looped-full"] == base
    assert costs["iso-params"] < costs["late-stack"] < costs["iso-params-middle"] < costs["lidas"]
    assert costs["looped-params"] > costs["lidas+loop"] > costs["lidas"]
    assert (costs["lns"], costs["lns+lidas"]) == (base, costs["lidas"])
    assert [name for name, item in made.items() if item.model.norm_scaling] == ["lns", "lns+lidas"]
    for name, item in made.items():
        assert item.name == f"{name}-seed1"
        assert item.seed == 1
        # the recipe is one for all
        for section in ("data", "optimizer", "schedule", "parallel", "loop"):
            assert getattr(item, section) == getattr(config, section)
        assert item.model.model_copy(update={"norm_scaling": False}) == config.model


def test_contenders_have_the_depths_that_their_names_say() -> None:
    config = _base()
    depths = {name: contender(config, name, VOCAB).stages[-1].plan for name in CONTENDERS}
    assert {name: (plan.layers, plan.depth) for name, plan in depths.items()} == {
        "baseline": (24, 24),
        "baseline-matched": (24, 24),
        "midas": (24, 24),
        "lidas": (24, 24),
        "late-stack": (24, 24),
        "looped": (12, 24),
        "looped-full": (4, 24),
        "looped-params": (24, 28),
        "iso-params": (4, 4),
        "iso-params-middle": (12, 12),
        "lidas+loop": (24, 28),
        "lns": (24, 24),
        "lns+lidas": (24, 24),
    }
    stages = contender(config, "lidas+loop", VOCAB).stages
    assert stages[-1].first_step == 170  # the loop comes with the cooldown
    assert stages[-2].plan.layers == 24


def test_eight_layers_in_blocks_of_two() -> None:
    """The reasoning contenders, from two layers on."""
    config = _base(depth="8", growth={"start": 2, "block": 2})
    made = {name: contender(config, name, VOCAB) for name in REASONING}
    assert {name: item.stages[-1].plan.notation for name, item in made.items()} == {
        "baseline": "8",
        "baseline-matched": "8",
        "midas": "8",
        "lidas": "8",
        "late-stack": "8",
        "looped": "1-2x3-1",
        "looped-full": "0-2x4-0",
        "iso-params": "2",
        "iso-params-middle": "4",
        "lidas+loop": "3-2x2-3",
    }
    stages = made["lidas"].stages
    assert [(stage.first_step, stage.plan.layers) for stage in stages] == [(0, 2), (17, 4), (51, 6), (102, 8)]
    costs = {name: total_flops(item, VOCAB) for name, item in made.items()}
    assert costs["looped"] == costs["looped-full"] == costs["baseline"]
    assert costs["iso-params"] < costs["iso-params-middle"] < costs["baseline"]


def test_late_stack_grows_once_at_four_fifths_of_the_steps() -> None:
    config = _base(growth={"start": 4, "end": 0.7, "warmup_steps": 5, "moments": "zero"})
    late = contender(config, "late-stack", VOCAB)
    before, after = late.stages
    assert (before.plan.layers, after.plan.layers, after.first_step) == (4, 24, 160)
    # the stack as a whole, six times over; the rest of the growth is that of the others
    assert [after.plan.ancestors(layer)[-1] if layer > 3 else layer for layer in after.plan.order] == [0, 1, 2, 3] * 6
    assert late.growth is not None
    assert (late.growth.warmup_steps, late.growth.moments) == (5, "zero")
    shallow, full = (total_flops(contender(config, name, VOCAB), VOCAB) for name in ("iso-params", "baseline"))
    assert total_flops(late, VOCAB) == pytest.approx(0.8 * shallow + 0.2 * full, rel=1e-12)


def test_what_is_trained_where_nobody_chooses_costs_what_it_did() -> None:
    left_out = {"late-stack", "looped-full", "iso-params", "iso-params-middle"}
    assert set(GROWING_AND_LOOPING) == set(CONTENDERS) - left_out
    assert set(REASONING) < set(CONTENDERS)


def test_loops_have_the_shape_of_the_paper() -> None:
    assert str(looped_depth(24, 4)) == "4-4x4-4"
    assert [str(looped_depth(layers, 4)) for layers in (8, 12, 16, 32)] == ["0-4x2-0", "2-4x2-2", "2-4x3-2", "6-4x5-6"]
    assert str(looped_parameters_depth(24, 4)) == "10-4x2-10"
    assert [str(looped_full_depth(layers, 4)) for layers in (8, 24)] == ["0-4x2-0", "0-4x6-0"]
    with pytest.raises(MegaloopError, match="6 layers hold no block of 4 twice"):
        looped_depth(6, 4)
    for layers in (4, 6):
        with pytest.raises(MegaloopError, match=f"{layers} layers are not two or more whole blocks of 4"):
            looped_full_depth(layers, 4)


@pytest.mark.parametrize("name", ["baseline", "looped", "looped-full", "iso-params", "lidas+loop", "lns"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    ours, theirs = counted_flops(contender(_base(), name, VOCAB), VOCAB)
    assert ours == theirs


def test_one_run_under_two_names_is_refused() -> None:
    """At two blocks of depth all loops are one: a report would count their runs as two seeds."""
    deep, shallow = _base(), _base(depth="8")
    check_different({name: contender(deep, name, VOCAB) for name in CONTENDERS})
    for one, other in (("looped", "looped-full"), ("iso-params", "iso-params-middle")):
        with pytest.raises(MegaloopError, match=rf"{one} and {other} are the same, .*; leave one of them out"):
            check_different({name: contender(shallow, name, VOCAB) for name in ("baseline", one, other)})


def test_what_makes_no_contender_is_refused() -> None:
    with pytest.raises(MegaloopError, match="unknown contender 'baselin'; choose from baseline, baseline-matched"):
        contender(_base(), "baselin", VOCAB)
    with pytest.raises(MegaloopError, match="loops already; give the full-depth model"):
        contender(Config.model_validate({**_base().model_dump(), "depth": "8-4x2-8", "growth": None}), "lidas", VOCAB)
    with pytest.raises(
        MegaloopError, match=r"late-stack repeats all 16 layers .growth.start. at once, which never makes"
    ):
        contender(_base(growth={"start": 16}), "late-stack", VOCAB)
    scaled = _base().model_dump() | {"model": _base().model.model_dump() | {"norm_scaling": True}}
    with pytest.raises(MegaloopError, match="norm_scaling is set, so that all contenders have it"):
        contender(Config.model_validate(scaled), "lns+lidas", VOCAB)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A bench of seconds."""
    corpus = write_corpus(tmp_path, sequence_length=32)
    values = configuration(
        corpus, tmp_path / "unused", depth="4", train={"steps": 30, "global_batch": 4, "micro_batch": 4}
    )
    values |= {"growth": {"start": 2, "block": 2}, "validation": {"every": 5, "samples": 4}}
    values["train"]["precision"] = "fp32"
    values["checkpoint"] = {"every": 5, "keep": 1}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def _arguments(preset: Path, out: Path) -> list[str]:
    return [
        "bench", "savings", "--preset", str(preset), "--out", str(out), "--contenders", "baseline,lidas+loop",
        "--examples", "25", "--shots", "0,1", "--loops", "1,2", "--jobs", "2",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_bench_goes_on_where_it_was(preset: Path, tmp_path: Path) -> None:
    """Terminated while both train, it leaves both saved; started again, it trains the rest alone, and reports."""
    out = tmp_path / "out"
    (tmp_path / "hold-12").touch()
    arguments = [*_arguments(preset, out), "train.steps=150"]
    process = start(*arguments, setup=hold, setup_arguments=(tmp_path,))
    runs = [out / "runs" / name for name in ("baseline-seed0", "lidas+loop-seed0")]
    wait_for(lambda: all(steps_done(run) == 11 for run in runs), process)
    process.send_signal(signal.SIGTERM)
    release(tmp_path)
    process.communicate(timeout=300)
    assert process.returncode == 130
    saved = [len(metrics(run)) for run in runs]
    assert all(11 <= count < 150 for count in saved)

    other = megaloop(*arguments, "optimizer.lr=0.5")
    assert other.returncode == 2
    assert "holds contenders of another configuration (optimizer.lr was 0.003, is 0.5)" in other.stderr

    limited = start(*arguments, "--minutes", "0.1", setup=pace, setup_arguments=(0.1,))
    output, _ = limited.communicate(timeout=300)
    assert limited.returncode == 75, output.decode()
    assert "2 of 2 runs are left: the same command goes on" in output.decode()

    done = megaloop(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    for run, count in zip(runs, saved, strict=True):
        records = metrics(run)
        assert [record["step"] for record in records] == list(range(1, 151))
        starts = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        assert max(item["step"] for item in starts if item["event"] == "start") >= count
    report = json.loads(done.stdout)
    assert [row["group"] for row in report["savings"]] == ["baseline", "lidas+loop"]
    assert 0.6 < report["savings"][1]["fraction_of_baseline"] < 1
    assert {item["loops"] for item in report["loops"]} == {1, 2}
    assert len([item for item in report["primitives"] if item["task"] == "mean"]) == 2
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_no_run_outlives_a_bench_that_is_killed_outright(preset: Path, tmp_path: Path) -> None:
    """It would go on by itself, and the bench that is started again would find its directory in use, or nothing left to train."""
    out = tmp_path / "out"
    (tmp_path / "hold-8").touch()
    arguments = [
        "bench", "savings", "--preset", str(preset), "--out", str(out), "--contenders", "baseline",
        "--examples", "5", "--shots", "0", "--loops", "1", "--jobs", "1",
    ]  # fmt: skip
    process = start(*arguments, setup=hold, setup_arguments=(tmp_path,))
    run = out / "runs" / "baseline-seed0"
    wait_for(lambda: steps_done(run) == 7, process)
    process.kill()
    process.wait(30)
    deadline = time.monotonic() + 30
    while is_locked(run):
        assert time.monotonic() < deadline, "the run goes on without its bench"
        time.sleep(0.02)
    release(tmp_path)
    done = megaloop(*arguments)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in metrics(run)] == list(range(1, 31))


def test_bad_input_is_one_line(preset: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--preset", tmp_path / "none.yaml"), "no such file"),
        (("--preset", preset, "--contenders", "best"), "unknown contender 'best'"),
        (("--preset", preset, "--text", preset), "--text is for the presets"),
        (("--preset", preset, "--loops", "0"), "--loops 0: expected whole numbers from 1 on"),
    ):
        result = megaloop("bench", "savings", *arguments, "--out", tmp_path / "out")
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_bench_does_not_go_on_with_other_text_than_it_was_made_of(tmp_path: Path) -> None:
    config = savings_data.configuration("cpu", tmp_path, None, None)
    for name in ("text", "math"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.json").write_text("{}")
    savings_data.prepare_data("cpu", config, tmp_path, [])  # of an earlier version, which did not say what its text was
    (tmp_path / "text_of.json").write_text(json.dumps([str(tmp_path / "mine.txt")]))
    savings_data.prepare_data("cpu", config, tmp_path, [tmp_path / "mine.txt"])
    for other in ([], [tmp_path / "other.txt"]):
        with pytest.raises(MegaloopError, match=r"was made of .*mine\.txt, and not of .*; name the same --text"):
            savings_data.prepare_data("cpu", config, tmp_path, other)
