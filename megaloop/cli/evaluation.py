"""``megaloop eval``: what a checkpoint can do."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launchers.rank import started_by_launcher
from megaloop.cli.evaluation_tables import print_harness, print_records
from megaloop.cli.options import CRITERIA, HaltDecay, HaltScope, MinLoops, read_halts
from megaloop.cli.output import echo
from megaloop.cli.ranks import is_first_rank, joined_ranks, launch_again, part_progress
from megaloop.errors import MegaloopError
from megaloop.text import parse_whole, printable

if TYPE_CHECKING:
    from megaloop.evaluation.records import Record
    from megaloop.inference.loops import Block, EveryBlock

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
    shots: Annotated[
        str | None,
        typer.Option(
            help="Solved examples before each question: 0,1,2,5,10; default: 5, of --harness what each task says."
        ),
    ] = None,
    loops: Annotated[
        str | None,
        typer.Option("--loops", "--max-loops", help="How often the looped block runs: 1,2,3,4; default: as trained."),
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIRST:STOP",
            help="Which layers loop, by place; again for more, or every:N for every block of N layers in turn; "
            "default: the trained loop, or the middle 4.",
        ),
    ] = None,
    halt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CRITERION=THRESHOLD",
            help=f"Tokens that are asked for leave the loop when they have settled: {CRITERIA}. Several, separated by commas, or "
            "again. --loops is then the most.",
        ),
    ] = None,
    min_loops: MinLoops = 1,
    halt_scope: HaltScope = "token",
    halt_decay: HaltDecay = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="full|last|shared=N",
            help="Iterations of the loop that keep keys and values; several, separated by commas, or again; measured beside full.",
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
    """Reasoning primitives and held-out loss, by number of shots and of loops, by halting and caches. Results are remembered."""
    shot_counts = numbers("--shots", "5" if shots is None else shots, 0)
    loop_counts: list[int | None] = [None] if loops is None else [*numbers("--loops", loops, 1)]
    if block and loops is None:
        raise MegaloopError("eval: --block says which layers loop; say how often with --loops")
    if ranks > 1 and not started_by_launcher():
        launch_again(ranks)
        return
    with joined_ranks():
        from megaloop.inference.caches import CachePolicy
        from megaloop.inference.loops import EveryBlock

        halts = read_halts(_listed("--halt", halt), min_loops, halt_scope, halt_decay)
        caches = [CachePolicy.parse(text) for text in _listed("--cache", cache)]
        blocks = [EveryBlock.parse(text) for text in block or []]
        if harness is not None:
            from megaloop.evaluation.harness import run_harness

            unused = {"--tasks": tasks, "--data": data, "--out": out, "--again": again}
            one = _one_for_harness(blocks, (shot_counts, loop_counts, halts, caches), every_checkpoint, unused)
            results = run_harness(
                checkpoint,
                [name.strip() for name in harness.split(",") if name.strip()],
                task_directories=harness_path or [],
                shots=None if shots is None else shot_counts[0],
                loops=loop_counts[0],
                block=one,
                halting=halts[0] if halts else None,
                policy=caches[0] if caches else CachePolicy(),
                precision=precision,
            )
            if is_first_rank():
                print_harness(results, json)
            return
        with part_progress() as show:
            records = _measured(
                _kept_checkpoints(checkpoint) if every_checkpoint else [checkpoint],
                tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
                shots=shot_counts,
                loops=loop_counts,
                blocks=blocks,
                examples=examples,
                seed=seed,
                data=data,
                samples=samples,
                halts=halts,
                caches=caches,
                precision=precision,
                again=again,
                out=out,
                on_step=show,
                on_note=lambda note: echo(note, err=True),
            )
        if is_first_rank():
            print_records(records, json)


def _one_for_harness(
    blocks: Sequence[Block | EveryBlock], axes: Sequence[Sequence[Any]], every_checkpoint: bool, unused: dict[str, Any]
) -> Block | None:
    """The block, if any; MegaloopError where lm-eval is asked for several things at once, or for what is not its own."""
    from megaloop.inference.loops import EveryBlock

    one = blocks[0] if blocks else None
    if any(len(axis) > 1 for axis in (blocks, *axes)) or isinstance(one, EveryBlock) or every_checkpoint:
        raise MegaloopError(
            "eval: --harness takes one number of shots and of loops, one block, one --halt, one --cache and one checkpoint"
        )
    for name, value in unused.items():
        if value:
            raise MegaloopError(
                f"eval: {name} is not for --harness, which names its own tasks and prints what they give; leave it out"
            )
    return one


def _listed(option: str, texts: Sequence[str] | None) -> list[str]:
    """What commas separate; MegaloopError where an option is given and says nothing."""
    found = [part.strip() for text in texts or [] for part in text.split(",") if part.strip()]
    if texts and not found:
        raise MegaloopError(f"{option}: nothing is named; give a value, or leave {option} out")
    return found


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
