"""Progress of a pass over input files."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.sources import Inputs

__all__ = ["PassProgress"]


class PassProgress:
    """A progress bar over the input files by size on a terminal; one plain line per pass elsewhere."""

    def __init__(self, console: Console | None, what: str, documents: Inputs):
        self._ends = np.cumsum([0, *(file.stat().st_size for file in documents.files)])
        self._documents = documents
        self._bar: Progress | None = None
        self._console, self._what = console, what
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]:,} documents"),
                TimeRemainingColumn(),
                console=console,
            )
        self._count = 0

    def __enter__(self) -> Any:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=float(self._ends[-1]), count=0)
        return self._advance

    def _advance(self, number: int) -> None:
        self._count += 1
        if self._bar is not None and self._count % 16 == 0:
            self._bar.update(self._task, completed=float(self._ends[number]), count=self._count)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.update(self._task, completed=float(self._ends[-1]), count=self._count)
            self._bar.stop()
        elif self._console is not None and kind is None:
            self._console.print(f"{self._what}: {self._count:,} documents", highlight=False)
