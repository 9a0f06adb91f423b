"""How long a rank computes in a step, as opposed to waiting for others."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up the time within ``with``; on a GPU, that of its work, which is under way when the Python code is done.

    Args:
        device: the rank's.
    """

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._seconds = 0.0
        self._began = 0.0
        self._events: list[Any] = []

    def reset(self) -> None:
        """Begin anew."""
        self._seconds = 0.0
        self._events.clear()

    @property
    def seconds(self) -> float:
        """Since :meth:`reset`; waits for the GPU."""
        if not self._gpu:
            return self._seconds
        torch.cuda.synchronize()
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000

    def __enter__(self) -> None:
        if self._gpu:
            self._mark()
        else:
            self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._gpu:
            self._mark()
        else:
            self._seconds += time.perf_counter() - self._began

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
