"""The ``megaloop`` command.

Each command imports what it needs when it runs, so that ``--help`` answers at once. One place turns errors into
exit codes: :func:`main`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOTDIR, EPERM, EROFS
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer import TyperException
from typer.core import TyperGroup

from launchers.rank import CONTINUE, GO_ON, RESTARTS, follow_launcher, open_store, report_error, started_by_launcher
from launchers.slurm_rank import join_slurm, record_exit
from megaloop import __version__, cluster_commands, evaluation_commands, report_command, run_commands, savings_command
from megaloop.depth import InsertAt, Operator
from megaloop.depth.plan import Injection, ResidualScale
from megaloop.errors import MegaloopError
from megaloop.options import finite
from megaloop.output import DescriptionColumn, SafeConsole, echo, print_error
from megaloop.runs.allow import Allow, AllowOption, allow_arguments
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
    help="Distributed pretraining of language models whose depth is alive.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
bench.command("savings")(savings_command.bench_savings)
app.command()(run_commands.checkpoints)
app.command()(run_commands.doctor)
app.command("eval")(evaluation_commands.evaluate_command)
app.command()(report_command.report)
app.command()(cluster_commands.submit)
app.command()(cluster_commands.status)
app.command()(cluster_commands.cancel)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override configuration values: train.steps=100")
]


class OnError(StrEnum):
    stop = "stop"
    skip = "skip"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


def main() -> None:
    """Run the command line; every way out has its exit code.

    0 done · 1 a bug or a rank that died · 2 an error the user can mend, or wrong usage · 75 a signal ended the run, which
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
        _leave(end.code if isinstance(end.code, int) else 0)
    except KeyboardInterrupt:  # before a command had begun
        _leave(130)
    except MegaloopError as error:
        if os.environ.get(_DEBUG):
            raise
        if not report_error(str(error)):
            _print_error(str(error))
        _leave(2)


def _check_encoding(argument: str) -> None:
    """Refuse bytes that are no text: neither a configuration nor a checkpoint nor a tokenizer can hold them."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise MegaloopError(f"argument {quoted(argument)} is not UTF-8; write it so, or rename what it names") from None


def _leave(code: int) -> NoReturn:
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


def _print_error(message: str) -> None:
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    print_error(message, "error: " if rank == "0" else f"error (rank {rank[:10]}): ")


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


@app.command()
def prep(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="txt, jsonl, jsonl.gz, jsonl.zst, parquet; or directories.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write the data set to.")],
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Train a tokenizer of this size on the text.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Use this sentencepiece model instead.")] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 2048,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=0.5, callback=finite, help="Share of documents held out.")
    ] = 0.01,
    errors: Annotated[OnError, typer.Option(help="What to do with bytes that are not UTF-8.")] = OnError.stop,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")] = None,
    text_field: Annotated[str, typer.Option(help="Field of jsonl and parquet that holds the text.")] = "text",
    template: Annotated[
        str | None,
        typer.Option(
            help="Instead of one field of jsonl: several, such as 'Q: {question}\\nA: {answer}' (\\n is a line's end)."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a data set that is already there.")] = False,
    json: Json = False,
) -> None:
    """Turn text into a data set: tokenizer, shards, validation split."""
    from data_prep.prepare import prepare

    summary = prepare(
        inputs,
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        validation_fraction=validation_fraction,
        errors=errors.value,
        workers=workers,
        text_field=text_field,
        template=template.replace("\\n", "\n") if template is not None else None,
        overwrite=overwrite,
        console=SafeConsole(stderr=True),
    )
    _report(summary, json)


@app.command()
def synthesize(
    out: Annotated[Path, typer.Option(help="jsonl file to write; megaloop prep takes it.")],
    documents: Annotated[int, typer.Option(min=1, help="Documents, each a series of 4 to 12 problems.")] = 10_000,
    kinds: Annotated[
        str, typer.Option(help="Kinds of problems, which take turns: of words, addition, hops, variables.")
    ] = "words,addition,hops,variables",
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other problems.")] = 0,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="A line for each problem, with prompt and answer, for fine-tuning.")
    ] = False,
    json: Json = False,
) -> None:
    """Write problems with their answers as text to train on: word problems, n-ary addition, p-hop induction, variables."""
    from data_prep.synthetic import write_jsonl

    chosen = [kind.strip() for kind in kinds.split(",") if kind.strip()]
    with _count_progress("synthesizing", documents) as show:
        _report(write_jsonl(out, kinds=chosen, count=documents, seed=seed, pairs=pairs, on_document=show), json)


@app.command()
def train(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG|RUN", help="YAML file, for example configs/demo.yaml; or a run's directory."),
    ],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Local ranks to start; default: what the topology needs, or all GPUs.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's latest checkpoint.")] = False,
    stop_at: Annotated[
        int | None,
        typer.Option(metavar="STEP", min=1, help="Save and end after this step; --resume goes on from there."),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="Begin with this checkpoint's weights (or a run's newest): as init=CKPT."),
    ] = None,
    allow: AllowOption = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start the ranks again, resuming, so often when one of them dies.")
    ] = 0,
) -> None:
    """Train a model; starts its own local ranks unless a launcher (torchrun, Slurm) already did.

    SIGUSR1, SIGTERM and SIGHUP end the step, save, and leave with exit code 75, Ctrl-C with 130; a second one leaves at once.
    """
    values = [*(overrides or []), *([f"init={init}"] if init is not None else [])]
    configuration = _configuration_of(config, values)
    if allow and not (resume or max_restarts):
        raise MegaloopError("--allow says what --resume may find changed; add --resume")
    if started_by_launcher():
        _train_here(configuration, resume, stop_at, allow or [])
        return
    from launchers import local

    count = local.local_ranks(configuration, ranks)
    options = {"--ranks": ranks, "--max-restarts": max_restarts or None}
    go_on = ["megaloop", "train", str(configuration.directory), "--resume"]
    go_on += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    os.environ[GO_ON] = shlex.join(go_on)
    if count == 1 and not max_restarts:
        with local.single_rank():
            _train_here(configuration, resume, stop_at, allow or [], alone=True)
        return
    command = [sys.executable, "-m", "megaloop", "train", str(config), *values]
    command += ["--stop-at", str(stop_at)] if stop_at is not None else []
    command += allow_arguments(allow)
    for restarts in range(max_restarts + 1):
        os.environ[RESTARTS] = str(restarts)
        again = ["--resume"] if resume or restarts else []
        try:
            local.launch([*command, *again], count, configuration.directory / "logs")
            return
        except local.RankFailed as error:
            _print_error(str(error))
            if restarts == max_restarts or error.signalled:  # who told it to end does not want it back
                raise typer.Exit(1) from None
            SafeConsole(stderr=True).print(f"starting the ranks again, restart {restarts + 1} of {max_restarts}")


def _configuration_of(path: Path, overrides: list[str]) -> Any:
    """The configuration of a file, or of a run's directory: what it trained with last, wherever the directory is now."""
    from megaloop.config import load_config
    from megaloop.train.rundir import CONFIG

    if not os.path.isdir(path):  # which takes any name, however long
        return load_config(path, overrides)
    if not (path / CONFIG).is_file():
        raise MegaloopError(
            f"{path}: a directory without {CONFIG}, so no run has begun in it; expected a YAML file or a run's directory"
        )
    configuration = load_config(path / CONFIG, overrides)
    if any(each.partition("=")[0].strip() == "run_dir" for each in overrides) or (
        configuration.directory.resolve() == path.resolve()
    ):
        return configuration
    return configuration.model_copy(update={"run_dir": path})


def _train_here(
    configuration: Any, resume: bool, stop_at: int | None, allowed: list[Allow], *, alone: bool = False
) -> None:
    """Be one rank of the run; ``alone``: in the process that the user started."""
    from megaloop.train.signals import StopSignals

    go_on = os.environ.get(GO_ON)
    with StopSignals() as signals:
        store = open_store()
        try:
            from megaloop.train.loop import run

            ending = run(configuration, resume=resume, stop_at=stop_at, signals=signals, go_on=go_on, allowed=allowed)
        finally:
            del store
    if ending in ("signalled", "interrupted"):
        _leave(130 if ending == "interrupted" and alone else CONTINUE)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of the run.")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for; default: the fewest that the topology needs.")
    ] = None,
    timeline: Annotated[bool, typer.Option("--timeline", help="Draw a step of each stage: rank by time.")] = False,
    timeline_png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write that picture as PNG, all of the step.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a run will do, take and move, stage by stage, without starting it."""
    from megaloop.config import load_config
    from megaloop.train.preview import pictures, preview, show, show_timeline

    run = preview(load_config(config, overrides or []), ranks)
    if timeline_png is not None:
        from megaloop.train.timeline import draw_png

        if not (drawn := pictures(run)):
            raise MegaloopError("plan: no stage has a pipeline (pp 1), there is no timeline to draw")
        draw_png(drawn, timeline_png)
    if json:
        _report(run.to_json(), json)
        return
    console = SafeConsole()
    show(run, console)
    if timeline:
        show_timeline(run, console)


@app.command()
def grow(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write; RUN/checkpoints/step-N to go on from it.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Layers to grow to.")] = None,
    depth: Annotated[
        str | None, typer.Option(help="Instead of --layers: the grown layers with a loop, such as 4-8x4-4.")
    ] = None,
    operator: Annotated[Operator, typer.Option(help="Which layers are copied.")] = "lidas",
    block: Annotated[int, typer.Option(min=1, help="Layers per copied block (stack copies all).")] = 4,
    insert_at: Annotated[
        InsertAt, typer.Option(help="Where lidas and random put a block: behind the middle range, or in it.")
    ] = "after",
    moments: Annotated[
        Literal["copy", "zero"], typer.Option(help="Adam's moments of a copied layer: its parent's, or zeros.")
    ] = "copy",
    json: Json = False,
) -> None:
    """Deepen a checkpoint by copying layers: another checkpoint, at the same step."""
    from megaloop.checkpoint.depth import grow_checkpoint

    target = depth if layers is None else layers
    if target is None or (layers is not None and depth is not None):
        raise MegaloopError("grow: say what to grow to, with --layers or with --depth")
    with _byte_progress() as show:
        result = grow_checkpoint(
            checkpoint,
            out,
            operator,
            target,
            block,
            insert_at=insert_at,
            moments=moments,
            on_bytes=show,
        )
    _report(result, json)


@app.command()
def loop(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write; RUN/checkpoints/step-N to go on from it.")],
    depth: Annotated[
        str | None,
        typer.Option(help="The same layers in another order: 10-4x2-10 loops the middle 4 of 24; 24 undoes it."),
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Instead: make every repetition a layer of its own, a grown model.")
    ] = False,
    injection: Annotated[Injection | None, typer.Option(help="As loop.injection; default: as it was, or none.")] = None,
    residual_scale: Annotated[ResidualScale | None, typer.Option(help="As loop.residual_scale; likewise.")] = None,
    norm: Annotated[bool | None, typer.Option(help="As loop.norm; likewise.")] = None,
    moments: Annotated[
        Literal["copy", "zero"], typer.Option(help="Adam's moments of an untied repetition: its layer's, or zeros.")
    ] = "copy",
    json: Json = False,
) -> None:
    """Loop some of a checkpoint's layers, or untie what is looped: another checkpoint, at the same step."""
    from megaloop.checkpoint.depth import loop_checkpoint

    if (depth is None) != untie:
        raise MegaloopError("loop: say which order the layers run in, with --depth, or --untie them")
    changes = {"injection": injection, "residual_scale": residual_scale, "norm": norm}
    chosen: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if chosen and untie:
        raise MegaloopError(f"loop: --{next(iter(chosen)).replace('_', '-')} is of loops, and --untie ends them")
    with _byte_progress() as show:
        result = loop_checkpoint(checkpoint, out, depth, changes=chosen, moments=moments, on_bytes=show)
    _report(result, json)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    dtype: Annotated[Precision | None, typer.Option(help="Convert the weights; default: as trained.")] = None,
    depth: Annotated[
        str | None, typer.Option(help="Order of the layers, such as 10-4x3-10; default: as trained.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a checkpoint in Hugging Face format."""
    from megaloop.checkpoint.huggingface import export_huggingface

    result = export_huggingface(checkpoint, out, dtype=dtype.value if dtype else None, depth=depth)
    _report(result if result is not None else {"written": str(out)}, json)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Hugging Face directory of the Llama architecture.")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    json: Json = False,
) -> None:
    """Read a Llama-architecture directory in Hugging Face format into a checkpoint."""
    from megaloop.checkpoint.huggingface import import_huggingface

    result = import_huggingface(source, out)
    _report(result if result is not None else {"written": str(out)}, json)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, callback=finite, help="Sampling temperature; 0: greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Precision.fp32,
    depth: Annotated[
        str | None,
        typer.Option(help="Order of the layers, such as 10-4x3-10: loop more, or less; default: as trained."),
    ] = None,
    json: Json = False,
) -> None:
    """Continue a text, token by token as they come."""
    from megaloop.inference.generate import generate_text

    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text if shown else prompt + text)  # the prompt comes with the first token: no error follows it
        echo(shown[-1], nl=False)
        sys.stdout.flush()

    result = generate_text(
        checkpoint,
        prompt,
        max_tokens=max_tokens,
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        precision=precision.value,
        depth=depth,
        on_text=None if json else show,
    )
    if json:
        _report(result, json)
        return
    echo("" if shown else result.text)
    rate = result.tokens / max(result.seconds, 1e-9)
    echo(f"{result.tokens} tokens in {result.seconds:.1f} s, {rate:.0f} tokens/s", err=True)


@bench.command("step")
def bench_step_command(
    shape: Annotated[str, typer.Option(help="Model to time: tiny, small, 360m or 1.7b.")] = "tiny",
    precision: Annotated[Precision, typer.Option(help="As train.precision.")] = Precision.fp32,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 4,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps per round.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each times both.")] = 5,
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
    _report(result, json)


@bench.command("layers")
def bench_layers_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of the run.")],
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 10,
    json: Json = False,
) -> None:
    """Time the embedding, one layer and the head; parallel.layer_costs takes the three numbers."""
    from megaloop.bench.layers import bench_layers
    from megaloop.config import load_config

    times = bench_layers(load_config(config, overrides or []), rounds)
    _report(times, json)
    if not json:
        echo(f"parallel.layer_costs=[{times.embedding:.3e},{times.layer:.3e},{times.head:.3e}]")


@bench.command("prep")
def bench_prep_command(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Text, as megaloop prep takes it.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="The sentencepiece model to encode with; default: train one on the text.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")] = None,
    json: Json = False,
) -> None:
    """Time tokenization against sentencepiece's own multi-threaded batch encoding."""
    from megaloop.bench.prep import bench_prep

    _report(bench_prep(inputs, tokenizer=tokenizer, workers=workers), json)


@contextlib.contextmanager
def _count_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal: call it with how many are done."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = (DescriptionColumn(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=SafeConsole(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextlib.contextmanager
def _byte_progress() -> Iterator[Callable[[str, int, int], None]]:
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


@bench.command("reshard")
def bench_reshard_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of a run that grows.")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Local ranks to start; default: what the topology needs, or all GPUs.")
    ] = None,
    stage: Annotated[int | None, typer.Option(min=1, help="Growth stage to grow into; default: the last.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each measures both.")] = 3,
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
        try:
            local.launch(command, count, directory / "logs")
        except local.RankFailed as error:
            _print_error(str(error))
            raise typer.Exit(1) from None

    def show(number: int, pause: float, restarted: float | None) -> None:
        against = "" if restarted is None else f", save + stop + start + grow on load {restarted:.2f} s"
        echo(f"round {number}: in flight {pause:.3f} s{against}", err=True)

    result = bench_reshard(configuration, count, start, stage=stage, rounds=rounds, restart=restart, on_round=show)
    _report(result, json)


@bench.command("rounds")
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
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the benchmark; each times all.")] = 5,
    json: Json = False,
) -> None:
    """Time pipeline rounds against stock DeepSpeed's tied layers, and 1, 2 and 4 rounds of an unlooped model."""
    from launchers import local
    from megaloop.bench.rounds import Setting, bench_rounds, show

    setting = Setting(
        shape, precision.value, pp, depth, unlooped, micro_batches, micro_batch, sequence_length, steps, rounds
    )  # fmt: skip

    def start(directory: Path) -> None:
        command = [sys.executable, "-m", "megaloop", "bench", "rounds-rank", str(directory)]
        try:
            local.launch(command, pp, directory / "logs")
        except local.RankFailed as error:
            _print_error(str(error))
            raise typer.Exit(1) from None

    result = bench_rounds(setting, start)
    if json:
        _report(result, json)
        return
    show(result, SafeConsole())


@bench.command("rounds-rank", hidden=True)
def bench_rounds_rank(directory: Path) -> None:
    """One rank of ``bench rounds``."""
    store = open_store()
    try:
        from megaloop.bench.rounds import run_rank

        run_rank(directory)
    finally:
        del store


@bench.command("checkpoint")
def bench_checkpoint_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; its deepest stage is measured.")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Local ranks to start; default: what the topology needs, or all GPUs.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each measures everything.")] = 5,
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
        try:
            local.launch(command, count, folder / "logs")
        except local.RankFailed as error:
            _print_error(str(error))
            raise typer.Exit(1) from None

    _report(bench_checkpoint(configuration, count, start, rounds=rounds, directory=directory), json)


@bench.command("checkpoint-rank", hidden=True)
def bench_checkpoint_rank(config: Path, folder: Path, rounds: int) -> None:
    """One rank of ``bench checkpoint``."""
    store = open_store()
    try:
        from megaloop.bench.checkpoint import run_rank

        run_rank(config, folder, rounds)
    finally:
        del store


@bench.command("reshard-rank", hidden=True)
def bench_reshard_rank(role: str, directory: Path, stage: int) -> None:
    """One rank of ``bench reshard``."""
    store = open_store()
    try:
        from megaloop.bench.reshard import run_rank

        run_rank(role, directory, stage)  # type: ignore[arg-type]
    finally:
        del store


def _report(result: Any, as_json: bool) -> None:
    """Print what a command made: as JSON, or as a list of its values."""
    import dataclasses
    import json

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
        return ", ".join(map(_text, value))
    if value is None:
        return "-"
    return _number(value) if isinstance(value, int | float) else str(value)


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
