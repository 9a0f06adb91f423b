"""Commands that look at a run's directory, live or not: what is there, whether it is whole, what happened."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from megaloop.cli.output import echo
from megaloop.errors import DamagedCheckpoint, MegaloopError
from megaloop.layout.topology import Topology
from megaloop.terminal import DescriptionColumn, SafeConsole
from megaloop.text import printable

__all__ = ["checkpoints", "doctor", "show_local_status"]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, for example runs/demo.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


@dataclass(frozen=True)
class _Row:
    """One checkpoint; what its manifest would say is None where that cannot be read."""

    name: str
    state: str
    step: int
    bytes: int | None = None
    created: str | None = None
    depth: str | None = None
    topology: Topology | None = None
    precision: str | None = None
    problem: str | None = None


def checkpoints(
    run: Run,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare the checksums.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete what checkpoint.keep and keep_every of the run do not keep.")
    ] = False,
    keep: Annotated[int | None, typer.Option(min=1, help="With --prune: how many of the newest stay.")] = None,
    json: Json = False,
) -> None:
    """List a run's checkpoints; verify them, or delete the older ones. Exit code 2 if one is damaged."""
    from megaloop.checkpoint import list_checkpoints, list_damaged, list_incomplete

    if keep is not None and not prune:
        raise MegaloopError("--keep says how many --prune leaves; add --prune")
    directory = run / "checkpoints"
    if not directory.is_dir():
        raise MegaloopError(f"{run}: no run with checkpoints; expected a directory with checkpoints/ in it")
    gone = _prune(run, keep) if prune else []
    rows = [_describe(path, verify) for path in list_checkpoints(directory)]
    rows += [_Row(path.name, "no manifest", _step(path)) for path in list_incomplete(directory)]
    rows += [_Row(path.name, "quarantined", _step(path)) for path in list_damaged(directory)]
    rows.sort(key=lambda row: row.step)
    if json:
        values = {"checkpoints": [asdict(row) for row in rows], "deleted": [path.name for path in gone]}
        echo(json_format.dumps(values, indent=2))
    else:
        _show(run, rows, gone)
    if any(row.state == "damaged" for row in rows):
        raise typer.Exit(2)


def doctor(run: Run, json: Json = False) -> None:
    """Say what happened to a run: restarts, lost steps, slow ranks, skipped steps, disk, stages, gaps. It may be running."""
    from megaloop.runs.doctor import examine

    found = examine(run)
    if json:
        echo(json_format.dumps(asdict(found), indent=2))
        return
    console = SafeConsole()
    console.print(f"{printable(run, 1000)}: {found.state}, {found.steps} steps", soft_wrap=True, style="bold")
    styles = {"good": "green", "note": "default", "warning": "bold red"}
    width = max((len(finding.topic) for finding in found.findings), default=0)
    for finding in sorted(found.findings, key=lambda finding: ("warning", "note", "good").index(finding.level)):
        line = Text.assemble(
            (f"  {finding.level:<8}", styles[finding.level]), f"{finding.topic:<{width}}  {finding.text}"
        )
        console.print(line, soft_wrap=True)
    if not any(finding.level == "warning" for finding in found.findings):
        console.print("  nothing to worry about")


def show_local_status(run: Path, json: bool) -> None:
    """What ``megaloop status`` says of a run that no cluster knows."""
    from megaloop.runs.status import local_status

    found = local_status(run)
    if json:
        echo(json_format.dumps(asdict(found), indent=2))
        return
    console = SafeConsole(soft_wrap=True)
    state = f"{found.state} ({found.holder})" if found.holder else found.state
    of = f" of {found.steps}" if found.steps is not None else ""
    loss = f", loss {found.loss:.4f}" if found.loss is not None else ""
    left = f", {found.seconds_left / 3600:.1f} h of training left" if found.seconds_left else ""
    console.print(f"{printable(found.run, 1000)}: {state}, step {found.step}{of}{loss}{left}", style="bold")
    console.print(f"last checkpoint {found.last_checkpoint or 'none'}, restarts {found.restarts}")
    if found.state == "finished":
        console.print("nothing is left to train; more train.steps go on from here")
    if found.go_on:
        console.print(f"go on with: {found.go_on}")


def _step(path: Path) -> int:
    from megaloop.checkpoint import step_of

    return step_of(path)


def _prune(run: Path, keep: int | None) -> list[Path]:
    """Delete what the run's own configuration does not keep; not while it is running, as it does so itself.

    The newest checkpoint is read first: where it is damaged, an older one may be all that a resume could go on from.
    """
    from megaloop.checkpoint import list_checkpoints, prune
    from megaloop.config import load_config
    from megaloop.runs.directory import CONFIG, lock

    with lock(run):
        policy = load_config(run / CONFIG, []).checkpoint
        for newest in list_checkpoints(run / "checkpoints")[-1:]:
            row = _describe(newest, verify=True)
            if row.problem is not None:
                raise MegaloopError(
                    f"{printable(run, 1000)}: the newest checkpoint, {newest.name}, is damaged ({row.problem}), so nothing was deleted; "
                    "see which are complete with --verify; --resume goes on from the newest of them"
                )
        return prune(run / "checkpoints", keep or policy.keep, policy.keep_every)


def _describe(path: Path, verify: bool) -> _Row:
    from megaloop.checkpoint import Checkpoint

    try:
        with Checkpoint.open(path) as checkpoint, _bar(path.name, verify) as show:
            if verify:
                checkpoint.verify(show)
            manifest = checkpoint.manifest
            return _Row(
                name=path.name,
                state="whole" if verify else "complete",
                step=manifest.step,
                bytes=sum(entry.bytes for entry in manifest.files),
                created=manifest.created,
                depth=manifest.plan.notation,
                topology=manifest.topology,
                precision=manifest.precision,
            )
    except DamagedCheckpoint as error:
        reason = str(error).removeprefix(f"checkpoint {path}: ").removesuffix("; use another checkpoint")
        return _Row(path.name, "damaged", _step(path), problem=reason)


class _bar:
    """A progress bar on stderr, where that is a terminal and there is something to wait for."""

    def __init__(self, what: str, wanted: bool):
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        columns = (DescriptionColumn(), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
        hidden = not (wanted and sys.stderr.isatty())
        self._progress = Progress(*columns, console=SafeConsole(stderr=True), disable=hidden, transient=True)
        self._task = self._progress.add_task(f"reading {what}")

    def __enter__(self) -> Callable[[int, int], None]:
        self._progress.start()
        return lambda done, total: self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()


def _show(run: Path, rows: list[_Row], gone: list[Path]) -> None:
    from megaloop.text import format_bytes

    console = SafeConsole()
    for path in gone:
        console.print(f"deleted {path.name}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for header in ("step", "state", "size", "depth", "pp x tp x dp", "precision", "saved (UTC)"):
        table.add_column(header, justify="right" if header in ("step", "size") else "left", no_wrap=header != "depth")
    for row in rows:
        topology = f"{row.topology.pp} x {row.topology.tp} x {row.topology.dp}" if row.topology else ""
        size = "" if row.bytes is None else format_bytes(row.bytes)
        table.add_row(
            str(row.step),
            row.state,
            size,
            printable(row.depth or ""),
            topology,
            printable(row.precision or ""),
            printable((row.created or "").removesuffix("+00:00")),
        )
    if rows:
        console.print(table)
    else:
        console.print(f"{printable(run, 1000)} has no checkpoints yet", soft_wrap=True)
    for row in rows:
        if row.problem:
            console.print(f"{row.name}: {printable(row.problem, 1000)}", soft_wrap=True, style="bold red")
