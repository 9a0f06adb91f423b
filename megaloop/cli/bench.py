"""``megaloop bench``: how fast this machine is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaloop.cli.options import Json, Overrides, Precision, Recompute, read_depth
from megaloop.cli.output import echo, show_result
from megaloop.cli.ranks import launch_ranks, rank_store
from megaloop.cli.savings import bench_savings
from megaloop.depth import DepthSpec
from megaloop.errors import MegaloopError
from megaloop.terminal import SafeConsole

__all__ = ["bench"]


def bench_step_command(
    shape: Annotated[str, typer.Option(help="Model to time: tiny, small, 360m or 1.7b.")] = "tiny",
    precision: Annotated[Precision, typer.Option(help="As train.precision.")] = Precision.fp32,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 4,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps per round.")] = 5,
    rounds: Annotated[int, typer.Option("--repeats", "--rounds", min=1, help="Repetitions; each times both.")] = 5,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile both.")] = False,
    recompute: Annotated[str, typer.Option(help="As train.recompute.")] = "none",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")] = None,
    apart: Annotated[
        bool, typer.Option("--apart", help="Each in a process of its own, one after the other, not alternated.")
    ] = False,
    json: Json = False,
) -> None:
    """Time the training step against a plain loop around transformers, alternated in one run."""
    from megaloop.bench.step import SHAPES, bench_step

    if shape not in SHAPES:
        raise MegaloopError(f"bench step: unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")

    def show(number: int, ours: float, theirs: float) -> None:
        echo(f"round {number}: {ours:,.0f} tokens/s, transformers {theirs:,.0f} tokens/s", err=True)

    result = bench_step(
        shape,
        precision=precision.value,
        batch=batch,
        sequence_length=sequence_length,
        steps=steps,
        rounds=rounds,
        compile=compile,
        recompute=recompute,
        threads=threads,
        apart=apart,
        on_round=show,
    )
    show_result(result, json)


def bench_layers_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of the run.")],
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option("--repeats", "--rounds", min=1, help="Repetitions.")] = 10,
    json: Json = False,
) -> None:
    """Time the embedding, one layer and the head; parallel.layer_costs takes the three numbers."""
    from megaloop.bench.layers import bench_layers
    from megaloop.config import load_config

    times = bench_layers(load_config(config, overrides or []), rounds)
    show_result(times, json)
    if not json:
        echo(f"parallel.layer_costs=[{times.embedding:.3e},{times.layer:.3e},{times.head:.3e}]")


def bench_prep_command(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Text, as megaloop prep takes it.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="As megaloop prep takes it; default: train a sentencepiece model.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")] = None,
    json: Json = False,
) -> None:
    """Time tokenization against the library's own multi-threaded batch encoding."""
    from data_prep.bench import bench_prep

    show_result(bench_prep(inputs, tokenizer=tokenizer, workers=workers), json)


def bench_reshard_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of a run that grows.")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Local ranks to start; default: what the topology needs, or all GPUs.")
    ] = None,
    stage: Annotated[int | None, typer.Option(min=1, help="Growth stage to grow into; default: the last.")] = None,
    rounds: Annotated[int, typer.Option("--repeats", "--rounds", min=1, help="Repetitions; each measures both.")] = 3,
    restart: Annotated[bool, typer.Option(help="Measure save, stop, start and grow on load too.")] = True,
    json: Json = False,
) -> None:
    """Time a growth in flight against saving, stopping, starting and growing on load."""
    from launchers import local
    from megaloop.bench.reshard import bench_reshard
    from megaloop.config import load_config

    configuration = load_config(config, overrides or [])
    count = local.local_ranks(configuration, ranks)

    def start(role: str, directory: Path, number: int) -> None:
        command = [sys.executable, "-m", "megaloop", "bench", "reshard-rank", role, str(directory), str(number)]
        launch_ranks(command, count, directory / "logs")

    def show(number: int, pause: float, restarted: float | None) -> None:
        against = "" if restarted is None else f", save + stop + start + grow on load {restarted:.2f} s"
        echo(f"round {number}: in flight {pause:.3f} s{against}", err=True)

    result = bench_reshard(configuration, count, start, stage=stage, rounds=rounds, restart=restart, on_round=show)
    show_result(result, json)


def bench_rounds_command(
    depth: Annotated[str, typer.Option(help="The looped model.")] = "0-4x4-0",
    unlooped: Annotated[int, typer.Option(min=1, help="Layers of the model that goes 1, 2 and 4 rounds.")] = 16,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks to start.")] = 2,
    shape: Annotated[str, typer.Option(help="Widths: tiny, small, 360m or 1.7b.")] = "small",
    precision: Annotated[Precision, typer.Option(help="As train.precision.")] = Precision.fp32,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 4,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples per micro-batch.")] = 1,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps per round of the benchmark.")] = 2,
    rounds: Annotated[int, typer.Option("--repeats", "--rounds", min=1, help="Repetitions; each times all.")] = 5,
    json: Json = False,
) -> None:
    """Time pipeline rounds against stock DeepSpeed's tied layers, and 1, 2 and 4 rounds of an unlooped model."""
    from megaloop.bench.rounds import Setting, bench_rounds, show

    looped, plain = DepthSpec.parse(depth), DepthSpec.parse(unlooped)
    setting = Setting(
        shape, precision.value, pp, looped, plain, micro_batches, micro_batch, sequence_length, steps, rounds
    )  # fmt: skip

    def start(directory: Path) -> None:
        command = [sys.executable, "-m", "megaloop", "bench", "rounds-rank", str(directory)]
        launch_ranks(command, pp, directory / "logs")

    result = bench_rounds(setting, start)
    if json:
        show_result(result, json)
        return
    show(result, SafeConsole())


def bench_rounds_rank(directory: Path) -> None:
    """One rank of ``bench rounds``."""
    with rank_store():
        from megaloop.bench.rounds import run_rank

        run_rank(directory)


def bench_schedule_command(
    pp: Annotated[
        list[int] | None, typer.Option(min=1, help="Pipeline ranks to start; may be repeated; default: 1, 2 and 4.")
    ] = None,
    precision: Annotated[
        list[Precision] | None, typer.Option(help="As train.precision; may be repeated; default: both.")
    ] = None,
    recompute: Annotated[
        list[Recompute] | None,
        typer.Option(help="As train.recompute; may be repeated; default: none and full."),
    ] = None,
    shape: Annotated[str, typer.Option(help="Widths: tiny, small, 360m or 1.7b.")] = "tiny",
    depth: Annotated[str, typer.Option(help="Layers of the model.")] = "8",
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 8,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples per micro-batch.")] = 1,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps per repetition.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; each times both schedules.")] = 5,
    json: Json = False,
) -> None:
    """Time our schedule of one round against DeepSpeed's own, and compare their losses and gradient norms bit for bit."""
    from megaloop.bench.schedule import Setting, bench_schedule, show

    setting = Setting(
        shape, str(DepthSpec.parse(depth)), micro_batches, micro_batch, sequence_length, steps, repeats,
        tuple(item.value for item in precision or Precision),
        tuple(item.value for item in recompute or (Recompute.none, Recompute.full)),
    )  # fmt: skip

    def start(directory: Path, count: int) -> None:
        command = [sys.executable, "-m", "megaloop", "bench", "schedule-rank", str(directory)]
        launch_ranks(command, count, directory / "logs")

    result = bench_schedule(setting, pp or [1, 2, 4], start)
    if json:
        show_result(result, json)
        return
    show(result, SafeConsole())


def bench_schedule_rank(directory: Path) -> None:
    """One rank of ``bench schedule``."""
    with rank_store():
        from megaloop.bench.schedule import run_rank

        run_rank(directory)


def bench_checkpoint_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; its deepest stage is measured.")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Local ranks to start; default: what the topology needs, or all GPUs.")
    ] = None,
    rounds: Annotated[
        int, typer.Option("--repeats", "--rounds", min=1, help="Repetitions; each measures everything.")
    ] = 5,
    directory: Annotated[
        Path | None, typer.Option(help="Where to write: on the file system to be measured; default: temporary files.")
    ] = None,
    json: Json = False,
) -> None:
    """Time saves that training waits for against saves in the background, and both against plain file copies."""
    from launchers import local
    from megaloop.bench.checkpoint import bench_checkpoint
    from megaloop.config import load_config

    configuration = load_config(config, overrides or [])
    count = local.local_ranks(configuration, ranks)

    def start(path: Path, folder: Path, number: int) -> None:
        command = [sys.executable, "-m", "megaloop", "bench", "checkpoint-rank", str(path), str(folder), str(number)]
        launch_ranks(command, count, folder / "logs")

    show_result(bench_checkpoint(configuration, count, start, rounds=rounds, directory=directory), json)


def bench_checkpoint_rank(config: Path, folder: Path, rounds: int) -> None:
    """One rank of ``bench checkpoint``."""
    with rank_store():
        from megaloop.bench.checkpoint import run_rank

        run_rank(config, folder, rounds)


def bench_diagnose_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Hugging Face directory of a Llama.")],
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, of random tokens.")] = 10,
    length: Annotated[
        int, typer.Option(min=32, help="Tokens of the longest prompt; the shortest has half as many.")
    ] = 128,
    boundaries: Annotated[int, typer.Option(min=1, help="Boundaries of each prompt.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; each times both.")] = 3,
    json: Json = False,
) -> None:
    """Time the future effects of skipping every layer against full forward passes with hooks on transformers."""
    from megaloop.bench.diagnose import bench_diagnose

    def show(number: int, ours: float, theirs: float) -> None:
        echo(f"repetition {number}: {ours:.1f} s, transformers {theirs:.1f} s", err=True)

    result = bench_diagnose(
        model, prompts=prompts, length=length, boundaries_each=boundaries, repeats=repeats, on_repeat=show
    )
    show_result(result, json)


def bench_decode_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    depth: Annotated[
        str | None, typer.Option(help="Order of the layers, such as 4-4x4-4; default: as trained.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences at a time; again for more; default: 1 and 16.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the longest prompt; the shortest has half.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate of the longest; the shortest has half.")] = 64,
    speculate: Annotated[
        int | None, typer.Option(min=1, max=64, help="Also: draft so many tokens, and check them at once.")
    ] = None,
    draft_loops: Annotated[int, typer.Option(min=1, help="Loops of a draft.")] = 1,
    transformers: Annotated[bool, typer.Option(help="Compare with transformers on the exported model.")] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile our layers.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; each times every way.")] = 3,
    json: Json = False,
) -> None:
    """Time greedy generation against transformers' own with its static cache, with half the loops, and with drafts."""
    from megaloop.bench.decode import bench_decode, table
    from megaloop.inference.speculation import Speculation

    result = bench_decode(
        checkpoint,
        depth=read_depth(depth),
        batches=batch or [1, 16],
        prompt=prompt,
        tokens=tokens,
        repeats=repeats,
        transformers=transformers,
        compiled=compiled,
        speculate=None if speculate is None else Speculation(speculate, draft_loops),
        on_way=lambda what: echo(what, err=True),
    )
    if json:
        show_result(result, json)
        return
    SafeConsole().print(table(result))


def bench_reshard_rank(role: str, directory: Path, stage: int) -> None:
    """One rank of ``bench reshard``."""
    with rank_store():
        from megaloop.bench.reshard import run_rank

        run_rank(role, directory, stage)  # type: ignore[arg-type]


bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
bench.command("savings")(bench_savings)
bench.command("step")(bench_step_command)
bench.command("layers")(bench_layers_command)
bench.command("prep")(bench_prep_command)
bench.command("reshard")(bench_reshard_command)
bench.command("rounds")(bench_rounds_command)
bench.command("schedule")(bench_schedule_command)
bench.command("checkpoint")(bench_checkpoint_command)
bench.command("diagnose")(bench_diagnose_command)
bench.command("decode")(bench_decode_command)
bench.command("reshard-rank", hidden=True)(bench_reshard_rank)
bench.command("rounds-rank", hidden=True)(bench_rounds_rank)
bench.command("schedule-rank", hidden=True)(bench_schedule_rank)
bench.command("checkpoint-rank", hidden=True)(bench_checkpoint_rank)
