"""A run that hangs ends by itself, says where it hung, and goes on after a restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launchers.local import RankFailed, launch
from megaloop.train.watchdog import Watchdog
from tests.distributed import RankPool
from tests.train.runs import configuration, losses, start, steps_done, train, wait_for

HANGING = """
import os, sys, time
from pathlib import Path
from launchers.rank import follow_launcher, open_store
follow_launcher()
store = open_store()
import megaloop.train.loop as loop
from megaloop.config import load_config
from megaloop.parallel.engine import TrainingEngine

plainly = TrainingEngine.train_step

def train_step(engine, *arguments):
    if train_step.count == 3 and os.environ["RANK"] == "0":
        hang_here()
    train_step.count += 1
    return plainly(engine, *arguments)

def hang_here():
    time.sleep(600)

train_step.count = 0
TrainingEngine.train_step = train_step
loop.run(load_config(Path(sys.argv[1]), []))
"""


def test_every_rank_leaves_its_stacks(corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", (1, 1, 2), faults={"step_limit": 4})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "rank.py").write_text(HANGING)
    command = [sys.executable, str(tmp_path / "rank.py"), str(tmp_path / "config.yaml")]
    with pytest.raises(RankFailed, match=r"died with SIGALRM \(it hung for longer than faults.step_limit"):
        launch(command, 2, tmp_path / "run/logs")
    assert steps_done(tmp_path / "run") == 3
    assert "in hang_here" in (tmp_path / "run/stacks/rank-0.txt").read_text()
    assert "in train_step" in (tmp_path / "run/stacks/rank-1.txt").read_text(), "it waits for the other"


def test_a_run_that_hangs_is_started_again(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    """One rank is stopped: it does nothing any more, its watchdog included."""
    changes = {"train__global_batch": 32, "checkpoint": {"every": 3}, "faults": {"step_limit": 3}}
    values = configuration(corpus, tmp_path / "run", (1, 1, 2), **changes)
    process = start(values, tmp_path, "--max-restarts", "1")
    wait_for(lambda: steps_done(tmp_path / "run") >= 5, process)
    victim = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[1]
    os.kill(int(victim), signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    assert "rank 0 died with SIGALRM" in output.decode()
    ranks_2.run(train, configuration(corpus, tmp_path / "straight", (1, 1, 2), train__global_batch=32))
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
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == -signal.SIGALRM
    assert time.monotonic() - began < 30
    assert "most recent call first" in (tmp_path / "stacks/rank-3.txt").read_text()


def test_a_fed_watchdog_does_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0.5) as watchdog:
        for _ in range(10):
            time.sleep(0.1)
            watchdog.feed()
    time.sleep(0.7)
    assert "most recent call first" not in (tmp_path / "stacks/rank-0.txt").read_text()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_no_limit_is_no_watchdog(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0) as watchdog:
        watchdog.feed()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert not (tmp_path / "stacks").exists()
