"""What real ranks do to their run's directory: nothing where they are refused, and they notice when it goes away."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

import megaloop.train.loop as loop
from megaloop.cli.main import app
from megaloop.cli.train import configuration_of
from megaloop.config import Config, load_config
from megaloop.errors import MegaloopError
from megaloop.parallel.engine import TrainingEngine
from megaloop.train.faults import Faults, RollBack
from megaloop.train.report import RunReporter
from tests.distributed import RankPool
from tests.runs.test_directory import contents
from tests.train.runs import configuration, events, metrics, train


def refused(
    values: dict[str, Any], *, resume: bool = True, stop_at: int | None = None, broken: bool = False, missing: str = ""
) -> str:
    """Run on this rank; returns the error. ``broken``: the engine cannot be built; ``missing``: a module that is not installed."""

    def build(*_: Any) -> TrainingEngine:
        raise MegaloopError("no room for the engine")

    installed = sys.modules.get(missing)
    if missing:
        sys.modules[missing] = None  # type: ignore[assignment]
    if broken:
        loop.TrainingEngine = build  # type: ignore[attr-defined, assignment]
    try:
        loop.run(Config.model_validate(values), resume=resume, stop_at=stop_at)
    except MegaloopError as error:
        return str(error)
    finally:
        if installed is not None:
            sys.modules[missing] = installed
        loop.TrainingEngine = TrainingEngine  # type: ignore[attr-defined]
    raise AssertionError("it was not refused")


def test_a_refused_start_leaves_the_directory_as_it_was(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    layout = (1, 1, 2)
    ranks_2.run(train, configuration(corpus, run, layout, train__steps=4, checkpoint__every=2))
    newest = run / "checkpoints/step-00000004/model/rank-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])  # damaged: only a start that is accepted quarantines it
    before = contents(run)
    longer = {"train__steps": 6, "checkpoint__keep": 4}
    for changes, options, message in (
        ({}, {"resume": False}, "already holds a run at step 4"),
        (longer | {"train__steps": 2}, {}, "nothing is left to train"),
        (longer | {"depth": "2"}, {}, "depth 2"),
        (longer | {"data__sequence_length": 64}, {}, "longer than the 32 tokens"),
        (longer, {"stop_at": 7}, "--stop-at 7"),
        (longer | {"logging__tensorboard": True}, {"missing": "torch.utils.tensorboard"}, "package is not installed"),
        (longer, {"broken": True}, "no room for the engine"),
    ):
        values = configuration(corpus, run, layout, **changes)
        errors = ranks_2.run(refused, values, **options)
        assert errors[0] == errors[1]
        assert message in errors[0]
        assert contents(run) == before, message
    fresh = configuration(corpus, tmp_path / "fresh", layout)
    ranks_2.run(refused, fresh, broken=True)
    assert not (tmp_path / "fresh").exists()
    ranks_2.run(train, configuration(corpus, run, layout, **longer), True)
    assert [(event["step_before"], event["step"]) for event in events(run, "rollback")] == [(4, 2)]
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert load_config(run / "config.yaml").train.steps == 6
    assert load_config(run / "config-1.yaml").train.steps == 4


def _delete(run: Path) -> None:
    shutil.rmtree(run)


def _move(run: Path) -> None:
    run.rename(run.with_name("moved"))


def _replace(run: Path) -> None:
    run.rename(run.with_name(f"replaced-{run.name}"))
    run.mkdir()
    (run / "run.lock").write_text("another run's")


def _delete_metrics(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


def train_losing(values: dict[str, Any], lose: Callable[[Path], None], rolls_back: bool = False) -> tuple[str, int]:
    """Run on this rank; after step 3, rank 0 does something to the directory. Returns the error, and the steps done.

    Args:
        rolls_back: the numbers of step 3 are such that the run goes back.
    """
    plainly, judged = RunReporter.stepped, Faults.stepped
    done = 0

    def stepped(reporter: Any, at: Any, *arguments: Any) -> None:
        nonlocal done
        done = at.step
        plainly(reporter, at, *arguments)
        if at.step == 3 and dist.get_rank() == 0:
            lose(Path(values["run_dir"]))

    def judge(faults: Faults, at: Any, result: Any) -> Any:
        return RollBack(3, "a spike", (8, 12)) if rolls_back and at.step == 3 else judged(faults, at, result)

    RunReporter.stepped = stepped  # type: ignore[method-assign, assignment]
    Faults.stepped = judge  # type: ignore[method-assign, assignment]
    try:
        return refused(values, resume=False), done
    finally:
        RunReporter.stepped = plainly  # type: ignore[method-assign]
        Faults.stepped = judged  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_directory_that_goes_away_ends_the_run(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    for every, lose, rolls_back in (
        (0, _delete, False),
        (3, _delete, False),
        (1, _move, False),
        (3, _replace, False),
        (0, _replace, True),
        (2, _delete_metrics, False),
    ):
        run = tmp_path / f"run-{every}{lose.__name__}"
        values = configuration(corpus, run, (1, 1, 2), checkpoint__every=every, faults={"spike_rollback": True})
        results = ranks_2.run(train_losing, values, lose, rolls_back)
        assert results[0] == results[1]
        error, done = results[0]
        assert done == 3
        assert f"run directory {run}: deleted, moved or replaced while the run trained (noticed after step 3)" in error
        if lose is _replace:
            assert contents(run) == {"run.lock": b"another run's"}
        elif lose is not _delete_metrics:
            assert not run.exists(), "nothing is made anew"
    assert (tmp_path / "moved/checkpoints/step-00000001/manifest.json").is_file()


def test_a_run_directory_is_a_configuration_wherever_it_is(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    ranks_1.run(train, configuration(corpus, tmp_path / "run", train__steps=2, schedule__warmup_steps=1))
    assert configuration_of(tmp_path / "run", ["train.steps=4"]).directory == tmp_path / "run"
    moved = (tmp_path / "run").rename(tmp_path / "mo[b]ved")
    found = configuration_of(moved, ["train.steps=4"])
    assert (found.directory, found.train.steps) == (moved, 4)
    assert configuration_of(moved, [f"run_dir={tmp_path}/other"]).directory == tmp_path / "other"
    shown = CliRunner().invoke(app, ["status", str(moved)])
    assert shown.exit_code == 0
    first, second, *_ = shown.stdout.splitlines()
    assert first.startswith(f"{moved}: finished, step 2 of 2, loss ")
    assert second == "last checkpoint step-00000002, restarts 0"
    (moved / "config.yaml").unlink()
    for command in (["train", str(moved)], ["train", str(tmp_path)]):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, MegaloopError)
        assert "without config.yaml, so no run has begun in it" in str(result.exception)
