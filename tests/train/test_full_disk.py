"""A full disk while a run trains: it goes on, keeps what is whole, and saves again when there is room."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaloop.checkpoint import list_checkpoints
from megaloop.errors import CONTINUE
from megaloop.runs.events import Event, SaveFailed
from megaloop.runs.sinks import Hub
from tests.debian import skip
from tests.distributed import RankPool
from tests.train.runs import configuration, events, losses, pace, start, train, wait_for

Disk = Callable[[str], Path]


def _fill(path: Path) -> None:
    """Take all the room that is left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    assert shutil.disk_usage(path.parent).free < 4096


def slowly(folder: Path) -> None:
    """A run's ``setup``: no step is shorter than a tick, and a file tells that a checkpoint could not be written."""
    pace(0.03)
    send = Hub.event

    def telling(hub: Hub, event: Event) -> None:
        send(hub, event)
        if isinstance(event, SaveFailed):
            (folder / "not-saved").touch()

    Hub.event = telling  # type: ignore[method-assign, assignment]


def _count(run: Path, kind: str) -> int:
    return len(events(run, kind)) if (run / "events.jsonl").exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_outlives_a_full_disk(
    ranks_2: RankPool, corpus: Path, tmp_path: Path, disk: Disk, asynchronous: bool
) -> None:
    """Filled to the last byte after a checkpoint, and emptied while the run still goes on."""
    small = disk("8m")
    changes: dict[str, Any] = {"train__steps": 100_000, "validation__every": 0, "schedule__cooldown": 0}
    values = configuration(corpus, small / "run", (1, 1, 2), **changes)
    values["checkpoint"] = {"every": 10, "keep": 1, "asynchronous": asynchronous}
    values["logging"]["tensorboard"] = True
    process = start(values, tmp_path, setup=slowly, setup_arguments=(tmp_path,))
    wait_for(lambda: _count(small / "run", "save") >= 1, process)
    _fill(small / "filler")
    wait_for((tmp_path / "not-saved").exists, process)
    assert list_checkpoints(small / "run/checkpoints"), "the last complete one is there"
    (small / "filler").unlink()
    wait_for(lambda: _count(small / "run", "save_failed") >= 1, process)
    failed = events(small / "run", "save_failed")[-1]
    wait_for(lambda: events(small / "run", "save")[-1]["step"] > failed["step"], process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == CONTINUE, output.decode()
    assert "warning: checkpoint " in output.decode()
    assert "warning: no room on the disk; metrics and events wait in memory" in output.decode()
    done = losses(small / "run")
    assert len(done) == events(small / "run", "stop")[0]["step"], "no step is missing"
    changes["train__steps"] = len(done)
    ranks_2.run(train, configuration(corpus, tmp_path / "straight", (1, 1, 2), **changes))
    assert done == losses(tmp_path / "straight")


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_is_an_error(corpus: Path, tmp_path: Path, disk: Disk) -> None:
    small = disk("1200k")
    values = configuration(corpus, small / "run", (1, 1, 2), train__steps=6, checkpoint__every=2)
    process = start(values, tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output.decode()
    error = output.decode().splitlines()[-1]
    assert error.startswith("error: checkpoint ")
    assert "step-00000006 not saved: " in error
    assert "the last complete checkpoint is step-00000002" in error
    assert [path.name for path in (small / "run/checkpoints").iterdir()] == ["step-00000002"]
    shutil.copytree(small / "run", tmp_path / "run")
    again = start(configuration(corpus, tmp_path / "run", (1, 1, 2), train__steps=6), tmp_path, "--resume")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output.decode()
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_old_checkpoint_that_cannot_be_deleted_makes_the_new_one_no_less_whole(
    ranks_1: RankPool, corpus: Path, tmp_path: Path, asynchronous: bool
) -> None:
    """Something is mounted in it. The run ends well, with the new checkpoint, and says what is in the way."""
    run = tmp_path / "run"
    values = configuration(corpus, run, checkpoint={"every": 5, "keep": 9, "asynchronous": asynchronous})
    ranks_1.run(train, {**values, "train": {**values["train"], "steps": 10}})
    mounted = run / "checkpoints" / "step-00000005" / "model"
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        skip("nothing can be mounted here")
    try:
        values["checkpoint"]["keep"] = 1
        ranks_1.run(train, values, resume=True)
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)
    saves = events(run, "save")
    assert [event["step"] for event in saves] == [5, 10, 15, 20]
    assert "step-00000005 cannot be deleted" in saves[-1]["not_deleted"]
    assert "not_deleted" not in saves[0]
    assert not events(run, "save_failed")
    assert list_checkpoints(run / "checkpoints")[-1].name == "step-00000020"
