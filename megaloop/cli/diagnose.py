"""``megaloop diagnose``: how models use their depth."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from launchers.rank import started_by_launcher
from megaloop.cli.evaluation import numbers
from megaloop.cli.options import Json
from megaloop.cli.output import echo
from megaloop.cli.ranks import is_first_rank, joined_ranks, launch_again, part_progress
from megaloop.errors import MegaloopError
from megaloop.terminal import SafeConsole
from megaloop.text import printable

if TYPE_CHECKING:
    from megaloop.analysis.results import DiagnosisRecord
    from megaloop.analysis.signatures import Signature

__all__ = ["diagnose"]


def diagnose(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="Checkpoints, runs (their latest), or Hugging Face directories of Llamas."),
    ],
    measures: Annotated[
        str | None,
        typer.Option(
            help="Names, separated by commas: contributions, effects, depth-score, lens, symmetry, loops, skip, swap, reverse, exit, repeat, "
            "tuned-lens (which is trained first), erasure and gradients (of one prompt each); default: all but the last three."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A data set (its held-out samples) or a jsonl file; default: the run's first data set."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts, at most.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text, at most; problems with targets stay complete.")] = 128,
    field: Annotated[str, typer.Option(help="Field of a jsonl line that has the text.")] = "text",
    tasks: Annotated[
        str | None,
        typer.Option(help="Primitives, as for 'megaloop eval': interventions are then scored by their accuracy too."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before each question of --tasks.")] = 5,
    examples: Annotated[int, typer.Option(min=1, help="Questions of each primitive.")] = 250,
    lens_steps: Annotated[int, typer.Option(min=1, help="Training steps of a tuned lens.")] = 200,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="N", help="Which prompts erasure and gradients are of: 2, or 1,3; again for more; default: the first."),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(min=1, help="Layers of a block: the period that is looked for, and what is repeated; default: the loop's, else that of growth, else 4."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the boundaries between skipped and measured positions, and of the questions of --tasks.")] = 123,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic.")] = "fp32",
    ranks: Annotated[int, typer.Option(min=1, help="Local ranks that share the prompts.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File of results, one JSON object a line; default: RUN/diagnosis.jsonl.")
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Which layers a model cannot do without, how far the last ones change its answer, whether its layers repeat a pattern.

    Results are remembered; 'megaloop report' shows those of several runs side by side.
    """
    attributed = numbers("--prompt", ",".join(prompt) if prompt else "1", 1)
    chosen, asked = _names("--measures", measures), _names("--tasks", tasks)
    if ranks > 1 and not started_by_launcher():
        launch_again(ranks)
        return
    with joined_ranks():
        from megaloop.analysis.diagnose import diagnose as measure
        from megaloop.analysis.request import PromptSource, Request, TaskSource

        request = Request(
            measures=chosen,
            prompts=PromptSource(prompts, count, tokens, field),
            tasks=TaskSource(asked or (), shots, examples),
            block=block,
            lens_steps=lens_steps,
            attributed=attributed,
            seed=seed,
            precision=precision,
            again=again,
            out=out,
        )
        with part_progress() as show:
            found = list(zip(models, measure(models, request, show), strict=True))
        if not is_first_rank():
            return
        if json:
            listed = [
                {"model": str(model), "records": [record.to_json() for record in records]} for model, records in found
            ]
            echo(json_module.dumps({"models": listed}))
        else:
            _print_signatures(found)


def _names(option: str, text: str | None) -> list[str] | None:
    """Those of a list; None: the option was not given. A list without a name, as an empty variable of the shell makes it, is a mistake."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise MegaloopError(f"{option}: names nothing; give names separated by commas, or leave the option out")
    return names


def _print_signatures(found: Sequence[tuple[Path, Sequence[DiagnosisRecord]]]) -> None:
    """A row for each signature, a column for each model."""
    tables = [(model, {row.name: row for row in records[-1].result.signatures}) for model, records in found]
    names = list(dict.fromkeys(name for _, rows in tables for name in rows))
    if not names:
        echo("these measures make no signature; add --json to see what they found", err=True)
        return
    asked = [records[-1].examination for _, records in found]
    sources = list(dict.fromkeys(f"{one.count} of {printable(one.prompts)}" for one in asked))
    if len(sources) > 1 and len({one.prompts_sha256 for one in asked}) > 1:
        echo(
            f"models with different prompts do not compare ({', '.join(sources)}); give all the same with --prompts",
            err=True,
        )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("signature")
    short = [model.name for model, _ in tables]
    for model, _ in tables:
        is_clear = model.name and short.count(model.name) == 1
        table.add_column(Text(printable(model.name if is_clear else model)), justify="right")
    for name in names:
        table.add_row(name, *(_shown(rows.get(name)) for _, rows in tables))
    SafeConsole(width=None if sys.stdout.isatty() else 160).print(table)


def _shown(row: Signature | None) -> str:
    if row is None:
        return "-"
    if row.value is None:
        return row.why
    interval = "" if row.low is None or row.high is None else f" ({row.low:.3g} to {row.high:.3g})"
    if row.p is not None:
        interval += f" p {row.p:.3f}"
    return f"{row.value:.3g}{interval}" + ("" if row.verdict == "-" else f" {row.verdict}")
