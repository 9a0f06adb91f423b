"""``python waiting_rank.py -m megaloop ...``: a rank that, in the first start of its job, waits after some steps for a signal.

So a test can interrupt a run in its middle, however fast the machine is, and need not train for as long as Slurm takes to
look at time limits. Everything else is ``python -m megaloop ...``: as there, only the standard library is imported before
the rank listens to signals.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

from launchers.rank import RESTARTS
from megaloop.train import signals

STEPS = 12
"""After which it waits; the loop looks for a signal once before its first step and once after each."""


class _Waiting(signals.StopSignals):
    """``number`` is not there until a signal has come."""

    def __init__(self) -> None:
        self._looks, self._number = 0, 0
        super().__init__()

    @property
    def number(self) -> int:
        if threading.current_thread() is threading.main_thread():
            self._looks += 1
            while self._looks > STEPS and not self._number:
                time.sleep(0.02)
        return self._number

    @number.setter
    def number(self, value: int) -> None:
        self._number = value


if __name__ == "__main__":
    if os.environ[RESTARTS] == "0":
        signals.StopSignals = _Waiting  # type: ignore[misc]
    sys.argv = ["megaloop", *sys.argv[3:]]
    runpy.run_module("megaloop", run_name="__main__", alter_sys=True)
