"""What a rank reads from its environment: numbers, or one clear line."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from launchers.rank import ERROR_FILE, RESTARTS, STORE_FD, open_store, report_error, restarts, started_by_launcher
from launchers.slurm_rank import slurm_rank_environment
from megaloop.errors import MegaloopError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_PROCID": "4", "SLURM_NODEID": "2", "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_CPUS_PER_TASK": "8",
}  # fmt: skip
NONSENSE = ["", "abc", "²", "-1", "1.5", "9" * 5000, "\x1b[2J"]


def test_ranks_of_a_launcher_are_known_by_its_variables() -> None:
    assert started_by_launcher(TORCHRUN)
    assert not started_by_launcher({"RANK": "0"})
    assert not started_by_launcher({})


@pytest.mark.parametrize("value", NONSENSE, ids=ascii)
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_launcher_that_says_nonsense(name: str, value: str) -> None:
    with pytest.raises(MegaloopError, match=f"environment variable {name}: expected a whole number, found") as caught:
        started_by_launcher(TORCHRUN | {name: value})
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_a_launcher_that_says_half(monkeypatch: pytest.MonkeyPatch) -> None:
    without = {name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}
    with pytest.raises(MegaloopError, match="RANK and WORLD_SIZE are set, but MASTER_PORT is not"):
        started_by_launcher(without)
    with pytest.raises(MegaloopError, match="RANK is 2 and WORLD_SIZE 2; ranks count from 0"):
        started_by_launcher(TORCHRUN | {"RANK": "2"})
    monkeypatch.setenv(RESTARTS, "many")
    with pytest.raises(MegaloopError, match=f"{RESTARTS}: expected a whole number, found 'many'"):
        restarts()
    monkeypatch.delenv(RESTARTS)
    assert restarts() == 0


@pytest.mark.parametrize("name", SLURM)
@pytest.mark.parametrize("value", [*NONSENSE, None], ids=ascii)
def test_slurm_that_says_nonsense(name: str, value: str | None) -> None:
    assert slurm_rank_environment(SLURM)["LOCAL_WORLD_SIZE"] == "1"
    said = {key: item for key, item in (SLURM | {name: value}).items() if item is not None}
    if name == "SLURM_CPUS_PER_TASK" and value is None:
        assert slurm_rank_environment(said)["OMP_NUM_THREADS"] == "1"
        return
    with pytest.raises(MegaloopError, match=f"environment variable {name}: "):
        slurm_rank_environment(said)


def test_a_socket_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, socket.socket() as gone:
        closed = str(gone.fileno())
        gone.close()
        for descriptor in ("abc", "9999", str(file.fileno()), closed):
            monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
            monkeypatch.setenv("MASTER_PORT", "29500")
            monkeypatch.setenv(STORE_FD, descriptor)
            with pytest.raises(MegaloopError, match="is no socket of a launcher; unset it"):
                open_store()
            assert STORE_FD not in os.environ


def test_an_error_that_the_launcher_cannot_be_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "none" / "rank-0"))
    assert not report_error("found")
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "rank-0"))
    assert report_error("found\x1b[2J " + "x" * 10**6)
    told = (tmp_path / "rank-0").read_text()
    assert told.startswith(r"found\x1b[2J xxx")
    assert len(told) < 2000
