"""What a person sees of a run: one live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from megaloop.runs.metrics import StepRecord
from megaloop.text import format_bytes, significant

__all__ = ["ProgressReporter"]

_WINDOW = 32
"""Steps over which speed is averaged."""
_BAR = (8, 30)
"""Narrowest and widest bar, columns."""


class ProgressReporter:
    """Shows steps and messages on rank 0's console.

    On a terminal one line lives at the bottom and everything else scrolls above it; elsewhere each report is a
    plain line, and steps are reported at the first, at multiples of ``every`` and at the last.
    Speeds are averages over the last 32 steps; time left counts everything that happened in them,
    validation and saving too.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps already done.
        every: steps between plain lines.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        every: int,
        console: Console,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._every = every
        self._console = console
        self._first = start_step + 1
        self._speed = _Speed(total_steps, start_step, clock)
        self._live: Live | None = None
        if console.is_interactive:
            line = _LiveLine(self._speed)
            self._live = Live(line, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, record: StepRecord) -> None:
        """Report an optimizer step, just done."""
        self._speed.add(record)
        if self._live is not None:
            return
        if record.step in (self._first, self._speed.total_steps) or record.step % self._every == 0:
            self._print(_plain_line(self._speed, record))

    def message(self, text: str) -> None:
        """Report anything else, in a line."""
        self._print(text)

    def _print(self, text: str) -> None:
        # what is printed goes above a live line; a log file's lines are never wrapped
        self._console.print(Text(text), soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class _Rates:
    """Averages over the window; None where not known."""

    tokens_per_second: float | None
    tflops: float | None
    mfu: float | None
    seconds_left: float | None


class _Speed:
    """The last steps' records, with the times at which they came."""

    def __init__(self, total_steps: int, start_step: int, clock: Callable[[], float]):
        self.total_steps = total_steps
        self.start_step = start_step
        self._clock = clock
        self._begin = clock()
        self._records: deque[tuple[float, StepRecord]] = deque(maxlen=_WINDOW + 1)

    @property
    def last(self) -> StepRecord | None:
        return self._records[-1][1] if self._records else None

    def add(self, record: StepRecord) -> None:
        self._records.append((self._clock(), record))

    def rates(self) -> _Rates:
        last = self.last
        if last is None:
            return _Rates(None, None, None, None)
        # the oldest marks where the window begins; so the first step, which compiles and warms up, soon drops out
        records = list(self._records)[1:] or [self._records[0]]
        speeds = [record.tokens_per_second for _, record in records if record.tokens_per_second]
        if not speeds or not last.tokens_per_second:
            return _Rates(None, last.tflops, last.mfu, self._seconds_left(last))
        # equal tokens per step: the average speed is the harmonic mean
        speed = len(speeds) / sum(1.0 / value for value in speeds)
        ratio = speed / last.tokens_per_second
        tflops = last.tflops * ratio if last.tflops is not None else None
        mfu = last.mfu * ratio if last.mfu is not None else None
        return _Rates(speed, tflops, mfu, self._seconds_left(last))

    def time_text(self, rates: _Rates) -> str:
        """The time left, or the time it took once the last step is done."""
        if self.last is not None and self.last.step >= self.total_steps:
            return f"took {_duration(self._records[-1][0] - self._begin)}"
        return f"{_duration(rates.seconds_left)} left" if rates.seconds_left is not None else ""

    def _seconds_left(self, last: StepRecord) -> float | None:
        begin_at, first = self._records[0]
        end_at, _ = self._records[-1]
        steps_left = self.total_steps - last.step
        if len(self._records) > 1 and last.step > first.step:
            per_step: float | None = (end_at - begin_at) / (last.step - first.step)
        else:
            per_step = last.seconds
        if per_step is None:
            return None
        return max(0.0, per_step * steps_left - (self._clock() - end_at))


class _LiveLine:
    """The line on a terminal: as much as fits the width, never more than one row."""

    def __init__(self, speed: _Speed):
        self._speed = speed

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text(options.max_width, "#-" if options.ascii_only else "━─")

    def text(self, width: int, bar: str) -> Text:
        speed = self._speed
        last = speed.last
        done = last.step if last else speed.start_step
        step = (f"{done}/{speed.total_steps}", "bold")
        if last is None:
            parts = [step, ("waiting for the first step", "dim")]
        else:
            rates = speed.rates()
            # in the order in which they stand; the number says which goes first where the line is too narrow
            columns = [
                (0, step),
                (1, (f"loss {last.loss:.4f}", "green")),
                (3, (f"{_si(rates.tokens_per_second)} tok/s" if rates.tokens_per_second else "", "cyan")),
                (5, (f"{significant(rates.tflops)} TFLOP/s" if rates.tflops is not None else "", "cyan")),
                (4, (f"MFU {rates.mfu:.0%}" if rates.mfu is not None else "", "cyan")),
                (6, (format_bytes(last.memory_bytes) if last.memory_bytes is not None else "", "magenta")),
                (2, (speed.time_text(rates), "yellow")),
            ]
            columns = [column for column in columns if column[1][0]]
            while len(columns) > 1 and _width([part for _, part in columns]) > width:
                columns.remove(max(columns, key=lambda column: column[0]))
            parts = [part for _, part in columns]
        spare = min(width - _width(parts) - 2, _BAR[1])
        if spare >= _BAR[0]:
            full = int(spare * done / speed.total_steps)
            parts[1:1] = [(bar[0] * full + bar[1] * (spare - full), "blue")]
        line = Text("  ", end="").join(Text(*part) for part in parts)
        line.no_wrap = True
        line.truncate(width)
        return line


def _plain_line(speed: _Speed, record: StepRecord) -> str:
    rates = speed.rates()
    parts = [
        f"step {record.step}/{speed.total_steps}",
        f"loss {record.loss:.4f}",
        f"lr {record.lr:.2e}",
        f"grad {record.grad_norm:.3f}" if record.grad_norm is not None else "",
        f"{_si(rates.tokens_per_second)} tokens/s" if rates.tokens_per_second else "",
        f"{significant(rates.tflops)} TFLOP/s" if rates.tflops is not None else "",
        f"MFU {rates.mfu:.1%}" if rates.mfu is not None else "",
        format_bytes(record.memory_bytes) if record.memory_bytes is not None else "",
        speed.time_text(rates),
    ]
    return "  ".join(filter(None, parts))


def _width(parts: list[tuple[str, str]]) -> int:
    return sum(len(text) for text, _ in parts) + 2 * (len(parts) - 1)


def _si(value: float) -> str:
    """Three significant digits with k or M: 12.3k."""
    for factor, suffix in ((1.0, ""), (1e3, "k"), (1e6, "M")):
        if value < 999.5 * factor:
            return significant(value / factor) + suffix
    return significant(value / 1e9) + "G"


def _duration(seconds: float) -> str:
    """4:05, 1:04:05, 27h 04m, 5d 03h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24:02}h"
    if hours >= 10:
        return f"{hours}h {minutes:02}m"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
