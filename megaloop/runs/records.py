"""Files of JSON objects, a line each (metrics, events, ranks, jobs, evaluations): the one reader, and a run's writer.

Such a file may end in an incomplete line, and somebody may have edited it: a line that is no object of JSON is skipped,
and whoever takes a value from a record asks for its type (:func:`number`, :func:`whole_number`, :func:`text`).
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megaloop.errors import MegaloopError
from megaloop.files import fsync_file

__all__ = [
    "JsonLines",
    "append_record",
    "check_appendable",
    "is_at",
    "is_finite",
    "number",
    "parse_record",
    "read_lines",
    "read_records",
    "text",
    "timestamp",
    "whole_number",
]

_LARGEST = 10**30
"""No count of steps, tokens, bytes or FLOPs is as large."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, an integer of thousands of digits; nested too deep
        return None
    return value if isinstance(value, dict) else None


def append_record(path: Path, record: dict[str, Any], command: str) -> None:
    """Add a line, in one write: several processes may write to a file at a time.

    Args:
        command: that an error names.

    Raises:
        MegaloopError: it cannot be written.
    """
    line = json.dumps(record).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell() and not _ends_a_line(path):
                line = b"\n" + line  # after a line that was cut off
            file.write(line)
            fsync_file(file)
    except OSError as error:
        raise MegaloopError(f"{command}: cannot write {path} ({error.strerror})") from None


def check_appendable(path: Path, command: str) -> None:
    """Raise MegaloopError where :func:`append_record` could not write, before hours of work are done for it. No file is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise MegaloopError(
            f"{command}: cannot write {path} ({error.strerror}); name another file with --out"
        ) from None


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file, each with a line end and with its record, or None where it is none.

    A file that is not there has no lines.

    Raises:
        MegaloopError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                yield line if line.endswith(b"\n") else line + b"\n", parse_record(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise MegaloopError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; lines that are none are skipped. Raises as :func:`read_lines` does."""
    return (record for _, record in read_lines(path) if record is not None)


def number(record: dict[str, Any], key: str) -> float | None:
    """A finite number of a record; None where it has none under this key."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return None
    return float(value) if math.isfinite(value) else None


def whole_number(record: dict[str, Any], key: str) -> int | None:
    """A whole number from 0 on of a record (a step, tokens, bytes); None where it has none under this key."""
    value = record.get(key)
    return value if type(value) is int and 0 <= value < _LARGEST else None


def text(record: dict[str, Any], key: str) -> str | None:
    """A text of a record; None where it has none under this key."""
    value = record.get(key)
    return value if isinstance(value, str) else None


# --- writing ---


class JsonLines:
    """A file of one JSON object per line, appended to line by line; every line is whole and written at once.

    Lines that find no room on the disk wait in memory, and are written, in order, before the next that finds some.

    Raises:
        MegaloopError: the file cannot be written; what it held is left as it was.
    """

    def __init__(self, path: Path):
        self.path = path
        self._waiting: deque[bytes] = deque()
        try:
            self._file = path.open("ab", buffering=0)
            _drop_torn_line(path)
        except OSError as error:
            raise _cannot_write(path, error) from None

    @property
    def waiting(self) -> int:
        """How many lines wait for room on the disk."""
        return len(self._waiting)

    @property
    def lost(self) -> bool:
        """Whether the file was deleted, moved or replaced: what is appended would never be seen again."""
        return not is_at(self.path, self._file.fileno())

    def append(self, value: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(value, allow_nan=False).encode() + b"\n")
        try:
            self._write_waiting()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise _cannot_write(self.path, error) from None

    def _write_waiting(self) -> None:
        while self._waiting:
            line, size, written = self._waiting[0], os.fstat(self._file.fileno()).st_size, 0
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                os.ftruncate(self._file.fileno(), size)
                raise
            self._waiting.popleft()

    def close(self) -> None:
        """Write what waits, and close the file."""
        try:
            self._write_waiting()
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        finally:
            self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line without an end: the process that wrote it was killed in between."""
    with path.open("r+b") as file:
        position = file.seek(0, os.SEEK_END)
        tail = b""
        while position > 0 and b"\n" not in tail:
            start = max(0, position - 65536)
            file.seek(start)
            tail = file.read(position - start)
            position = start
        file.truncate(position + tail.rfind(b"\n") + 1)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file; where the file system fails to answer, nothing speaks against it."""
    try:
        there, own = path.stat(), os.fstat(descriptor)
    except OSError as error:
        return error.errno not in _NOT_THERE
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def is_finite(value: Any) -> bool:
    """JSON can hold it, as far as numbers go: it is neither NaN nor infinite."""
    return not isinstance(value, float) or math.isfinite(value)


def timestamp() -> str:
    """Now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _cannot_write(path: Path, error: OSError) -> MegaloopError:
    return MegaloopError(
        f"{path}: cannot be written ({error.strerror or error}); "
        "make room or fix the permissions, then go on with --resume"
    )
