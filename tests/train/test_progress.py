from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from megaloop.runs.metrics import StepRecord
from megaloop.train.progress import ProgressReporter
from tests.runs.test_metrics import RECORD

GPU = replace(
    RECORD, loss=3.1234, tokens_per_second=512_345.0, tflops=412.3, mfu=0.417, memory_bytes=130 << 30, seconds=2.0
)


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def log(total: int, every: int, steps: list[StepRecord], *, start: int = 0, seconds: float = 2.0) -> list[str]:
    """The lines that a log file gets."""
    clock = Clock()
    console = Console(file=io.StringIO(), width=80)
    with ProgressReporter(total, start, every, console, clock=clock) as progress:
        for record in steps:
            clock.now += seconds
            progress.step(record)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def terminal_line(width: int, record: StepRecord, total: int = 50_000) -> str:
    """What stands on a terminal's last line after a step."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False)
    with ProgressReporter(total, record.step - 1, 10, console, clock=Clock()) as progress:
        progress.step(record)
    assert isinstance(console.file, io.StringIO)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line][-1]


def test_a_log_file_gets_plain_lines_at_the_interval() -> None:
    lines = log(25, 10, [replace(GPU, step=step) for step in range(1, 26)])
    assert [line.split("  ")[0] for line in lines] == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]
    assert lines[1] == (
        "step 10/25  loss 3.1234  lr 1.00e-03  grad 0.500  512k tokens/s  412 TFLOP/s  MFU 41.7%  130 GiB  0:30 left"
    )
    assert lines[-1].endswith("took 0:50")
    assert not any("\x1b" in line for line in lines)


def test_a_resumed_run_begins_where_it_was() -> None:
    lines = log(30, 10, [replace(GPU, step=step) for step in range(13, 21)], start=12)
    assert [line.split("  ")[0] for line in lines] == ["step 13/30", "step 20/30"]
    assert lines[-1].endswith("0:20 left")


def test_speed_is_an_average_without_the_first_step() -> None:
    slow = replace(GPU, step=1, tokens_per_second=1000.0, tflops=1.0, mfu=0.01)
    fast = [replace(GPU, step=2, tokens_per_second=100_000.0, tflops=100.0, mfu=0.4),
            replace(GPU, step=3, tokens_per_second=300_000.0, tflops=300.0, mfu=1.2)]  # fmt: skip
    assert "150k tokens/s  150 TFLOP/s  MFU 60.0%" in log(9, 1, [slow, *fast])[-1]


def test_unknown_values_are_left_out() -> None:
    line = log(9, 1, [replace(RECORD, grad_norm=None, tokens_per_second=None, tflops=None, memory_bytes=None)])[0]
    assert line == "step 1/9  loss 3.5000  lr 1.00e-03  0:03 left"


def test_a_loss_that_is_not_a_number_is_shown_as_such() -> None:
    assert "loss nan" in log(9, 1, [replace(GPU, loss=float("nan"))])[0]


@pytest.mark.parametrize("width", range(20, 200, 7))
@pytest.mark.parametrize("record", [RECORD, GPU, replace(GPU, step=49_000), replace(GPU, step=50_000)])
def test_the_live_line_never_wraps(width: int, record: StepRecord) -> None:
    line = terminal_line(width, record)
    assert len(line) <= width
    assert line.startswith(f"{record.step}/50000")


def test_eighty_columns_show_everything_and_wider_ones_a_bar() -> None:
    at_80 = terminal_line(80, replace(GPU, step=1200))
    assert at_80.rstrip() == "1200/50000  loss 3.1234  512k tok/s  412 TFLOP/s  MFU 42%  130 GiB  27h 06m left"
    assert "━" * 12 + "─" * 18 in terminal_line(120, replace(GPU, step=20_000))


def test_a_narrow_terminal_keeps_step_loss_and_time_left() -> None:
    record = replace(GPU, step=1200)
    assert terminal_line(52, record).rstrip() == "1200/50000  loss 3.1234  512k tok/s  27h 06m left"
    assert terminal_line(40, record).rstrip() == "1200/50000  loss 3.1234  27h 06m left"


def test_reports_stand_above_the_live_line_and_in_the_log_file() -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
        with ProgressReporter(100, 0, 10, console) as progress:
            progress.message("resumed [from] step 20")
        assert isinstance(console.file, io.StringIO)
        assert "resumed [from] step 20" in console.file.getvalue()


def test_a_long_message_is_not_broken_in_a_log_file() -> None:
    console = Console(file=io.StringIO(), width=80)
    with ProgressReporter(100, 0, 10, console) as progress:
        progress.message("x " * 200)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("\n") == 1
