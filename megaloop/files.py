"""Files that are whole and on disk: what is written in place, and what is given its name only once it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

__all__ = ["fsync_file", "fsync_path", "replace_file", "replacing"]


def fsync_file(file: IO[Any]) -> None:
    """Have on disk what was written to an open file; OSError where that fails."""
    file.flush()
    os.fsync(file.fileno())


def fsync_path(path: Path) -> None:
    """Have a file's content, or a directory's entries, on disk; OSError where that fails."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name ``path`` where the block ends well, and is gone where it does not.

    It is written under a hidden name beside it and synced before it is renamed, so nobody ever sees half of it; what had the name
    before is there until then. The rename itself is on disk once the directory is synced (:func:`fsync_path`).

    Raises:
        OSError: it cannot be written; what had the name is as it was.
    """
    temporary = path.parent / f".{path.name}.tmp"  # with_name would not take a path such as "."
    try:
        with temporary.open("wb") as file:
            yield file
            fsync_file(file)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is never seen half-written; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(data)
