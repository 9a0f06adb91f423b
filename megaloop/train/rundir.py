"""The directory of a run: who may write in it, and what is in it when a run resumes. See docs/RUNS.md."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megaloop.config import Config
from megaloop.errors import MegaloopError
from megaloop.train.metrics import METRICS, write_event

__all__ = ["CONFIG", "DISCARDED", "LOCK", "Resumed", "RunDirectory", "held", "is_held", "last_records", "replace_file"]

CONFIG = "config.yaml"
LOCK = "run.lock"
DISCARDED = "metrics.discarded.jsonl"
_CHECKPOINT = re.compile(r"step-([0-9]+)")
_PATIENCE = 1.0
"""Seconds to wait for a lock: a launcher starts ranks again right after it has killed the last ones."""
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


class RunDirectory:
    """A run's directory, held by rank 0's process for as long as it writes there.

    The lock is ``flock`` on ``run.lock``: the kernel releases it when the process ends, however it ends, so a
    killed run never blocks the next. Where the file system has no such locks, ``locked`` is False.
    """

    def __init__(self, path: Path, lock: int | None):
        self.path = path
        self._lock = lock
        if lock is not None:
            _close_in_children(self)

    @classmethod
    def create_or_open(cls, path: Path, config: Config, *, resume: bool) -> RunDirectory:
        """Make or open the directory, lock it, and write the resolved configuration to ``config.yaml``.

        A configuration that another one replaces is kept as ``config-1.yaml``, ``config-2.yaml`` and so on.

        Raises:
            MegaloopError: a live run uses the directory (its host and process are named); it holds a run
                already and ``resume`` is not asked for; it cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        except OSError as error:
            raise MegaloopError(
                f"run directory {path}: cannot be used ({error.strerror or error}); choose another run_dir"
            ) from None
        directory = cls(path, lock)
        try:
            if not resume and (step := directory.last_step()) is not None:
                raise MegaloopError(
                    f"run directory {path} already holds a run at step {step}; add --resume or choose another run_dir"
                )
            directory._write_config(config.to_yaml())
        except OSError as error:
            directory.release()
            raise MegaloopError(f"run directory {path}: cannot be written ({error.strerror or error})") from None
        except BaseException:
            directory.release()
            raise
        return directory

    @property
    def locked(self) -> bool:
        """False where the file system offers no locks (or after :meth:`release`)."""
        return self._lock is not None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def last_step(self) -> int | None:
        """The newest step of which there are metrics or a whole checkpoint; None in a directory without either."""
        steps = [record["step"] for _, record in _records(self.path / METRICS) if record is not None]
        if self.checkpoints.is_dir():
            steps += [
                int(match[1])
                for entry in self.checkpoints.iterdir()
                if (match := _CHECKPOINT.fullmatch(entry.name)) and (entry / "manifest.json").is_file()
            ]
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
        for line, record in _records(self.path / METRICS):
            if record is None or record["step"] > step:
                discarded.append(line)
                continue
            if record["step"] in kept:
                discarded.append(kept.pop(record["step"]))
            kept[record["step"]] = line
            if record["step"] == step:
                last = record
        try:
            if discarded:
                _append(self.path / DISCARDED, b"".join(discarded))
                replace_file(self.path / METRICS, b"".join(kept[key] for key in sorted(kept)))
        except OSError as error:
            raise MegaloopError(f"run directory {self.path}: cannot be written ({error.strerror or error})") from None
        write_event(self.path, "resume", step, discarded=len(discarded))
        return Resumed(last, len(discarded))

    def release(self) -> None:
        """Let others use the directory; the end of the process does the same."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _write_config(self, text: str) -> None:
        path = self.path / CONFIG
        if path.exists() and (old := path.read_bytes()) != text.encode():
            number = 1
            while (kept := self.path / f"config-{number}.yaml").exists():
                number += 1
            replace_file(kept, old)
        replace_file(path, text.encode())


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the directory of a run that is not alive.

    Raises:
        MegaloopError: it is alive, or the directory cannot be used.
    """
    try:
        directory = RunDirectory(path, _lock(path))
    except OSError as error:
        raise MegaloopError(f"run directory {path}: cannot be used ({error.strerror or error})") from None
    with directory:
        yield


def is_held(path: Path) -> bool:
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


def _lock(path: Path) -> int | None:
    """Take the directory's lock, and write into it who holds it."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _flock(descriptor)
    except BlockingIOError:
        holder = _holder(os.pread(descriptor, 4096, 0))
        os.close(descriptor)
        raise MegaloopError(
            f"run directory {path} is in use by a live run ({holder}); wait for it, stop it, or choose another run_dir"
        ) from None
    except OSError as error:
        os.close(descriptor)
        if error.errno in _NO_LOCKS:
            return None
        raise
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n", 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


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
    try:
        who = json.loads(text)
        return f"host {who['host']}, process {who['pid']}"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock
        return "it has not said which"


def _close_in_children(directory: RunDirectory) -> None:
    """A forked child shares the lock with its parent: were it to outlive rank 0, it would block the next run."""
    reference = weakref.ref(directory)

    def close() -> None:
        held = reference()
        if held is not None and held._lock is not None:
            os.close(held._lock)
            held._lock = None

    os.register_at_fork(after_in_child=close)


def last_records(run: Path, count: int) -> list[dict[str, Any]]:
    """The last ``count`` records of a run's metrics, oldest first."""
    return [record for _, record in deque(_records(run / METRICS), maxlen=count) if record is not None]


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a metrics file, each with its record, or None where it is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            yield line if line.endswith(b"\n") else line + b"\n", _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is never seen half-written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
