"""Ranks that commands start, and what a rank does before and after."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import typer

from launchers.rank import open_store
from launchers.slurm_rank import record_exit
from megaloop.cli.output import print_error

__all__ = ["launch_ranks", "leave", "print_rank_error", "rank_store"]


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
