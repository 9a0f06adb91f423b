"""How the commands print."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.text import Text

from megaloop.terminal import DescriptionColumn, SafeConsole
from megaloop.text import message_line, safe_lines

__all__ = ["byte_progress", "count_progress", "echo", "print_error", "show_result"]


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text of one line or several, control characters as escapes."""
    typer.echo(safe_lines(text), err=err, nl=nl)


def print_error(message: str, label: str = "error: ") -> None:
    """Print an error on one line of stderr, in less than 2,000 characters."""
    sys.stdout.flush()
    line = Text.assemble((label, "bold red"), message_line(message))
    SafeConsole(stderr=True).print(line, soft_wrap=True)


def show_result(result: Any, as_json: bool) -> None:
    """Print what a command made: as JSON, or as a list of its values."""
    values = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result  # type: ignore[arg-type]
    if hasattr(result, "model_dump"):
        values = result.model_dump(mode="json")
    if as_json:
        echo(json.dumps(values, default=str))
        return
    if not isinstance(values, dict):
        echo(str(values))
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        echo(f"{key.replace('_', ' '):{width}}  {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(_text, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(element)}" for key, element in value.items())
    if value is None:
        return "-"
    return _number(value) if isinstance(value, int | float) else str(value)


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


@contextlib.contextmanager
def count_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal: call it with how many are done."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = (DescriptionColumn(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=SafeConsole(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextlib.contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, where that is a terminal: call it with what is done, bytes done and bytes in all."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (DescriptionColumn(), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    with Progress(*columns, console=SafeConsole(stderr=True), disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield show
