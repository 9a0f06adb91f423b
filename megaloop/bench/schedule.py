"""``megaloop bench schedule``: our schedule of one round against DeepSpeed's own, in turns and to the bit.

Both train the same plan on the same ranks from the same values, with the same module, optimizer and reductions; only who
runs the passes and sends the messages differs. They take turns, because machines are shared and noisy, and either begins
in every other repetition; the ratio of their rates is the result. Where other work keeps the machine busy, the ratio of the
fastest repetitions and that of the processor time of all ranks say more. Losses and gradient norms of all steps are compared bit
for bit. It is why training has one engine: docs/DEEPSPEED.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megaloop.bench.batches import random_batches
from megaloop.bench.rounds import wait_for_all
from megaloop.bench.step import SHAPES
from megaloop.config import Config
from megaloop.data import MicroBatch
from megaloop.errors import MegaloopError
from megaloop.layout.sources import InitialValues
from megaloop.layout.topology import Topology
from megaloop.parallel.engine import StepResult, TrainingEngine, join_ranks
from megaloop.runtime.device import local_device
from megaloop.runtime.hardware import describe_machine
from megaloop.terminal import SafeConsole

__all__ = ["Comparison", "ScheduleBenchmark", "Setting", "StockEngine", "bench_schedule", "run_rank", "show"]

_LR = 1e-4


@dataclass(frozen=True)
class Comparison:
    """The two schedules in one setting.

    Attributes:
        ours, theirs: tokens per second, the median over repetitions; theirs is DeepSpeed's.
        ratio: the median over repetitions of ours / theirs.
        spread: smallest and largest of those ratios.
        best_ratio: theirs / ours in seconds of the fastest repetition of each.
        processor_ratio: the median over repetitions of theirs / ours in processor seconds of all ranks; more is better for
            us, as in ``ratio``.
        processor_spread: smallest and largest of those.
        steps: optimizer steps of each, those that warmed up included.
        identical: losses and gradient norms of all of them were the same to the last bit.
    """

    pp: int
    precision: str
    recompute: str
    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]
    best_ratio: float
    processor_ratio: float
    processor_spread: tuple[float, float]
    steps: int
    identical: bool


@dataclass(frozen=True)
class ScheduleBenchmark:
    """What the benchmark measured."""

    machine: str
    shape: str
    depth: str
    micro_batches: int
    micro_batch: int
    sequence_length: int
    repeats: int
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Setting:
    """What is measured; see :func:`bench_schedule`."""

    shape: str
    depth: str
    micro_batches: int
    micro_batch: int
    sequence_length: int
    steps: int
    repeats: int
    precisions: tuple[str, ...]
    recomputes: tuple[str, ...]

    def config(self, pp: int, precision: str, recompute: str) -> Config:
        """The configuration of one comparison."""
        config = Config.model_validate(
            {
                "depth": self.depth,
                "model": SHAPES[self.shape]["model"],
                "data": {"sources": [{"path": "synthetic"}], "sequence_length": self.sequence_length},
                "parallel": {"pp": pp},
                "train": {
                    "steps": 1,
                    "global_batch": self.micro_batches * self.micro_batch,
                    "micro_batch": self.micro_batch,
                    "precision": precision,
                    "recompute": recompute,
                },
            }
        )
        config.check()
        config.check_world(pp)
        return config


def bench_schedule(setting: Setting, pipelines: Sequence[int], start: Callable[[Path, int], None]) -> ScheduleBenchmark:
    """Measure; the ranks leave a line on stderr after each repetition.

    Args:
        setting: what to measure.
        pipelines: numbers of pipeline ranks, one after the other.
        start: runs :func:`run_rank` with this directory on so many new ranks, until they have ended.

    Raises:
        MegaloopError: an unknown shape, a model that does not fit a pipeline, a depth that takes several rounds.
    """
    if setting.shape not in SHAPES:
        raise MegaloopError(f"bench schedule: unknown shape {setting.shape!r}; choose one of {', '.join(SHAPES)}")
    for pp in pipelines:
        if pp > 1 and setting.config(pp, setting.precisions[0], setting.recomputes[0]).plan.loop is not None:
            raise MegaloopError(
                f"bench schedule: depth {setting.depth} loops over {pp} pipeline ranks in several rounds, which DeepSpeed's "
                "schedule does not have; choose a depth without a loop, or --pp 1"
            )
    comparisons: list[Comparison] = []
    machine = ""
    for pp in pipelines:
        with tempfile.TemporaryDirectory(prefix="megaloop-bench-") as name:
            directory = Path(name)
            (directory / "setting.json").write_text(json.dumps(asdict(setting)), encoding="utf-8")
            start(directory, pp)
            result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        machine = result["machine"]
        comparisons += [
            Comparison(**compared | {name: tuple(compared[name]) for name in ("spread", "processor_spread")})
            for compared in result["comparisons"]
        ]
    return ScheduleBenchmark(
        machine=machine,
        shape=setting.shape,
        depth=setting.depth,
        micro_batches=setting.micro_batches,
        micro_batch=setting.micro_batch,
        sequence_length=setting.sequence_length,
        repeats=setting.repeats,
        comparisons=tuple(comparisons),
    )


def show(result: ScheduleBenchmark, console: Console) -> None:
    """Print what was measured, for a person."""
    console = SafeConsole(width=max(console.width, 140))
    console.print(
        f"{result.machine}; {result.shape}, depth {result.depth}, {result.micro_batches} micro-batches of "
        f"{result.micro_batch} x {result.sequence_length} tokens, {result.repeats} repetitions"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in ("pp", "precision", "recompute"):
        table.add_column(name, no_wrap=True)
    for name in (
        "ours, tokens/s",
        "DeepSpeed's",
        "ratio",
        "spread",
        "of the fastest",
        "processor time",
        "losses and norms",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for comparison in result.comparisons:
        table.add_row(
            str(comparison.pp),
            comparison.precision,
            comparison.recompute,
            f"{comparison.ours:,.0f}",
            f"{comparison.theirs:,.0f}",
            f"{comparison.ratio:.3f}",
            f"{comparison.spread[0]:.3f}-{comparison.spread[1]:.3f}",
            f"{comparison.best_ratio:.3f}",
            f"{comparison.processor_ratio:.3f} ({comparison.processor_spread[0]:.3f}-{comparison.processor_spread[1]:.3f})",
            f"{'identical' if comparison.identical else 'differ'} in {comparison.steps} steps",
        )
    console.print(table)


class StockEngine(TrainingEngine):
    """The same module, optimizer and state, in DeepSpeed's own schedule; without document masking."""

    def train_step(self, batches: Iterator[MicroBatch], lr: float, iterations: int | None = None) -> StepResult:
        """One optimizer step over ``micro_batches`` items of ``batches``, as DeepSpeed orders them."""
        from megaloop.parallel.deepspeed import DeepSpeedEngine

        engine = self._engine
        assert isinstance(engine, DeepSpeedEngine)
        assert iterations is None
        engine.set_lr(lr)
        loss = engine.train_batch(batch.for_model(False) for batch in batches)
        return StepResult(float(loss), engine.grad_norm, engine.step_applied)


def run_rank(directory: Path) -> None:
    """One rank's part: all comparisons of its pipeline; rank 0 leaves ``result.json`` in ``directory``."""
    values = json.loads((directory / "setting.json").read_text(encoding="utf-8"))
    setting = Setting(**values | {name: tuple(values[name]) for name in ("precisions", "recomputes")})
    pp = join_ranks()
    comparisons = [
        _compare(setting, pp, *choice) for choice in product(setting.precisions, setting.recomputes)
    ]  # fmt: skip
    if dist.get_rank() == 0:
        result = {"machine": describe_machine(), "comparisons": [asdict(comparison) for comparison in comparisons]}
        (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")


class _Contender:
    """An engine while it is measured, on batches of its own that are everyone's."""

    def __init__(self, kind: type[TrainingEngine], config: Config, topology: Topology, rows: int):
        self.engine = kind(config, config.plan, topology, rows, InitialValues(config.model, 0, config.plan, rows))
        self.batches = random_batches(config, config.model.vocab_size or 0)
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.results: list[StepResult] = []

    def run(self, steps: int) -> None:
        """So many steps, timed together."""
        wait_for_all()
        began, worked = time.perf_counter(), time.process_time()
        self.results += [self.engine.train_step(self.batches, _LR) for _ in range(steps)]
        wait_for_all()
        self.seconds.append(time.perf_counter() - began)
        self.processor.append(_over_ranks(time.process_time() - worked))


def _over_ranks(seconds: float) -> float:
    """Collective."""
    total = torch.tensor(seconds, dtype=torch.float64, device=local_device())
    dist.all_reduce(total)
    return float(total)


def _compare(setting: Setting, pp: int, precision: str, recompute: str) -> Comparison:
    config, rows = setting.config(pp, precision, recompute), SHAPES[setting.shape]["model"]["vocab_size"]
    ours, theirs = (_Contender(kind, config, Topology(pp=pp), rows) for kind in (TrainingEngine, StockEngine))
    tokens = setting.steps * setting.micro_batches * setting.micro_batch * setting.sequence_length
    for number in range(-1, setting.repeats):  # -1 warms up
        for contender in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            contender.run(setting.steps)
        if number >= 0 and dist.get_rank() == 0:
            print(
                f"pp {pp}, {precision}, recompute {recompute}, repetition {number + 1}: tokens/s: "
                f"ours {tokens / ours.seconds[-1]:,.0f}, DeepSpeed's {tokens / theirs.seconds[-1]:,.0f}",
                file=sys.stderr,
                flush=True,
            )
    for contender in (ours, theirs):
        contender.engine.close()
        del contender.seconds[0], contender.processor[0]
    ratios = [slow / fast for fast, slow in zip(ours.seconds, theirs.seconds, strict=True)]
    work = [more / less for less, more in zip(ours.processor, theirs.processor, strict=True)]
    return Comparison(
        pp=pp,
        precision=precision,
        recompute=recompute,
        ours=tokens / statistics.median(ours.seconds),
        theirs=tokens / statistics.median(theirs.seconds),
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        best_ratio=min(theirs.seconds) / min(ours.seconds),
        processor_ratio=statistics.median(work),
        processor_spread=(min(work), max(work)),
        steps=len(ours.results),
        identical=ours.results == theirs.results,
    )
