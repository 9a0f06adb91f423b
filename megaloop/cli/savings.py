"""``megaloop bench savings``: what growing and looping save, on your data, at your size."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.table import Table

from megaloop.cli.options import finite
from megaloop.cli.output import echo
from megaloop.cli.report import print_report
from megaloop.errors import CONTINUE, MegaloopError
from megaloop.terminal import SafeConsole

if TYPE_CHECKING:
    from megaloop.bench.savings import Job
    from megaloop.config import Config

__all__ = ["bench_savings"]

_PRESETS = Path(__file__).parents[1] / "bench" / "presets"
_DOCUMENTS = {"cpu": 6_000, "gpu": 60_000}
"""Synthetic documents of a preset's mixture, of 4 to 12 problems each."""
_HELD_OUT = 0.04
_LINE_EVERY = 60.0
"""Seconds between two lines of progress where there is no terminal."""


def bench_savings(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Override values of all contenders: train.steps=2000"),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="cpu, gpu, or a configuration of yours: the full-depth model, with growth.")
    ] = "cpu",
    contenders: Annotated[
        str | None,
        typer.Option(
            help="Some of baseline, baseline-matched, midas, lidas, late-stack, looped, looped-full, looped-params, iso-params, "
            "iso-params-middle, lidas+loop, lns, lns+lidas; default: all but late-stack, looped-full and the two iso-params."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each contender, with seeds of their own.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the runs and of the report; default: runs/savings-PRESET.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text that the cpu and gpu presets train on; default: the King James Bible (extra demo)."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: one per core, or one on a GPU.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1, callback=finite, help="Save and leave after so long, with exit code 75; the same command goes on."
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Questions of each reasoning primitive.")] = 250,
    shots: Annotated[str, typer.Option(help="Numbers of shots of the k-shot curves.")] = "0,2,5",
    loops: Annotated[str, typer.Option(help="How often the middle block runs at inference.")] = "1,2,3",
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train contenders on the same samples, evaluate them, and report what growing and looping save.

    A killed bench goes on where it was when it is started again. Each contender's run is an ordinary run directory.
    """
    from megaloop.bench.contenders import GROWING_AND_LOOPING, counted_flops
    from megaloop.bench.savings import Evaluation, Runner, prepare_jobs
    from megaloop.cli.evaluation import numbers
    from megaloop.config import load_config

    began = time.monotonic()
    names = [name.strip() for name in (contenders or ",".join(GROWING_AND_LOOPING)).split(",") if name.strip()]
    evaluation = Evaluation(examples, tuple(numbers("--shots", shots, 0)), tuple(numbers("--loops", loops, 1)))
    own = preset not in _DOCUMENTS
    base = out or Path("runs") / f"savings-{Path(preset).stem}"
    data = base / "data"
    sources = (
        [] if own else [f"data.sources.{number}.path={data / name}" for number, name in enumerate(("text", "math"))]
    )
    config = load_config(Path(preset) if own else _PRESETS / f"savings_{preset}.yaml", [*sources, *(overrides or [])])
    if own and text:
        raise MegaloopError("bench savings: --text is for the presets cpu and gpu; a configuration names its own data")
    with _held(base):
        if not own:
            _prepare_data(config, data, _DOCUMENTS[preset], text or [])
        vocab_size = _vocabulary(config)
        work = prepare_jobs(config, vocab_size, base, contenders=names, seeds=seeds, evaluation=evaluation)
        _check_flops(work, vocab_size, counted_flops)
        with _progress() as show, _terminating():
            limit = None if minutes is None else max(minutes * 60 - (time.monotonic() - began), 1.0)
            finished = Runner(work, jobs or _at_once(), base, limit=limit, on_change=show).run()
    if not finished:
        left = sum(job.state != "done" for job in work)
        echo(
            f"saved after {minutes:g} minutes; {left} of {len(work)} runs are left: the same command goes on", err=True
        )
        raise typer.Exit(CONTINUE)
    _finish(base, work, json)


def _at_once() -> int:
    from launchers.local import gpu_count

    return 1 if gpu_count() else max(os.cpu_count() or 1, 1)


def _vocabulary(config: Config) -> int:
    from megaloop.data import embedding_rows, open_sources

    return embedding_rows(config, open_sources(config.data))


def _check_flops(work: Sequence[Job], vocab_size: int, count: Callable[[Config, int], tuple[int, int]]) -> None:
    """Compare the accountant with torch's counter at the depth that each contender ends with."""
    from megaloop.config import load_config

    if load_config(work[0].config).plan.layers * load_config(work[0].config).model.hidden_size > 24 * 1024:
        return  # building models of this size for it takes longer than it is worth; the tests count as well
    seen = set()
    for job in work:
        config = load_config(job.config)
        if (depth := config.stages[-1].plan.notation) in seen:
            continue
        seen.add(depth)
        ours, theirs = count(config, vocab_size)
        if ours != theirs:
            raise MegaloopError(
                f"bench savings: of depth {depth} torch counts {theirs} FLOPs, and megaloop {ours}; a bug"
            )
    echo(f"FLOPs of depths {', '.join(sorted(seen))} are what torch.utils.flop_counter counts", err=True)


def _prepare_data(config: Config, folder: Path, documents: int, text: list[Path]) -> None:
    """The presets' two sources: text, and synthetic problems, with one tokenizer trained on both."""
    from data_prep.demo import demo_text
    from data_prep.prepare import prepare
    from data_prep.sources import Inputs, find_inputs
    from data_prep.synthetic import write_jsonl
    from data_prep.tokenizer import train_sentencepiece

    if (folder / "text" / "data.json").is_file() and (folder / "math" / "data.json").is_file():
        return
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    echo(f"preparing {folder}", err=True)
    if not text:
        demo_text(folder / "text.jsonl")
    inputs = text or [folder / "text.jsonl"]
    write_jsonl(folder / "math.jsonl", count=documents)
    tokenizer = folder / "tokenizer.model"
    both = find_inputs([*inputs, folder / "math.jsonl"])
    tokenizer.write_bytes(train_sentencepiece(_some(Inputs(both)), vocab_size))
    for name, files in (("text", inputs), ("math", [folder / "math.jsonl"])):
        prepare(
            files,
            folder / name,
            tokenizer=tokenizer,
            sequence_length=config.data.sequence_length,
            validation_fraction=_HELD_OUT,
            overwrite=(folder / name / "data.json").is_file(),
        )


def _some(documents: Iterable[tuple[int, str]]) -> Iterator[str]:
    """So much of each file's text that a tokenizer is trained in seconds."""
    taken: dict[int, int] = {}
    for number, text in documents:
        if taken.get(number, 0) < 8 << 20:
            taken[number] = taken.get(number, 0) + len(text)
            yield text


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Only one bench at a time works in a directory."""
    from megaloop.runs.directory import lock

    directory.mkdir(parents=True, exist_ok=True)
    with lock(directory):
        yield


@contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM ends the bench as Ctrl-C does: the runs save first."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress() -> Iterator[Callable[[Sequence[Job]], None]]:
    """A live table on a terminal; elsewhere a line for each run that changes, and for those under way once a minute."""
    if sys.stderr.isatty():
        with Live(console=SafeConsole(stderr=True), refresh_per_second=2) as live:
            yield lambda work: live.update(_table(work))
        return
    shown: dict[str, tuple[str, float]] = {}

    def lines(work: Sequence[Job]) -> None:
        now = time.monotonic()
        for job in work:
            state, at = shown.get(job.name, ("waiting", now))
            if job.state != state or (job.state == "training" and now - at > _LINE_EVERY):
                shown[job.name] = (job.state, now)
                echo(f"{job.name}: {job.state}, step {job.done} of {job.steps}, {job.seconds:.0f} s", err=True)

    yield lines


def _table(work: Sequence[Job]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "", "step", "of", "minutes"):
        table.add_column(name, justify="left" if name in ("run", "") else "right")
    for job in work:
        table.add_row(job.name, job.state, str(job.done), str(job.steps), f"{job.seconds / 60:.1f}")
    return table


def _finish(base: Path, work: Sequence[Job], json: bool) -> None:
    """Write the report, and say what is in it."""
    from megaloop.report.page import write_report

    file = base / "report.html"
    title = f"What growing and looping save: {base.name}"
    print_report(write_report([job.run for job in work], file, title=title), file, json)
