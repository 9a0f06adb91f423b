"""The checkpoints of a run while it trains: when they are written, and what happens when one cannot be."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist

from megaloop.checkpoint import BackgroundSaver, CheckpointInfo, SaveResult, prune, save_checkpoint, step_name
from megaloop.config import CheckpointConfig
from megaloop.errors import MegaloopError
from megaloop.layout.pieces import StatePiece
from megaloop.runs.events import Saved, SaveFailed
from megaloop.runs.sinks import Sink
from megaloop.runtime.collectives import gather_objects

__all__ = ["Saver"]

_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 600.0
"""Seconds until a save that failed is tried again, at first and at most: it doubles each time."""


class Saver:
    """Saves a run's checkpoints and tells ``sink`` of it; every rank has one, and all call its methods together.

    A save that fails for want of room does not end the run: it is tried again when there is room, or when the next one
    is due. Only the last one, without which training would be lost, must succeed (:meth:`finish`).

    Attributes:
        saved: the step of the newest complete checkpoint, None if there is none yet.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, sink: Sink, saved: int | None):
        self._directory, self._config, self._sink = directory, config, sink
        self.saved = saved
        self._background = BackgroundSaver() if config.asynchronous else None
        self._needed = 0
        self._pause = _FIRST_PAUSE
        self._failed_at: float | None = None
        self._not_deleted: str | None = None

    def prepare(self, pieces: Iterable[StatePiece]) -> None:
        """Make ready for such state; returns at once."""
        if self._background:
            self._background.prepare(pieces)

    @property
    def busy(self) -> bool:
        """This rank still writes; other ranks may be done."""
        return self._background is not None and self._background.busy

    @property
    def should_retry(self) -> bool:
        """A save has failed, and now there seems to be room for it; asked on rank 0, elsewhere False."""
        if self._failed_at is None or dist.get_rank() != 0 or time.monotonic() < self._failed_at + self._pause:
            return False
        return shutil.disk_usage(self._directory).free > self._needed

    def save(self, pieces: Iterable[StatePiece], info: CheckpointInfo, tokenizer: Path) -> None:
        """Save, or begin to; waits for the save before, if that is not done."""
        self.collect()
        pieces = list(pieces)
        self._needed = sum(gather_objects(sum(piece.data.nbytes for piece in pieces if piece.writes)))
        path = self._directory / step_name(info.step)
        if self._background:
            self._background.start(path, pieces, info, tokenizer, self._prune)
        else:
            self._settle(info.step, lambda: save_checkpoint(path, pieces, info, tokenizer, then=self._prune))

    def collect(self) -> None:
        """Wait for the save that is under way, if one is, and report it; a full disk is only a warning."""
        if self._background and self._background.step is not None:
            self._settle(self._background.step, self._background.collect)

    def finish(self, step: int, pieces: Iterable[StatePiece], info: CheckpointInfo, tokenizer: Path) -> None:
        """Make sure that the state after ``step`` is saved.

        Raises:
            MegaloopError: it cannot be.
        """
        self.collect()
        if self.saved != step:
            self.save(pieces, info, tokenizer)
            self.collect()
        if self.saved != step:
            raise self._error

    def close(self, patience: float | None = None) -> None:
        """Wait until nothing is written any more; ``patience`` in seconds, None: as long as it takes."""
        if self._background:
            self._background.close(patience)

    def _settle(self, step: int, save: Callable[[], SaveResult]) -> None:
        try:
            result = save()
        except MegaloopError as error:
            again = self._failed_at is not None
            self._error, self._failed_at = error, time.monotonic()
            self._pause = min(self._pause * 2, _LONGEST_PAUSE) if again else _FIRST_PAUSE
            self._sink.event(SaveFailed(step, str(error)))
        else:
            self.saved, self._failed_at = step, None
            stall = self._background.stall_seconds if self._background else result.seconds
            self._sink.event(Saved(step, result.seconds, result.bytes, result.path, stall, self._not_deleted))

    def _prune(self) -> None:
        """Delete what is superfluous; that this fails makes the new checkpoint no less whole. Rank 0, maybe in a thread."""
        self._not_deleted = None
        try:
            prune(self._directory, self._config.keep, self._config.keep_every)
        except MegaloopError as error:
            self._not_deleted = str(error)
