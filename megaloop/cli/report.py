"""``megaloop report``: one page about runs."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from megaloop.cli.output import echo
from megaloop.terminal import SafeConsole

if TYPE_CHECKING:
    from megaloop.report.page import Report

__all__ = ["print_report", "report"]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: report.html, in the run if it is one.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Which the others are measured by; default: 'baseline', or the one of most FLOPs."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as one JSON object (and write the page only with --out).")
    ] = False,
) -> None:
    """Write one self-contained HTML page: losses, savings, reasoning by difficulty, primitives, loops at inference, differences, costs.

    Runs that differ only in name and seed count as one configuration.
    """
    from megaloop.report.page import make_report, write_report

    file = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if json and out is None:
        made, _ = make_report(runs, baseline=baseline, title=title, lr_sweep=_bench_of(runs))
    else:
        made = write_report(runs, file, baseline=baseline, title=title, lr_sweep=_bench_of(runs))
    print_report(made, None if json and out is None else file, json)


def _bench_of(runs: list[Path]) -> Path | None:
    """The directory of the ``bench savings`` whose runs these are: DIR of DIR/runs/NAME; None where they are of no single one."""
    folders = {run.resolve().parent for run in runs}
    folder = folders.pop()
    return folder.parent if not folders and folder.name == "runs" else None


def print_report(made: Report, file: Path | None, as_json: bool) -> None:
    """The numbers of a report, in short, and where the page is."""
    if as_json:
        echo(json_module.dumps({**dataclasses.asdict(made), "page": str(file) if file else None}))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    loss, deviation = ("val_loss", "val_loss_deviation")
    if made.compared_by == "bits per byte":
        loss, deviation = ("bits_per_byte", "bits_per_byte_deviation")
    for name in (
        "",
        "seeds",
        "FLOPs",
        f"of {made.baseline}'s",
        "validation loss" if loss == "val_loss" else "bits per byte",
        "difference",
        "to its loss",
        "primitives",
    ):
        table.add_column(Text(name), justify="right" if name else "left", no_wrap=True)
    means = {primitive["group"]: primitive["accuracy"] for primitive in made.primitives if primitive["task"] == "mean"}
    for row in made.savings:
        mean = means.get(row["group"])
        table.add_row(
            Text(row["group"]),
            str(row["seeds"]),
            _or_dash(row["flops"], "{:.3g}"),
            _or_dash(row["fraction_of_baseline"], "{:.3f}"),
            _or_dash(row[loss], "{:.4f}") + _or_dash(row[deviation], " ± {:.4f}", ""),
            _or_dash(row["difference_percent"], "{:+.2f}%"),
            _or_dash(row["fraction_to_baseline_loss"], "{:.3f}"),
            "-" if mean is None else f"{100 * mean['value']:.1f}" + _or_dash(mean["error"], " ± {:.1f}%", "%", 100),
        )
    SafeConsole(width=None if sys.stdout.isatty() else 160).print(table)
    if loss != "val_loss":
        echo("validated on different data, or with other tokenizers: losses are compared in bits per byte of text")
    for claim in made.claims:
        effect = "" if claim["effect"] is None else f" ({100 * claim['effect']:+.1f} points)"
        echo(f"{claim['verdict']}: {claim['claim']}{effect}")
    if file is not None:
        echo(f"written {file}")


def _or_dash(value: float | None, form: str, otherwise: str = "-", factor: float = 1) -> str:
    return otherwise if value is None else form.format(factor * value)
