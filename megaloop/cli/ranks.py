"""Ranks that commands start, and what a rank does before and after."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from launchers.rank import launched, open_store, started_by_launcher
from launchers.slurm_rank import record_exit
from megaloop.cli.output import echo, print_error
from megaloop.terminal import DescriptionColumn, SafeConsole

if TYPE_CHECKING:
    from megaloop.runtime.share import OnPart

__all__ = [
    "is_first_rank",
    "joined_ranks",
    "launch_again",
    "launch_ranks",
    "leave",
    "part_progress",
    "print_rank_error",
    "rank_store",
]


def leave(code: int) -> NoReturn:
    """End this process; at once where torch is in it.

    While Python shuts down, connections to ranks that are gone already would complain, and a thread of torch's that
    is still at work now and then makes the process abort (exit code 134, after everything had been done).
    """
    record_exit(code)
    if "torch" not in sys.modules:
        sys.exit(code)
    with contextlib.suppress(BrokenPipeError):  # whoever read the output has seen enough
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def print_rank_error(message: str) -> None:
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    print_error(message, "error: " if rank == "0" else f"error (rank {rank[:10]}): ")


def launch_ranks(command: Sequence[str], count: int, logs: Path) -> None:
    """Start local ranks and wait for them; where one fails, say so and leave with exit code 1."""
    from launchers import local

    try:
        local.launch(command, count, logs)
    except local.RankFailed as error:
        print_rank_error(str(error))
        raise typer.Exit(1) from None


@contextlib.contextmanager
def rank_store() -> Iterator[None]:
    """Hold the store through which the local launcher's ranks find each other, if one started this process."""
    store = open_store()
    try:
        yield
    finally:
        del store


def launch_again(ranks: int) -> None:
    """Start this command on that number of local ranks."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="megaloop-ranks-") as logs:
        launch_ranks([sys.executable, "-m", "megaloop", *sys.argv[1:]], ranks, Path(logs))


@contextlib.contextmanager
def joined_ranks() -> Iterator[None]:
    """Within it this process is one of the ranks, if a launcher started it."""
    store = open_store() if started_by_launcher() else None
    try:
        if launched():
            from megaloop.parallel.engine import join_ranks

            join_ranks()
        yield
    finally:
        del store


def is_first_rank() -> bool:
    """It speaks for all; so does a process that is no rank."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def part_progress() -> Iterator[OnPart]:
    """A bar for what is under way, on a terminal; a line for each thing that begins otherwise."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    begun: list[str] = []
    on_terminal = sys.stderr.isatty()
    columns = (DescriptionColumn(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = SafeConsole(stderr=True)
    with Progress(*columns, console=console, disable=not (on_terminal and is_first_rank()), transient=True) as bar:
        task = bar.add_task("loading the model", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)
            if not on_terminal and is_first_rank() and what not in begun:
                begun.append(what)
                echo(what, err=True)

        yield show
