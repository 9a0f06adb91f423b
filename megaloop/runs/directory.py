"""The directory of a run: who may write in it, and what is in it when a run resumes. See docs/RUNS.md."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import socket
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megaloop.errors import MegaloopError
from megaloop.files import fsync_file, replace_file
from megaloop.runs.events import RunResumed
from megaloop.runs.metrics import METRICS
from megaloop.runs.records import is_at, number, parse_record, read_lines, read_records, whole_number
from megaloop.runs.sinks import append_event
from megaloop.text import printable

__all__ = [
    "CONFIG",
    "DISCARDED",
    "LOCK",
    "STACKS",
    "NoDirectory",
    "Resumed",
    "RunDirectory",
    "holder",
    "is_locked",
    "last_records",
    "lock",
]

CONFIG = "config.yaml"
LOCK = "run.lock"
DISCARDED = "metrics.discarded.jsonl"
STACKS = "stacks"
_CHECKPOINT = re.compile(r"step-([0-9]+)")
_PATIENCE = 1.0
"""Seconds to wait for a lock: a launcher starts ranks again right after it has killed the last ones."""
_LOCK_SIZE = 4096
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@dataclass(frozen=True)
class Resumed:
    """What :meth:`RunDirectory.resume_at` found.

    Attributes:
        last: the record of the step at which the run resumes, None where there is none.
        discarded: how many records after that step were moved to ``metrics.discarded.jsonl``.
    """

    last: dict[str, Any] | None
    discarded: int


@dataclass(frozen=True)
class _Before:
    """How a directory was before it was locked.

    Attributes:
        made: it was not there.
        lock: what ``run.lock`` held; None: it was not there.
    """

    made: bool
    lock: bytes | None


class RunDirectory:
    """A run's directory, held by rank 0's process for as long as it writes there.

    The lock is ``flock`` on ``run.lock``: the kernel releases it when the process ends, however it ends, so a
    killed run never blocks the next. Where the file system has no such locks, ``locked`` is False.

    Until :meth:`accept` nothing in the directory changes but the lock, and :meth:`release` takes that back: a start
    that is refused leaves the directory as it was.
    """

    def __init__(self, path: Path, lock: int | None, before: _Before | None = None):
        self.path = path
        self._lock, self._before = lock, before
        if lock is not None:
            _close_in_children(self)

    @classmethod
    def create_or_open(cls, path: Path, *, resume: bool) -> RunDirectory:
        """Make or open the directory and lock it.

        Raises:
            MegaloopError: a live run uses the directory (its host and process are named); it holds a run
                already and ``resume`` is not asked for; it cannot be used.
        """
        directory = cls._hold(path)
        try:
            if not resume and (step := directory.last_step()) is not None:
                raise MegaloopError(
                    f"run directory {path} already holds a run at step {step}; add --resume or choose another run_dir"
                )
        except BaseException:
            directory.release()
            raise
        return directory

    @classmethod
    def _hold(cls, path: Path) -> RunDirectory:
        made = False
        try:
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            lock, before = _lock(path)
        except OSError as error:
            if made:
                with suppress(OSError):
                    path.rmdir()
            raise _cannot_be_used(path, error) from None
        return cls(path, lock, _Before(made, before))

    def accept(self, configuration: str) -> None:
        """From here on the run changes the directory: write the resolved configuration to ``config.yaml``.

        A configuration that another one replaces is kept as ``config-1.yaml``, ``config-2.yaml`` and so on.

        Raises:
            MegaloopError: it cannot be written.
        """
        path, new = self.path / CONFIG, configuration.encode()
        try:
            old = path.read_bytes() if path.exists() else None
            if old is not None and old != new:
                number = 1
                while (kept := self.path / f"config-{number}.yaml").exists():
                    number += 1
                replace_file(kept, old)
            if old != new:
                replace_file(path, new)
        except OSError as error:
            raise _cannot_be_written(self.path, error) from None
        self._before = None

    @property
    def locked(self) -> bool:
        """False where the file system offers no locks (or after :meth:`release`)."""
        return self._lock is not None

    @property
    def lost(self) -> bool:
        """Whether the path leads somewhere else by now: the directory was deleted, moved or replaced."""
        return self._lock is not None and not is_at(self.path / LOCK, self._lock)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def last_step(self) -> int | None:
        """The newest step of which there are metrics or a complete checkpoint; None in a directory without either."""
        found = (whole_number(record, "step") for record in read_records(self.path / METRICS))
        steps = [step for step in found if step is not None]
        try:
            if self.checkpoints.is_dir():
                steps += [
                    int(match[1])
                    for entry in self.checkpoints.iterdir()
                    if (match := _CHECKPOINT.fullmatch(entry.name)) and (entry / "manifest.json").is_file()
                ]
        except OSError as error:
            raise _cannot_be_used(self.path, error) from None
        return max(steps, default=None)

    def resume_at(self, step: int) -> Resumed:
        """Make the metrics end at ``step`` and record a ``resume`` event; call it before opening the metrics' writer.

        Records of later steps (the killed run got further than its last checkpoint) and lines that are no
        record move to ``metrics.discarded.jsonl``, so that ``metrics.jsonl`` will hold every step exactly once.

        Args:
            step: optimizer steps that the checkpoint holds; 0 where the run begins anew.
        """
        kept: dict[int, bytes] = {}
        discarded: list[bytes] = []
        last = None
        for line, record in read_lines(self.path / METRICS):
            done = None if record is None else whole_number(record, "step")
            if done is None or done > step:
                discarded.append(line)
                continue
            if done in kept:
                discarded.append(kept.pop(done))
            kept[done] = line
            if done == step:
                last = record
        try:
            if discarded:
                _append(self.path / DISCARDED, b"".join(discarded))
                replace_file(self.path / METRICS, b"".join(kept[key] for key in sorted(kept)))
        except OSError as error:
            raise _cannot_be_written(self.path, error) from None
        append_event(self.path, RunResumed(step, len(discarded)))
        return Resumed(last, len(discarded))

    def recent_losses(self, count: int) -> list[float]:
        """The last ``count`` losses of the model as it is, oldest first."""
        records = last_records(self.path, count)
        same = itertools.takewhile(
            lambda record: all(record.get(key) == records[-1].get(key) for key in ("layers", "depth")),
            reversed(records),
        )
        return [loss for record in same if (loss := number(record, "loss")) is not None][::-1]

    def release(self) -> None:
        """Let others use the directory; the end of the process does the same."""
        before, self._before = self._before, None
        if self._lock is not None:
            if before is None:
                os.ftruncate(self._lock, 0)
            else:
                _put_back(self.path / LOCK, self._lock, before.lock)
            os.close(self._lock)
            self._lock = None
        if before is not None and before.made:
            with suppress(OSError):  # something is in it by now
                self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class NoDirectory:
    """What ranks other than 0 hold of the run directory: nothing."""

    lost = False

    def accept(self, configuration: str) -> None:
        """Rank 0 does that."""

    def recent_losses(self, count: int) -> list[float]:
        """Rank 0 knows them."""
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the directory of a run that is not running.

    Raises:
        MegaloopError: it is running, or the directory cannot be used.
    """
    try:
        lock, before = _lock(path)
    except OSError as error:
        raise _cannot_be_used(path, error) from None
    with RunDirectory(path, lock, _Before(False, before)):
        yield


def is_locked(path: Path) -> bool:
    """Whether a live run holds the directory; it is only looked at."""
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def holder(path: Path) -> str:
    """Who holds a directory, as its lock says: ``host a, process 1``."""
    try:
        return _holder((path / LOCK).read_bytes())
    except OSError:
        return _holder(b"")


def _lock(path: Path) -> tuple[int | None, bytes | None]:
    """Take the directory's lock, and write into it who holds it.

    Returns:
        Its descriptor, None where there are no locks; and what ``run.lock`` held, None where it was not there.
    """
    while True:
        descriptor, before = _open_lock(path / LOCK)
        try:
            _flock(descriptor)
            if not is_at(path / LOCK, descriptor):  # a start that was refused has just taken it away
                os.close(descriptor)
                continue
            if before is not None:
                before = os.pread(descriptor, _LOCK_SIZE, 0)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n", 0)
            return descriptor, before
        except BlockingIOError:
            who = _holder(os.pread(descriptor, _LOCK_SIZE, 0))
            os.close(descriptor)
            raise MegaloopError(
                f"run directory {path} is in use by a live run ({who}); wait for it, stop it, or choose another run_dir"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                if before is None:
                    (path / LOCK).unlink(missing_ok=True)
                return None, before
            raise


def _open_lock(path: Path) -> tuple[int, bytes | None]:
    """The lock's file, and what it holds; None where it had to be made."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o644), None
    return descriptor, os.pread(descriptor, _LOCK_SIZE, 0)


def _put_back(path: Path, descriptor: int, before: bytes | None) -> None:
    """Make the lock, which is still held, what it was before it was taken."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        if before is not None:
            os.pwrite(descriptor, before, 0)
        elif is_at(path, descriptor):
            path.unlink()


def _flock(descriptor: int) -> None:
    """Lock, or say that another has it; what a process that was just killed has not yet let go of is waited for."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _holder(text: bytes) -> str:
    who = parse_record(text)
    if who is None or not {"host", "pid"} <= who.keys():  # it has only just taken the lock
        return "it has not said which"
    return f"host {printable(who['host'])}, process {printable(who['pid'])}"


def _close_in_children(directory: RunDirectory) -> None:
    """A forked child shares the lock with its parent: were it to outlive rank 0, it would block the next run."""
    reference = weakref.ref(directory)

    def close() -> None:
        held = reference()
        if held is not None and held._lock is not None:
            os.close(held._lock)
            held._lock = held._before = None

    os.register_at_fork(after_in_child=close)


def last_records(run: Path, count: int) -> list[dict[str, Any]]:
    """The last ``count`` records of steps of a run's metrics, oldest first; each has a step."""
    records = (record for record in read_records(run / METRICS) if whole_number(record, "step") is not None)
    return list(deque(records, maxlen=count))


def _cannot_be_used(path: Path, error: OSError) -> MegaloopError:
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = (
            "a symbolic link that leads nowhere"
            if path.is_symlink() and not path.exists()
            else "it is a file, or lies under one"
        )
    return MegaloopError(f"run directory {path}: cannot be used ({reason}); choose another run_dir")


def _cannot_be_written(path: Path, error: OSError) -> MegaloopError:
    return MegaloopError(f"run directory {path}: cannot be written ({error.strerror or error})")


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        fsync_file(file)
