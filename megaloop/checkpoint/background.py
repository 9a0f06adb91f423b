"""Saving while training goes on: the state is copied into main memory, and a thread writes the copy.

Training stops for the copy alone. The thread takes the same path as a save that is waited for
(:func:`megaloop.checkpoint.writer.save_checkpoint`), and talks to the threads of the other ranks over a process group of
its own: what it exchanges with them never meets what training exchanges.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megaloop.checkpoint.writer import CheckpointInfo, SaveResult, save_checkpoint
from megaloop.layout.pieces import StatePiece

__all__ = ["BackgroundSaver", "HostCopy"]

_ALIGNMENT = 64


class HostCopy:
    """Main memory for a rank's state, used again from one save to the next.

    Memory that was never touched costs the kernel a second and a half per GiB, ten times the copy: so it is taken, and
    touched, by a thread as soon as its size is known. It is pinned where the state lies on a GPU.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._thread: threading.Thread | None = None

    def prepare(self, pieces: Iterable[StatePiece]) -> None:
        """Begin to take the memory that a copy of ``pieces`` needs; returns at once."""
        written = [piece for piece in pieces if piece.writes]
        size, pinned = _offsets(written)[-1], any(state_piece.data.is_cuda for state_piece in written)
        self._wait()
        if self._buffer is not None and self._buffer.numel() == size:
            return
        self._buffer = None
        self._thread = threading.Thread(target=self._take, args=(size, pinned), name="megaloop-memory", daemon=True)
        self._thread.start()

    def copy(self, pieces: Iterable[StatePiece]) -> list[StatePiece]:
        """The pieces that this rank writes, with their values in main memory; valid until the next call."""
        written = [piece for piece in pieces if piece.writes]
        self.prepare(written)
        self._wait()
        assert self._buffer is not None
        copies = []
        for state_piece, start in zip(written, _offsets(written), strict=False):
            size = state_piece.data.numel() * state_piece.data.element_size()
            values = self._buffer[start : start + size].view(state_piece.data.dtype).view(state_piece.data.shape)
            values.copy_(state_piece.data, non_blocking=True)
            copies.append(replace(state_piece, data=values))
        if any(state_piece.data.is_cuda for state_piece in written):
            torch.cuda.synchronize()
        return copies

    def _take(self, size: int, pinned: bool) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._buffer.zero_()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _offsets(pieces: list[StatePiece]) -> list[int]:
    """Where each piece begins in the copy, and where the last one ends, in bytes."""
    offsets = [0]
    for piece in pieces:
        size = piece.data.numel() * piece.data.element_size()
        offsets.append(offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return offsets


@dataclass
class _Work:
    """A save under way, and what came of it."""

    step: int
    thread: threading.Thread
    stall_seconds: float
    result: SaveResult | None = None
    error: BaseException | None = None


class BackgroundSaver:
    """Saves checkpoints, one at a time; every rank has one, and all call its methods together.

    Attributes:
        stall_seconds: how long :meth:`start` has kept training, the last time.
    """

    def __init__(self) -> None:
        self._copy = HostCopy()
        self._work: _Work | None = None
        # a rank may write for long before another has something to say to it
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.stall_seconds = 0.0

    def prepare(self, pieces: Iterable[StatePiece]) -> None:
        """Take the memory for such state beforehand; returns at once."""
        self._copy.prepare(pieces)

    @property
    def step(self) -> int | None:
        """The step that is being saved, None while nothing is."""
        return self._work.step if self._work else None

    @property
    def busy(self) -> bool:
        """This rank is not done yet with the save that was started; other ranks may be, or not."""
        return self._work is not None and self._work.thread.is_alive()

    def start(
        self,
        directory: Path,
        pieces: Iterable[StatePiece],
        info: CheckpointInfo,
        tokenizer: Path | None,
        then: Callable[[], object],
    ) -> None:
        """Copy the state and begin to write it; the arguments are those of :func:`save_checkpoint`."""
        assert self._work is None, "collect the last save first"
        began = time.perf_counter()
        copies = self._copy.copy(pieces)

        def save() -> None:
            try:
                work.result = save_checkpoint(directory, copies, info, tokenizer, then=then, group=self._group)
            except BaseException as error:  # whatever it is, whoever collects the save must learn of it
                work.error = error

        thread = threading.Thread(target=save, name="megaloop-save", daemon=True)
        work = self._work = _Work(info.step, thread, time.perf_counter() - began)
        self.stall_seconds = work.stall_seconds
        thread.start()

    def collect(self) -> SaveResult:
        """Wait for the save that was started, and return or raise what came of it.

        Raises:
            MegaloopError, RuntimeError: as :func:`save_checkpoint`, the same on every rank.
        """
        assert self._work is not None
        work, self._work = self._work, None
        work.thread.join()
        if work.error is not None:
            raise work.error
        assert work.result is not None
        return work.result

    def close(self, patience: float | None = None) -> None:
        """Let go of the process group once nothing is written any more; ``patience`` in seconds, None: as long as it takes."""
        if self._work is not None:
            self._work.thread.join(patience)
        if not self.busy:
            dist.destroy_process_group(self._group)
