"""Signals that end a run early, Ctrl-C among them: the first asks for a checkpoint, the second leaves at once. See docs/RUNS.md.

Python runs its own signal handlers between two instructions of the main thread, which may sit in a collective for
minutes (or for ever, when another rank is gone). So a thread listens: the interpreter's C handler writes each signal's
number into a pipe as it arrives, and the thread reads them from there.

Only the standard library is imported here: a rank listens before anything slow.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

__all__ = ["STOP_SIGNALS", "StopSignals"]

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""Slurm's warning before a time limit (``--signal``), a preemption or ``scancel``, a terminal that was closed, Ctrl-C."""


class StopSignals:
    """Listens from ``with`` on; in the main thread only, as Python's handlers are.

    Attributes:
        number: the first signal that came; 0 as long as there was none.
        training: set it once there is something to save. Until then Ctrl-C leaves at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] = (-1, -1)
        self._wakeup = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)  # asked for by set_wakeup_fd
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        heard = [
            number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN
        ]  # nohup's stays ignored
        self._before = {number: signal.signal(number, _leave_it_to_the_thread) for number in heard}
        self._thread = threading.Thread(target=self._listen, name="megaloop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])
        if self._thread is not None:
            self._thread.join()
        os.close(self._pipe[0])

    def _listen(self) -> None:
        while received := os.read(self._pipe[0], 64):
            for number in received:
                if number not in STOP_SIGNALS:
                    continue
                first = os.environ.get("RANK", "0") == "0"
                if self.number:
                    _leave(number, f"second signal ({signal.Signals(number).name}): leaving without saving")
                if number == signal.SIGINT and not self.training:
                    _leave(number, "interrupted before the first step: there is nothing to save" if first else "")
                self.number = number
                if number == signal.SIGINT and first:
                    _say("Ctrl-C: the run saves after this step, then leaves; once more to leave at once")


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """A handler there has to be: without one the signal would have its default effect, which is the end."""


def _leave(number: int, line: str) -> NoReturn:
    """End the process, wherever its main thread is; a live progress line has hidden the cursor."""
    if line:
        _say(line)
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")
    os._exit(128 + number)


def _say(line: str) -> None:
    """Write to stderr without the interpreter's help; over a progress line, where there is one."""
    with contextlib.suppress(OSError):
        clear = "\r\x1b[2K" if os.isatty(2) else ""
        os.write(2, f"{clear}{line}\n".encode())
