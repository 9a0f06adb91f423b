"""A run that hangs ends by itself, says where it hung, and goes on after a restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megaloop.parallel.engine import StepResult, TrainingEngine
from megaloop.train.watchdog import Watchdog
from tests.distributed import RankPool
from tests.processes import children
from tests.train.runs import configuration, losses, release, start, start_held, steps_done, train


def hang_in_step_4() -> None:
    """A run's ``setup``: rank 0 begins its fourth step and never ends it."""
    plainly = TrainingEngine.train_step
    count = 0

    def train_step(engine: TrainingEngine, *arguments: Any) -> StepResult:
        nonlocal count
        count += 1
        if count == 4 and os.environ["RANK"] == "0":
            hang_here()
        return plainly(engine, *arguments)

    def hang_here() -> None:
        time.sleep(600)

    TrainingEngine.train_step = train_step  # type: ignore[method-assign, assignment]


@pytest.mark.slow
def test_every_rank_leaves_its_stacks(corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", (1, 1, 2), faults={"step_limit": 8})
    process = start(values, tmp_path, setup=hang_in_step_4)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output.decode()
    assert "died with SIGALRM (it hung for longer than faults.step_limit" in output.decode()
    assert steps_done(tmp_path / "run") == 3
    assert "in hang_here" in (tmp_path / "run/stacks/rank-0.txt").read_text()
    assert "in train_step" in (tmp_path / "run/stacks/rank-1.txt").read_text(), "it waits for the other"


@pytest.mark.slow
def test_a_run_that_hangs_is_started_again(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    """One rank is stopped: it does nothing any more, its watchdog included."""
    changes = {"checkpoint": {"every": 3}, "faults": {"step_limit": 8}}
    values = configuration(corpus, tmp_path / "run", (1, 1, 2), **changes)
    process = start_held(values, tmp_path, 5, "--max-restarts", "1")
    os.kill(children(process.pid)[1], signal.SIGSTOP)
    release(tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    assert "rank 0 died with SIGALRM" in output.decode()
    ranks_2.run(train, configuration(corpus, tmp_path / "straight", (1, 1, 2)))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_rank_that_holds_the_interpreters_lock_ends_too(tmp_path: Path) -> None:
    program = f"""
import ctypes
from pathlib import Path
import megaloop.train.watchdog as watchdog
watchdog._GRACE = 0.5
with watchdog.Watchdog(Path({str(tmp_path)!r}), 3, 0.5):
    ctypes.PyDLL(None).sleep(60)  # keeps the lock
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=55)  # it would hold the lock for longer
    assert done.returncode == -signal.SIGALRM
    assert "most recent call first" in (tmp_path / "stacks/rank-3.txt").read_text()


@pytest.mark.slow
def test_a_fed_watchdog_does_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 4) as watchdog:
        for _ in range(10):
            time.sleep(0.5)
            watchdog.feed()
    assert "most recent call first" not in (tmp_path / "stacks/rank-0.txt").read_text()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_no_limit_is_no_watchdog(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0) as watchdog:
        watchdog.feed()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert not (tmp_path / "stacks").exists()
