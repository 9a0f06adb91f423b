"""Signals end a run in order: real processes, real signals; what follows is the run that was not signalled."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megaloop.errors import CONTINUE
from megaloop.runs.status import local_status
from tests import processes
from tests.distributed import RankPool
from tests.processes import children
from tests.train.runs import configuration, events, losses, release, start, start_held, steps_done, train, wait_for


def _endless(corpus: Path, directory: Path, layout: tuple[int, int, int]) -> dict[str, Any]:
    """More steps than any test waits for."""
    return configuration(
        corpus, directory, layout, train__steps=100_000, checkpoint__every=0, validation__every=0, schedule__cooldown=0
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)], ids=str)
def test_a_signal_ends_the_step_saves_and_asks_to_be_continued(
    corpus: Path, tmp_path: Path, layout: tuple[int, int, int], number: signal.Signals
) -> None:
    process = start(_endless(corpus, tmp_path / "run", layout), tmp_path)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == CONTINUE, output.decode()
    done = len(losses(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert [(event["step"], event["name"]) for event in events(tmp_path / "run", "signal")] == [(done, number.name)]
    assert events(tmp_path / "run", "stop")[0]["reason"] == f"signal {number.name}"
    assert f"{number.name}: saving, then leaving" in output.decode()
    assert (
        f"stopped after step {done}, which is saved; go on with: megaloop train {tmp_path}/run --resume"
        in output.decode()
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_names_the_command_that_goes_on(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    process = start(_endless(corpus, run, (2, 1, 1)), tmp_path, "--stop-at", "50000")
    wait_for(lambda: steps_done(run) >= 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output.decode()
    done = len(losses(run))
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert events(run, "stop")[0]["reason"] == "signal SIGINT"
    assert "Ctrl-C: the run saves after this step, then leaves; once more to leave at once" in output.decode()
    told = f"stopped after step {done}, which is saved; go on with: "
    (line,) = (line for line in output.decode().splitlines() if line.startswith(told))
    found = local_status(run)
    assert (found.state, found.step, found.steps) == ("stopped", done, 100_000)
    assert line.removeprefix(told) == f"{found.go_on} --stop-at 50000"
    (tmp_path / "config.yaml").unlink()  # the run's own is enough
    _, *command = shlex.split(found.go_on or "")
    again = processes.run(*command, "--stop-at", done + 1, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith(f"stopped after step {done + 1}, which is saved; go on with: {found.go_on}\n")
    assert len(losses(run)) == done + 1


@pytest.mark.slow
def test_the_curve_does_not_show_where_a_run_was_signalled(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint__every": 0}
    values = configuration(corpus, tmp_path / "run", (2, 1, 1), **changes)
    process = start_held(values, tmp_path, 3)
    process.send_signal(signal.SIGUSR1)
    release(tmp_path)
    process.communicate(timeout=300)
    assert process.returncode == CONTINUE
    assert 3 <= steps_done(tmp_path / "run") <= 4
    ranks_2.run(train, values, True)
    ranks_2.run(train, configuration(corpus, tmp_path / "straight", (2, 1, 1), **changes))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_signal_to_one_rank_of_several_is_enough(corpus: Path, tmp_path: Path) -> None:
    """As ``torchrun`` and Slurm start them: nobody passes the signal on."""
    values = _endless(corpus, tmp_path / "run", (2, 1, 1))
    process = start(values, tmp_path)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, process)
    os.kill(children(process.pid)[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == CONTINUE, output.decode()


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(corpus: Path, tmp_path: Path) -> None:
    """Rank 0 is stopped, so that rank 1 sits in a collective and no step ends."""
    process = start(_endless(corpus, tmp_path / "run", (2, 1, 1)), tmp_path)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, process)
    os.kill(children(process.pid)[0], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None, "it waits for the step to end"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, output.decode()
    assert not (tmp_path / "run/checkpoints").exists()


_WAITS = """
import ctypes, sys
from megaloop.train.signals import StopSignals
with StopSignals() as signals:
    signals.training = sys.argv[1] == "training"
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(600)  # comes back after a signal
"""


@pytest.mark.parametrize("last", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_second_signal_works_while_the_main_thread_waits(last: signal.Signals) -> None:
    """A sleep that C begins again and again stands for a collective whose other side is gone."""
    with subprocess.Popen(
        [sys.executable, "-c", _WAITS, "training"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        heard = "Ctrl-C: the run saves after this step, then leaves; once more to leave at once\n"
        assert process.stderr.readline() == heard
        process.send_signal(last)
        assert process.wait(10) == 128 + last
        assert process.stderr.read() == f"second signal ({last.name}): leaving without saving\n"


def test_ctrl_c_before_training_leaves_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WAITS, "starting"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (130, "interrupted before the first step: there is nothing to save\n")


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 2)], ids=str)
def test_a_run_under_nohup_outlives_its_terminal(corpus: Path, tmp_path: Path, layout: tuple[int, int, int]) -> None:
    process = start(
        _endless(corpus, tmp_path / "run", layout), tmp_path, ignored=(signal.SIGHUP,)
    )  # all that nohup does
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, process)
    process.send_signal(signal.SIGHUP)
    done = steps_done(tmp_path / "run")
    wait_for(lambda: steps_done(tmp_path / "run") >= done + 5, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == CONTINUE


def test_stop_at_saves_and_ends_and_the_rest_follows(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train__steps": 8, "checkpoint__every": 0, "validation__every": 0}
    values = configuration(corpus, tmp_path / "run", **changes)
    process = start(values, tmp_path, "--stop-at", "5")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    assert len(losses(tmp_path / "run")) == 5
    assert events(tmp_path / "run", "stop")[0]["reason"] == "stop_at"
    told = f"stopped after step 5, which is saved; go on with: megaloop train {tmp_path}/run --resume"
    assert told in output.decode().splitlines(), "with --stop-at 5 it would not go on"
    again = start(values, tmp_path, "--stop-at", "5", "--resume")
    assert again.wait(300) == 0
    assert len(losses(tmp_path / "run")) == 5, "it was there already"
    ranks_1.run(train, values, True)
    ranks_1.run(train, configuration(corpus, tmp_path / "straight", **changes))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_stop_at_beyond_the_run_is_refused(corpus: Path, tmp_path: Path) -> None:
    process = start(configuration(corpus, tmp_path / "run"), tmp_path, "--stop-at", "21")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "--stop-at 21: expected a step from 1 to train.steps, 20" in output.decode()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)], ids=str)
def test_a_dead_rank_is_started_again_and_the_run_resumes(
    request: pytest.FixtureRequest, corpus: Path, tmp_path: Path, layout: tuple[int, int, int]
) -> None:
    changes: dict[str, Any] = {"checkpoint__every": 3}
    values = configuration(corpus, tmp_path / "run", layout, **changes)
    process = start_held(values, tmp_path, 5, "--max-restarts", "1")
    release(tmp_path)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    assert "starting the ranks again, restart 1 of 1" in output.decode()
    assert [event["restarts"] for event in events(tmp_path / "run", "start")] == [0, 1]
    pool: RankPool = request.getfixturevalue(f"ranks_{layout[0]}")
    pool.run(train, configuration(corpus, tmp_path / "straight", layout, **changes))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_more_deaths_than_restarts_end_the_run(corpus: Path, tmp_path: Path) -> None:
    process = start(_endless(corpus, tmp_path / "run", (2, 1, 1)), tmp_path)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, process)
    first, second = children(process.pid)
    os.kill(first, signal.SIGSTOP)  # it cannot end by itself: nobody waits for it
    os.kill(second, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "rank 1 died with SIGKILL" in output.decode()


def test_a_run_that_died_after_its_last_checkpoint_is_not_started_in_vain(
    ranks_1: RankPool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = configuration(corpus, tmp_path / "run", train__steps=4)
    ranks_1.run(train, values)
    monkeypatch.setenv("MEGALOOP_RESTARTS", "1")  # as the launcher and Slurm say it
    again = start(values, tmp_path, "--resume")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output.decode()
    monkeypatch.delenv("MEGALOOP_RESTARTS")
    asked_for = start(values, tmp_path, "--resume")
    output, _ = asked_for.communicate(timeout=300)
    assert asked_for.returncode == 2
    assert "nothing is left to train" in output.decode()
