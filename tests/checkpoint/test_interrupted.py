"""A save that fails or is killed leaves what was there before."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megaloop.checkpoint import list_checkpoints, resolve_checkpoint
from megaloop.errors import MegaloopError
from megaloop.layout.pieces import Box, Piece, StatePiece
from tests.checkpoint.states import read_all, save, tensor
from tests.distributed import RankPool

# --- full disks ---


def _save_until_full(run: Path) -> tuple[str, list[str]]:
    """Save a step that fits and one of which rank 1's part does not; the error and what is left, as a rank sees it."""
    name, rows = (("norm.weight", 8), ("embedding.weight", 8000))[dist.get_rank()]
    pieces = [StatePiece("master", Piece(name, (rows,), Box.whole((rows,))), tensor("master", name, (rows,)))]
    save(run, 1, pieces)
    message = _error_of_saving(run, 2, pieces)
    dist.barrier()
    return message, sorted(path.name for path in (run / "checkpoints").iterdir())


def _error_of_saving(run: Path, step: int, pieces: list[StatePiece] | None = None) -> str:
    try:
        save(run, step, pieces)
    except MegaloopError as error:
        return str(error)
    return ""


def test_a_disk_that_is_full_for_one_rank_leaves_the_earlier_checkpoint(ranks_2: RankPool, small_disk: Path) -> None:
    (message, left), other = ranks_2.run(_save_until_full, small_disk)
    assert other == (message, left)
    assert "\n" not in message
    assert message.startswith(f"checkpoint {small_disk}/checkpoints/step-00000002 not saved: ")
    assert "No space left on device" in message
    assert re.search(r"\((rank 1|ranks 0, 1)\)", message)  # rank 0 may find the disk full too, then
    assert "the last complete checkpoint is step-00000001; make room" in message
    assert left == ["step-00000001"]
    read_all(resolve_checkpoint(small_disk))


def test_a_full_disk_at_any_moment(small_disk: Path) -> None:
    """Whatever is written when the disk is full: tensors, tokenizer or manifest."""
    save(small_disk, 1)
    ballast = small_disk / "ballast"
    failures = 0
    for pages in range(1, 16):
        ballast.write_bytes(b"")
        disk = os.statvfs(small_disk)
        ballast.write_bytes(bytes((disk.f_bavail - pages) * disk.f_bsize))
        message = _error_of_saving(small_disk, 2)
        if not message:
            break
        failures += 1
        assert "No space left on device" in message
        assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000001"]
        read_all(resolve_checkpoint(small_disk))
    assert failures > 3
    read_all(small_disk / "checkpoints" / "step-00000002")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(MegaloopError, match=r"not saved: .* \(rank 0\); there is no earlier checkpoint"):
        save(tmp_path, 1)


# --- kills ---


def _kill_at(event: int, run: Path, step: int) -> bool:
    """Save in a child that is killed at the n-th thing it does to the run's files; whether it got that far."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if name in _CHANGES and str(arguments[0]).startswith(str(run)):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            save(run, step, salt=500)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


def _kill_everywhere(run: Path, step: int) -> tuple[int, int]:
    """Kill a save at every point, in turn; how many there were, and after how many the new checkpoint was there."""
    finished = kills = 0
    while True:
        shutil.rmtree(run, ignore_errors=True)
        save(run, 1)
        if not _kill_at(kills + 1, run, step):
            return kills, finished
        kills += 1
        whole = list_checkpoints(run / "checkpoints")
        for path in whole:
            read_all(path)
        names = [path.name for path in whole]
        if step == 2:
            assert names in (["step-00000001"], ["step-00000001", "step-00000002"])
            finished += len(names) - 1
        save(run, 3)
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == sorted({"step-00000001", *names, "step-00000003"})
        read_all(run / "checkpoints" / "step-00000001")


@pytest.fixture(scope="module")
def fresh_rank() -> Iterator[RankPool]:
    """A process that has computed nothing yet: the child of one that has threads may wait for a lock of theirs forever."""
    with RankPool(1) as pool:
        yield pool


def test_a_killed_save_leaves_the_earlier_checkpoint(fresh_rank: RankPool, tmp_path: Path) -> None:
    [(kills, finished)] = fresh_rank.run(_kill_everywhere, tmp_path / "run", 2, init=False)
    assert kills > 10
    assert finished < 3  # only what comes after the last rename


@pytest.mark.slow
def test_a_killed_save_of_the_same_step_loses_neither(fresh_rank: RankPool, tmp_path: Path) -> None:
    [(kills, _)] = fresh_rank.run(_kill_everywhere, tmp_path / "run", 1, init=False)
    assert kills > 10
