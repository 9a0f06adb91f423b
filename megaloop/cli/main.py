"""The ``megaloop`` command.

Each command imports what it needs when it runs, so that ``--help`` answers at once. One place turns errors into
exit codes: :func:`main`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOTDIR, EPERM, EROFS
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer import TyperException
from typer.core import TyperGroup

from launchers.rank import follow_launcher, report_error
from launchers.slurm_rank import join_slurm
from megaloop import __version__
from megaloop.cli import checkpoints, cluster, data, evaluation, report, runs, train
from megaloop.cli.bench import bench
from megaloop.cli.diagnose import diagnose
from megaloop.cli.generate import generate
from megaloop.cli.output import echo
from megaloop.cli.ranks import leave, print_rank_error
from megaloop.errors import MegaloopError
from megaloop.text import message_line, quoted

__all__ = ["app", "main"]

_DEBUG = "MEGALOOP_DEBUG"

_NAMED = (ENAMETOOLONG, ENOTDIR, EISDIR, EACCES, EPERM, EROFS, ELOOP)
"""What is wrong with a path whoever starts the command again with the same one."""


class _Commands(TyperGroup):
    """All commands; what every one of them does with errors is here."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _one_kind_of_error():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _one_kind_of_error():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_kind_of_error() -> Iterator[None]:
    """Shorten what wrong usage repeats, and make paths that cannot be one the errors of a user that they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NAMED or not error.filename:
            raise
        raise MegaloopError(f"{error.filename}: {error.strerror}") from error
    except TyperException as error:
        error.message = message_line(error.message, 600)
        raise


app = typer.Typer(
    name="megaloop",
    cls=_Commands,
    help="Distributed pretraining of language models whose depth changes while they train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")

_COMMANDS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("prep", data.prep),
    ("synthesize", data.synthesize),
    ("train", train.train),
    ("plan", train.plan),
    ("status", cluster.status),
    ("doctor", runs.doctor),
    ("checkpoints", runs.checkpoints),
    ("grow", checkpoints.grow),
    ("loop", checkpoints.loop),
    ("export", checkpoints.export),
    ("import", checkpoints.import_),
    ("init-config", checkpoints.init_config),
    ("generate", generate),
    ("eval", evaluation.evaluate_command),
    ("export-tasks", evaluation.export_tasks),
    ("diagnose", diagnose),
    ("report", report.report),
    ("submit", cluster.submit),
    ("cancel", cluster.cancel),
)
"""All commands, in the order in which ``--help`` lists them."""
for _name, _command in _COMMANDS:
    app.command(_name)(_command)


def main() -> None:
    """Run the command line; every way out has its exit code.

    0 done · 1 a bug or a rank that died · 2 an error the user can fix, or wrong usage · 75 a signal ended the run, which
    has saved and wants to be continued · 130 Ctrl-C, after which a run has saved as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names that are no UTF-8, and what a terminal of another encoding lacks
            stream.reconfigure(errors="backslashreplace")
    follow_launcher()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if len(arguments) < len(sys.argv) - 1:  # wherever it stands; ranks inherit it
        os.environ[_DEBUG] = "1"
    try:
        join_slurm()
        for argument in arguments:
            _check_encoding(argument)
        app(arguments, prog_name="megaloop")
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 0)
    except KeyboardInterrupt:  # before a command had begun
        leave(130)
    except MegaloopError as error:
        if os.environ.get(_DEBUG):
            raise
        if not report_error(str(error)):
            print_rank_error(str(error))
        leave(2)


def _check_encoding(argument: str) -> None:
    """Refuse bytes that are no text: neither a configuration nor a checkpoint nor a tokenizer can hold them."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise MegaloopError(f"argument {quoted(argument)} is not UTF-8; write it so, or rename what it names") from None


def _show_version(value: bool) -> None:
    if value:
        echo(f"megaloop {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors (anywhere on the line).")] = False,
) -> None:
    pass
