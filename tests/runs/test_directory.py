from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaloop.config import Config, DataConfig, SourceConfig, load_config
from megaloop.errors import MegaloopError
from megaloop.runs.directory import CONFIG, DISCARDED, RunDirectory, is_locked
from megaloop.runs.events import SaveFailed
from megaloop.runs.metrics import EVENTS, METRICS
from megaloop.runs.sinks import RunFiles
from tests.runs.test_metrics import RECORD, lines


def configuration(**values: Any) -> Config:
    return Config(data=DataConfig(sources=(SourceConfig(path=Path("shards")),)), **values)


def open_run(path: Path, *, resume: bool = False, **values: Any) -> RunDirectory:
    directory = RunDirectory.create_or_open(path, resume=resume)
    directory.accept(configuration(**values).to_yaml())
    return directory


def write_steps(path: Path, *steps: int, loss: float = 1.0) -> None:
    with closing(RunFiles(path)) as writer:
        for step in steps:
            writer.step(replace(RECORD, step=step, loss=loss))


HOLD = """
import os, sys
from pathlib import Path
from megaloop.runs.directory import RunDirectory
directory = RunDirectory.create_or_open(Path(sys.argv[1]), resume=True)
directory.accept("depth: 4")
child = os.fork() if sys.argv[2] == "fork" else 0
if sys.argv[2] == "fork" and child == 0:
    sys.stdin.read()  # a worker that outlives its parent
    os._exit(0)
print(child, flush=True)
sys.stdin.read()
"""


@contextmanager
def live_run(path: Path, kind: str = "plain") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run directory."""
    command = [sys.executable, "-c", HOLD, str(path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()
        yield process
        process.kill()


def test_a_new_directory_holds_the_resolved_configuration(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "new"
    with open_run(path, depth="4") as directory:
        assert directory.locked
        assert directory.last_step() is None
    assert load_config(path / CONFIG) == configuration(depth="4")


def test_a_run_in_use_is_refused_and_its_holder_named(tmp_path: Path) -> None:
    with live_run(tmp_path) as holder, pytest.raises(MegaloopError) as caught:
        open_run(tmp_path, resume=True)
    assert f"host {socket.gethostname()}, process {holder.pid}" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_same_process_cannot_open_a_run_twice(tmp_path: Path) -> None:
    with open_run(tmp_path), pytest.raises(MegaloopError, match=f"process {os.getpid()}"):
        open_run(tmp_path)
    open_run(tmp_path).release()


@pytest.mark.parametrize("kind", ["plain", "fork"])
def test_a_killed_run_does_not_block_the_next_even_if_a_worker_outlives_it(tmp_path: Path, kind: str) -> None:
    with live_run(tmp_path, kind) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == holder.pid
        open_run(tmp_path).release()


def test_a_refused_start_changes_nothing(tmp_path: Path) -> None:
    with live_run(tmp_path):
        before = (tmp_path / CONFIG).read_bytes()
        with pytest.raises(MegaloopError):
            open_run(tmp_path, depth="2")
        assert (tmp_path / CONFIG).read_bytes() == before


def contents(path: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its bytes, and every directory."""
    return {str(item.relative_to(path)): item.read_bytes() if item.is_file() else None for item in path.rglob("*")}


def test_until_it_is_accepted_a_start_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    run = tmp_path / "new"
    directory = RunDirectory.create_or_open(run, resume=True)
    assert (run / "run.lock").is_file()
    directory.release()
    assert not run.exists()
    with open_run(run, depth="4"):
        pass
    write_steps(run, 1, 2)
    (run / "run.lock").write_text('{"host": "a", "pid": 1}\n')  # as one that was killed leaves it
    before = contents(run)
    with pytest.raises(MegaloopError, match="already holds a run at step 2"):
        open_run(run, depth="5")
    RunDirectory.create_or_open(run, resume=True).release()
    assert contents(run) == before


def test_a_lock_that_a_refused_start_takes_away_is_not_held_by_who_waited_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or two runs would hold two files of the same name."""
    refused = RunDirectory.create_or_open(tmp_path, resume=True)
    monkeypatch.setattr("megaloop.runs.directory.time.sleep", lambda _: refused.release())  # while the other waits
    with RunDirectory.create_or_open(tmp_path, resume=True) as directory:
        assert directory.locked
        assert not directory.lost
        assert is_locked(tmp_path)


def test_a_directory_that_is_deleted_moved_or_replaced_is_lost(tmp_path: Path) -> None:
    run, elsewhere, link = tmp_path / "run", tmp_path / "elsewhere", tmp_path / "link"
    link.symlink_to(run)
    run.mkdir()
    with open_run(link) as directory, closing(RunFiles(link)) as writer:
        assert not directory.lost
        assert not writer.lost
        run.rename(elsewhere)
        assert directory.lost
        assert writer.lost
        with open_run(run):
            assert directory.lost, "it is another run's now"
        shutil.rmtree(run)
        elsewhere.rename(run)
        assert not directory.lost, "it is back"
        (run / METRICS).unlink()
        assert not directory.lost
        assert writer.lost
        shutil.rmtree(run)
        assert directory.lost


def test_a_directory_with_metrics_needs_resume(tmp_path: Path) -> None:
    open_run(tmp_path, depth="4").release()
    write_steps(tmp_path, 1, 2, 3)
    with pytest.raises(MegaloopError, match=r"already holds a run at step 3; add --resume or choose another run_dir"):
        open_run(tmp_path, depth="2")
    assert load_config(tmp_path / CONFIG).plan.layers == 4
    open_run(tmp_path, resume=True).release()


def test_a_directory_with_a_whole_checkpoint_needs_resume(tmp_path: Path) -> None:
    whole, half = (tmp_path / "checkpoints" / name for name in ("step-00000020", "step-00000040"))
    whole.mkdir(parents=True)
    half.mkdir()
    (whole / "manifest.json").write_text("{}")
    with pytest.raises(MegaloopError, match="at step 20"):
        open_run(tmp_path)


def test_a_run_that_never_took_a_step_may_start_again(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with open_run(tmp_path), closing(RunFiles(tmp_path)) as writer:
        writer.event(SaveFailed(0, "no room"))
    open_run(tmp_path).release()


def test_resuming_with_another_configuration_keeps_the_old(tmp_path: Path) -> None:
    for depth in ("4", "4", "5", "6"):
        open_run(tmp_path, resume=True, depth=depth).release()
    depths = {path.name: str(load_config(path).depth) for path in tmp_path.glob("config*.yaml")}
    assert depths == {"config.yaml": "6", "config-1.yaml": "4", "config-2.yaml": "5"}


def test_after_a_resume_every_step_is_there_exactly_once(tmp_path: Path) -> None:
    write_steps(tmp_path, *range(1, 16))
    with open_run(tmp_path, resume=True) as directory:
        resumed = directory.resume_at(10)
        write_steps(tmp_path, *range(11, 21), loss=2.0)
    records = lines(tmp_path / METRICS)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert [record["loss"] for record in records] == [1.0] * 10 + [2.0] * 10
    assert resumed.last == records[9]
    assert resumed.discarded == 5
    assert [record["step"] for record in lines(tmp_path / DISCARDED)] == list(range(11, 16))
    (event,) = lines(tmp_path / EVENTS)
    assert (event["event"], event["step"], event["discarded"]) == ("resume", 10, 5)


def test_nothing_is_rewritten_when_the_metrics_end_at_the_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    inode = (tmp_path / METRICS).stat().st_ino
    with open_run(tmp_path, resume=True) as directory:
        assert directory.resume_at(2).discarded == 0
    assert (tmp_path / METRICS).stat().st_ino == inode
    assert not (tmp_path / DISCARDED).exists()


def test_damaged_and_doubled_lines_are_moved_away_too(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    write_steps(tmp_path, 2, loss=2.0)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b"\xff not a record\n[3]\n" + b'{"step": 3, "lo')
    with open_run(tmp_path, resume=True) as directory:
        assert directory.resume_at(2).discarded == 4
    assert [(record["step"], record["loss"]) for record in lines(tmp_path / METRICS)] == [(1, 1.0), (2, 2.0)]
    assert len((tmp_path / DISCARDED).read_bytes().splitlines()) == 4


def test_a_run_killed_before_its_first_checkpoint_resumes_from_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=True) as directory:
        assert directory.resume_at(0).last is None
    write_steps(tmp_path, 1, 2)
    with open_run(tmp_path, resume=True) as directory:
        assert directory.resume_at(0).discarded == 2
        assert directory.last_step() is None


def test_a_path_that_cannot_be_a_directory_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            MegaloopError, match=r"run directory .*: cannot be used \(it is a file, or lies under one\)"
        ):
            open_run(path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MegaloopError, match="a symbolic link that leads nowhere"):
        open_run(tmp_path / "link")
