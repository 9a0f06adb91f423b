"""``megaloop bench savings``: what growing and looping save, on your data, at your size."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
    from megaloop.bench.lr_sweep import LrSweep
    from megaloop.bench.savings import Job
    from megaloop.config import Config

__all__ = ["bench_savings"]

_MOST_SEEDS = 1000
"""A sweep of learning rates has the seed after them."""
_LINE_EVERY = 60.0
"""Seconds between two lines of progress where there is no terminal."""


_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override values of all contenders: train.steps=2000"),
]
_Preset = Annotated[
    str,
    typer.Option(
        help="cpu or gpu (text and problems), reasoning (p-hop induction by number of hops), or a configuration of yours: the "
        "full-depth model, with growth."
    ),
]
_Contenders = Annotated[
    str | None,
    typer.Option(
        help="Some of baseline, baseline-matched, midas, lidas, late-stack, looped, looped-full, looped-params, iso-params, "
        "iso-params-middle, lidas+loop, lns, lns+lidas. Default: all but late-stack, looped-full and the two iso-params; of the preset "
        "reasoning all but looped-params and the two with lns."
    ),
]
_Seeds = Annotated[int, typer.Option(min=1, max=_MOST_SEEDS, help="Runs of each contender, with seeds of their own.")]
_Out = Annotated[
    Path | None, typer.Option(help="Directory of the runs and of the report; default: runs/savings-PRESET.")
]
_Text = Annotated[
    list[Path] | None,
    typer.Option(help="Text that the cpu and gpu presets train on; default: the King James Bible (extra demo)."),
]
_Jobs = Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one per core, or one on a GPU.")]
_Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.1, callback=finite, help="Save and leave after so long, with exit code 75; the same command goes on."
    ),
]
_Rates = Annotated[
    str | None,
    typer.Option(
        metavar="RATES",
        help="First train each contender briefly at each of these learning rates, and use its best: 1e-3,2e-3,4e-3.",
    ),
]
_RateSteps = Annotated[
    int | None, typer.Option(min=1, help="Steps of each run of --lr-sweep; default: 40% of train.steps.")
]

_RateSeeds = Annotated[
    int | None,
    typer.Option(min=1, max=_MOST_SEEDS, help="Runs of --lr-sweep at each rate, whose mean decides. Default: 1."),
]


def bench_savings(
    overrides: _Overrides = None,
    preset: _Preset = "cpu",
    contenders: _Contenders = None,
    seeds: _Seeds = 1,
    out: _Out = None,
    text: _Text = None,
    jobs: _Jobs = None,
    minutes: _Minutes = None,
    lr_sweep: _Rates = None,
    lr_steps: _RateSteps = None,
    lr_seeds: _RateSeeds = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Questions of each reasoning primitive. Default: 250.")
    ] = None,
    shots: Annotated[str | None, typer.Option(help="Numbers of shots of the k-shot curves. Default: 0,2,5.")] = None,
    loops: Annotated[
        str | None,
        typer.Option(
            help="How often the middle block runs at inference (data with targets: every block in turn). Default: 1,2,3 (1,2,3,4,5)."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train contenders on the same samples, evaluate them, and report what growing and looping save.

    A killed bench goes on where it was when it is started again. Each contender's run is an ordinary run directory.
    """
    from megaloop.bench.contenders import check_different, contender
    from megaloop.bench.savings import Plan, prepare_jobs
    from megaloop.cli.savings_data import configuration, evaluation_of, prepare_data

    limit = _Limit(minutes)
    names = _names(preset, contenders)
    base = out or Path("runs") / f"savings-{Path(preset).stem}"
    config = configuration(preset, base / "data", text, overrides)
    sweep = _sweep(lr_sweep, lr_steps, lr_seeds, config)
    for name in names:  # what does not fit is said before data is made, whatever its vocabulary will be
        contender(config, name, 1)
    with _held(base):
        prepare_data(preset, config, base / "data", text or [], begun=Plan.is_kept(base))
        evaluation = evaluation_of(preset, config, base / "data", examples, shots, loops)
        vocab_size = _vocabulary(config)
        made = [contender(config, name, vocab_size) for name in names]
        check_different(dict(zip(names, made, strict=True)))
        Plan(config.model_dump(mode="json"), vocab_size, None if sweep is None else sweep.to_json()).keep(base)
        _check_flops(made, vocab_size)
        rates = None if sweep is None else _best_rates(sweep, config, vocab_size, base, names, jobs, limit)
        work = prepare_jobs(config, vocab_size, base, contenders=names, seeds=seeds, evaluation=evaluation, rates=rates)
        _work_off(work, base, jobs, limit)
    _finish(base, work, json)


class _Limit:
    """What is left of ``--minutes``, from now on."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self._began = time.monotonic()

    @property
    def seconds(self) -> float | None:
        """From now; None: there is no limit."""
        return None if self.minutes is None else max(self.minutes * 60 - (time.monotonic() - self._began), 1.0)


def _names(preset: str, contenders: str | None) -> list[str]:
    """The contenders that are asked for, each once; those of the preset, if nobody asks."""
    from megaloop.bench.contenders import CONTENDERS, DEFAULTS, GROWING_AND_LOOPING

    if contenders is None:
        return list(DEFAULTS.get(preset, GROWING_AND_LOOPING))
    names = list(dict.fromkeys(name.strip() for name in contenders.split(",") if name.strip()))
    if not names:
        raise MegaloopError(f"bench savings: --contenders names none; choose from {', '.join(CONTENDERS)}")
    return names


def _sweep(rates: str | None, steps: int | None, seeds: int | None, config: Config) -> LrSweep | None:
    """What ``--lr-sweep``, ``--lr-steps`` and ``--lr-seeds`` ask for; None: nothing."""
    from megaloop.bench.lr_sweep import LrSweep

    if rates is not None:
        return LrSweep.parse(rates, steps, config, seeds or 1)
    for option, value in (("--lr-steps", steps), ("--lr-seeds", seeds)):
        if value is not None:
            raise MegaloopError(f"{option} is for --lr-sweep; give learning rates, or leave it out")
    return None


def _best_rates(
    sweep: LrSweep,
    config: Config,
    vocab_size: int,
    base: Path,
    names: Sequence[str],
    jobs: int | None,
    limit: _Limit,
) -> dict[str, float]:
    """Each contender's best learning rate, by short runs; says what it is."""
    from megaloop.bench.lr_sweep import Trials

    trials = Trials(config, vocab_size, base, contenders=names, sweep=sweep)
    _work_off(trials.jobs, base, jobs, limit, what="short runs", on_change=trials.keep)
    found = trials.results()
    for name, result in found.items():
        echo(f"{name}: {result.text}", err=True)
    return {name: result.chosen for name, result in found.items() if result.chosen is not None}


def _work_off(
    work: Sequence[Job],
    base: Path,
    jobs: int | None,
    limit: _Limit,
    *,
    what: str = "runs",
    on_change: Callable[[Sequence[Job]], None] | None = None,
) -> None:
    """Do it all, or leave with exit code 75 when the time is up."""
    from launchers.rank import LAUNCHER
    from megaloop.bench.savings import Runner

    follow = {LAUNCHER: str(os.getpid())}  # runs of a bench that is killed outright would stand in the way of the next

    with _progress() as show, _terminating():

        def changed(work: Sequence[Job]) -> None:
            show(work)
            if on_change is not None:
                on_change(work)

        runner = Runner(work, jobs or _at_once(), base, limit=limit.seconds, environment=follow, on_change=changed)
        finished = runner.run()
    if not finished:
        left = sum(not job.is_over for job in work)
        echo(
            f"saved after {limit.minutes:g} minutes; {left} of {len(work)} {what} are left: the same command goes on",
            err=True,
        )
        raise typer.Exit(CONTINUE)


def _at_once() -> int:
    from launchers.local import gpu_count

    return 1 if gpu_count() else max(os.cpu_count() or 1, 1)


def _vocabulary(config: Config) -> int:
    from megaloop.data import embedding_rows, open_sources

    return embedding_rows(config, open_sources(config.data))


def _check_flops(configs: Sequence[Config], vocab_size: int) -> None:
    """Compare the accountant with torch's counter at the depth that each contender ends with."""
    from megaloop.bench.contenders import counted_flops

    if max(config.plan.layers for config in configs) * configs[0].model.hidden_size > 24 * 1024:
        return  # building models of this size for it takes longer than it is worth; the tests count as well
    seen = set()
    for config in configs:
        if (depth := config.stages[-1].plan.notation) in seen:
            continue
        seen.add(depth)
        ours, theirs = counted_flops(config, vocab_size)
        if ours != theirs:
            raise MegaloopError(
                f"bench savings: of depth {depth} torch counts {theirs} FLOPs, and megaloop {ours}; a bug"
            )
    echo(f"FLOPs of depths {', '.join(sorted(seen))} are what torch.utils.flop_counter counts", err=True)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Only one bench at a time works in a directory."""
    from megaloop.runs.directory import lock

    directory.mkdir(parents=True, exist_ok=True)
    with lock(directory):
        yield


@contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM, and the end of a terminal (not under nohup), end the bench as Ctrl-C does: the runs save first."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


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
    print_report(write_report([job.run for job in work], file, title=title, lr_sweep=base), file, json)
