"""The local launcher: one terminal, one error, nothing left behind. Each test starts real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launchers import local
from launchers.local import RankFailed, launch, local_ranks, rank_environment, single_rank
from megaloop.cli.main import app
from megaloop.config import Config
from megaloop.errors import MegaloopError

RANK = """
import os, signal, sys, time
from launchers.rank import follow_launcher, open_store, report_error
follow_launcher()
rank = int(os.environ["RANK"])
"""
STAY = "time.sleep(600)\n"


def _script(path: Path, body: str) -> list[str]:
    script = path / "rank.py"
    script.write_text(RANK + body)
    return [sys.executable, str(script)]


def _alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _config(**parallel: object) -> Config:
    return Config.model_validate({"data": {"sources": [{"path": "x"}]}, "parallel": parallel})


def test_ranks_find_each_other(tmp_path: Path) -> None:
    body = """
store = open_store()
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([rank + 1.0])
dist.all_reduce(value)
print("sum", value.item(), flush=True)
dist.barrier()
os._exit(0)  # as megaloop's ranks: a thread of torch's may abort a process while Python shuts down
"""
    launch(_script(tmp_path, body), 2, tmp_path / "logs")
    assert (tmp_path / "logs/rank-1.log").read_text() == "sum 3.0\n"
    assert not (tmp_path / "logs/rank-0.log").exists()


@pytest.mark.parametrize(("signalled", "starts"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (0, 3)])
def test_a_run_that_was_told_to_end_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled: int, starts: int
) -> None:
    """A rank that dies while it saves: whoever pressed Ctrl-C does not want the run back."""
    team = local._Team([], 2, tmp_path, tmp_path / "errors")
    (tmp_path / "errors").mkdir()
    team.signalled = signalled
    asked: list[Any] = []

    def dying(*arguments: Any) -> None:
        asked.append(arguments)
        raise team.failure(0, -signal.SIGKILL)

    monkeypatch.setattr(local, "launch", dying)
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: {tmp_path}/run\nparallel: {{pp: 2}}\ndata: {{sources: [{{path: x}}]}}\n")
    done = CliRunner().invoke(app, ["train", str(config), "--max-restarts", "2"])
    assert done.exit_code == 1, done.exception
    assert len(asked) == starts


def test_rank_0_has_the_terminal_and_the_others_write_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch(_script(tmp_path, 'print("out", rank); print("err", rank, file=sys.stderr)'), 3, tmp_path / "logs")
    assert capfd.readouterr() == ("out 0\n", "err 0\n")
    assert sorted((tmp_path / "logs/rank-2.log").read_text().splitlines()) == ["err 2", "out 2"]


@pytest.mark.parametrize("who", ["True", "rank == 1"])
def test_a_users_error_comes_out_once(tmp_path: Path, who: str, capfd: pytest.CaptureFixture[str]) -> None:
    body = f"if {who}:\n    report_error('data: no such file'); sys.exit(2)\n" + STAY
    with pytest.raises(MegaloopError, match="data: no such file"):
        launch(_script(tmp_path, body), 2, tmp_path / "logs")
    assert capfd.readouterr() == ("", "")


def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    body = (
        f"""
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
"""
        + STAY
    )
    with pytest.raises(RankFailed, match=r"rank 1 died with SIGKILL.*log: .*rank-1\.log"):
        launch(_script(tmp_path, body), 2, tmp_path / "logs")
    recorded = tmp_path / "pid"
    # it may have been ended before it wrote its number
    number = recorded.read_text() if recorded.exists() else ""
    assert not number or not _alive(int(number))


def test_a_bug_in_a_rank_shows_the_end_of_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-1.log").write_text("of an earlier run\n")
    with pytest.raises(RankFailed, match="rank 1 failed with exit code 1"):
        launch(_script(tmp_path, "if rank == 1: 1 / 0\n" + STAY), 2, tmp_path / "logs")
    shown = capfd.readouterr().err
    assert "[rank 1] ZeroDivisionError" in shown
    assert "earlier" not in shown


def test_ranks_that_ignore_the_end_are_killed(tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == 1: sys.exit(3)\n" + STAY
    with pytest.raises(RankFailed, match="exit code 3"):
        launch(_script(tmp_path, body), 2, tmp_path / "logs", grace=0.5)


LAUNCHER = """
import sys
from pathlib import Path
from launchers.local import launch
try:
    launch(sys.argv[2:], 2, Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_ending_the_launcher_leaves_no_rank_behind(tmp_path: Path, number: int, code: int) -> None:
    reading, writing = os.pipe()  # the ranks hold its other end: it closes when the last of them has ended
    # a rank that has reported is ready for the signal
    report = f"pipe = open('/proc/{os.getpid()}/fd/{writing}', 'wb', 0)\n    pipe.write(b'x')\n    "
    command = _script(tmp_path, f"try:\n    {report}{STAY}except KeyboardInterrupt:\n    sys.exit(130)\n")
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path / "logs"), *command], stderr=subprocess.PIPE
    )
    assert os.read(reading, 1) + os.read(reading, 1) == b"xx"
    os.close(writing)
    launcher.send_signal(number)
    _, messages = launcher.communicate(timeout=30)
    assert launcher.returncode == code
    assert os.read(reading, 1) == b"", "every rank has ended"
    assert messages == b""
    os.close(reading)


def test_ranks_share_the_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert rank_environment(0, cores, 1)["OMP_NUM_THREADS"] == "1"
    assert rank_environment(0, 1, 1)["OMP_NUM_THREADS"] == str(cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_environment(0, 2, 1)["OMP_NUM_THREADS"] == "7"


def test_a_single_rank_needs_no_second_process_and_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    with single_rank():
        assert os.environ["WORLD_SIZE"] == "1"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("parallel", "requested", "ranks"), [({}, 2, 2), ({"pp": 2, "dp": 3}, None, 6), ({"pp": 2}, 4, 4)]
)
def test_the_topology_says_how_many_ranks(
    parallel: dict[str, int], requested: int | None, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    values = _config(**parallel).model_copy(deep=True)
    train = values.train.model_copy(update={"global_batch": 12})
    assert local_ranks(values.model_copy(update={"train": train}), requested) == ranks


def test_a_number_of_ranks_that_does_not_factor_is_an_error() -> None:
    with pytest.raises(MegaloopError, match="makes 2 ranks, but there are 3"):
        local_ranks(_config(pp=2), 3)
