"""``megaloop eval``: what a checkpoint can do."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from launchers.rank import started_by_launcher
from megaloop.cli.output import echo
from megaloop.cli.ranks import is_first_rank, joined_ranks, launch_again, part_progress
from megaloop.errors import MegaloopError
from megaloop.terminal import SafeConsole
from megaloop.text import parse_whole, printable

if TYPE_CHECKING:
    from megaloop.evaluation.records import Record

__all__ = ["evaluate_command", "export_tasks", "numbers"]


def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Names, separated by commas: copy-random, copy-real, variables-D-basic, -math or -code with D of 0 to 2, "
            "addition, p-hop; 'primitives' for all of these; validation; default: everything."
        ),
    ] = None,
    shots: Annotated[str, typer.Option(help="Solved examples before each question: 5, or 0,1,2,5,10.")] = "5",
    loops: Annotated[
        str | None, typer.Option(help="How often the looped block runs: 1,2,3,4; default: as trained.")
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIRST:STOP",
            help="Which layers loop, by place; again for more, or every:N for every block of N layers in turn; "
            "default: the trained loop, or the middle 4.",
        ),
    ] = None,
    every_checkpoint: Annotated[
        bool,
        typer.Option("--every-checkpoint", help="Of a run: all checkpoints that it has kept, not the latest alone."),
    ] = False,
    examples: Annotated[int, typer.Option(min=1, help="Questions of each primitive.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions.")] = 0,
    data: Annotated[
        list[Path] | None, typer.Option(help="Data set for the held-out loss; again for more; default: the run's own.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples of each data set, at most.")] = 256,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic.")] = "fp32",
    ranks: Annotated[int, typer.Option(min=1, help="Local ranks that share the examples.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File of results, one JSON object a line; default: RUN/evaluation.jsonl.")
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(help="Instead: tasks of EleutherAI's lm-eval, separated by commas (needs the extra 'harness')."),
    ] = None,
    harness_path: Annotated[
        list[Path] | None, typer.Option(help="Directory with task files of your own for --harness.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Reasoning primitives and held-out loss, by number of shots and of loops. Results are remembered."""
    shot_counts = numbers("--shots", shots, 0)
    loop_counts: list[int | None] = [None] if loops is None else [*numbers("--loops", loops, 1)]
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if block and loops is None:
        raise MegaloopError("eval: --block says which layers loop; say how often with --loops")
    if ranks > 1 and not started_by_launcher():
        launch_again(ranks)
        return
    with joined_ranks():
        from megaloop.inference.loops import EveryBlock

        blocks = [EveryBlock.parse(text) for text in block or []]
        if harness is not None:
            from megaloop.evaluation.harness import run_harness

            one = blocks[0] if blocks else None
            if len(blocks) > 1 or isinstance(one, EveryBlock) or every_checkpoint:
                raise MegaloopError("eval: --harness takes one block and one checkpoint")
            results = run_harness(
                checkpoint,
                [name.strip() for name in harness.split(",") if name.strip()],
                task_directories=harness_path or [],
                shots=None if shots == "5" else shot_counts[0],
                loops=loop_counts[0],
                block=one,
                precision=precision,
            )
            _print_harness(results, json)
            return
        with part_progress() as show:
            records = _measured(
                _kept_checkpoints(checkpoint) if every_checkpoint else [checkpoint],
                tasks=names,
                shots=shot_counts,
                loops=loop_counts,
                blocks=blocks,
                examples=examples,
                seed=seed,
                data=data,
                samples=samples,
                precision=precision,
                again=again,
                out=out,
                on_step=show,
                on_note=lambda note: echo(note, err=True),
            )
        if is_first_rank():
            _print_records(records, json)


def _measured(paths: Sequence[Path], **options: Any) -> list[Record]:
    """The records of all checkpoints; of several, those that are too shallow for a block are left out, and that is said."""
    from megaloop.evaluation.evaluate import evaluate
    from megaloop.inference.loops import TooShallow

    records: list[Record] = []
    for path in paths:
        try:
            records += evaluate(path, **options)
        except TooShallow as error:
            if path == paths[-1] and not records:
                raise
            echo(f"{path.name} is left out: {error}", err=True)
    return records


def _kept_checkpoints(run: Path) -> list[Path]:
    from megaloop.checkpoint import list_checkpoints

    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise MegaloopError(f"eval: --every-checkpoint: {run} is no run with checkpoints; give a run directory")
    return found


def export_tasks(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them.")],
    tasks: Annotated[
        str | None, typer.Option(help="Primitives, separated by commas, as for 'megaloop eval'; default: all.")
    ] = None,
    shots: Annotated[str, typer.Option(help="Solved examples before each question: 5, or 0,5.")] = "5",
    examples: Annotated[int, typer.Option(min=1, help="Questions of each primitive.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Write the primitives as task files of EleutherAI's lm-eval, to ask any model the same questions."""
    from megaloop.evaluation.harness_files import harness_tag, write_harness_files
    from megaloop.evaluation.tasks import tasks_named

    counts = numbers("--shots", shots, 0)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    written = write_harness_files(directory, tasks_named(names), counts, count=examples, seed=seed)
    if json:
        echo(json_module.dumps({"directory": str(directory), "tasks": written}))
        return
    tags = ",".join(harness_tag(count) for count in dict.fromkeys(counts))
    echo(
        f"{len(written)} tasks in {printable(directory)}; lm_eval --include_path {printable(directory)} --tasks {tags}"
    )


def numbers(option: str, text: str, least: int) -> list[int]:
    """Whole numbers of at least ``least`` that a comma separates, or MegaloopError in the option's name."""
    found = [parse_whole(part.strip()) for part in text.split(",") if part.strip()]
    whole = [result for result in found if result is not None and result >= least]
    if not whole or len(whole) < len(found):
        raise MegaloopError(
            f"{option} {printable(text, 60)}: expected whole numbers from {least} on, separated by commas, such as 1,2,5"
        )
    return whole


def _print_records(records: list[Record], as_json: bool) -> None:
    values = [record.to_json() for record in records]
    if as_json:
        echo(json_module.dumps({"records": values}))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    steps = len({value["step"] for value in values}) > 1
    for name in ("task", *(["step"] if steps else []), "depth", "shots"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name in ("accuracy", "exact match", "chance", "loss", "bits/byte"):
        table.add_column(name, justify="right")
    for value in values:
        if value.get("difficulty") is not None:
            continue
        step = [str(value["step"])] if steps else []
        if "loss" in value:
            bits = value.get("bits_per_byte")
            table.add_row(
                Text(printable(f"held out of {value['data']}")),
                *step,
                Text(printable(value["depth"])),
                *[""] * 4,
                _with_error(value["loss"], value.get("loss_stderr"), 4),
                "-" if bits is None else f"{bits:.4f}",
            )
            continue
        table.add_row(
            Text(printable(value["task"])),
            *step,
            Text(printable(value["depth"])),
            str(value["shots"]),
            *(_percent(value.get(name), value.get(f"{name}_stderr")) for name in ("accuracy", "exact_match")),
            _percent(value.get("chance"), None, digits=0),
        )
    console = SafeConsole(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if targeted := [value for value in values if value.get("last_accuracy") is not None]:
        console.print(_by_difficulty(targeted))


def _by_difficulty(values: list[dict[str, Any]]) -> Table:
    """Accuracy on held-out samples with targets; the floor is what guessing by the statistics of the data scores."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    steps, looped = len({value["step"] for value in values}) > 1, any(value.get("block") for value in values)
    named = [*(["step"] if steps else []), "difficulty", "depth", *(["block"] if looped else [])]
    for name in ("held out of", *named, "accuracy", "floor", "on the last", "floor", "loss"):
        table.add_column(name, justify="left" if name == "held out of" else "right")
    for value in values:
        without = {"difficulty": "all", "block": "-"}
        shown = [str(without.get(name) if value.get(name) is None else value[name]) for name in named]
        table.add_row(
            Text(printable(value["data"])),
            *(Text(printable(text)) for text in shown),
            *(
                text
                for prefix in ("", "last_")
                for text in (
                    _percent(value.get(f"{prefix}accuracy"), value.get(f"{prefix}accuracy_stderr")),
                    _percent(value.get(f"{prefix}floor"), None),
                )
            ),
            _with_error(value["loss"], value.get("loss_stderr"), 4),
        )
    return table


def _percent(value: float | None, error: float | None, digits: int = 1) -> str:
    return "-" if value is None else _with_error(100 * value, None if error is None else 100 * error, digits) + " %"


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def _print_harness(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        echo(json_module.dumps(results, default=str))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("task", "metric", "value", "standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, values in results.items():
        for metric, value in values.items():
            name, _, form = metric.partition(",")
            if name.endswith("_stderr") or not isinstance(value, float):
                continue
            error = values.get(f"{name}_stderr,{form}")
            table.add_row(
                Text(printable(task)),
                Text(printable(name)),
                f"{value:.4f}",
                f"{error:.4f}" if isinstance(error, float) else "-",
            )
    SafeConsole().print(table)
