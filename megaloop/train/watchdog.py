"""Ends a rank that hangs, with its stacks on disk: whoever started the ranks can then start them again.

Nothing here needs the interpreter while it waits: the stacks are written by a thread of faulthandler's, in C, and the end is
the kernel's alarm. A rank that hangs in a collective, or with the interpreter's lock held, ends like any other.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from megaloop.runs.directory import STACKS

__all__ = ["Watchdog"]

_GRACE = 10.0
"""Seconds from the stacks to the end: ranks that hang together notice it one after another."""


class Watchdog:
    """Watches from ``with`` on; :meth:`feed` it whenever something has been done.

    Args:
        run: the run's directory; stacks go to ``stacks/rank-N.txt`` in it.
        limit: seconds between two meals; 0: nobody watches.
    """

    def __init__(self, run: Path, rank: int, limit: float):
        self._path, self._limit = run / STACKS / f"rank-{rank}.txt", limit
        self._file: int | None = None

    def __enter__(self) -> Self:
        if self._limit:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            try:
                self._path.parent.mkdir(exist_ok=True)
                # open from now on: when everything hangs, opening it may hang as well
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
                os.write(self._file, f"process {os.getpid()}, watched since {now}, limit {self._limit:g} s\n".encode())
            except OSError:  # a full disk is no reason not to watch: the log gets the stacks
                self._file = os.dup(2)
            self.feed()
        return self

    def feed(self) -> None:
        """Begin to wait anew."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._limit, file=self._file)
            signal.setitimer(signal.ITIMER_REAL, self._limit + _GRACE)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.close(self._file)
            self._file = None
