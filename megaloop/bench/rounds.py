"""``megaloop bench rounds``: our pipeline rounds against stock DeepSpeed, and against fewer rounds.

A looped model: our engine, which holds each layer once, against DeepSpeed's ``TiedLayerSpec``, which puts a copy on every
rank that uses the layer and all-reduces its gradient. An unlooped model: 1, 2 and 4 rounds. All contenders are built on
the same ranks and take turns, because machines are shared and noisy; the ratios of their rates are the result.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megaloop.bench.batches import random_batches
from megaloop.bench.step import SHAPES
from megaloop.config import Config
from megaloop.depth import DepthSpec
from megaloop.errors import MegaloopError
from megaloop.layout.rounds import Rounds
from megaloop.layout.sources import InitialValues
from megaloop.layout.topology import Topology
from megaloop.parallel.engine import TrainingEngine, join_ranks
from megaloop.runtime.hardware import describe_machine
from megaloop.terminal import SafeConsole
from megaloop.text import format_bytes

if TYPE_CHECKING:
    from megaloop.bench.tied import TiedEngine

__all__ = [
    "Contender",
    "RoundsBenchmark",
    "Setting",
    "bench_rounds",
    "run_rank",
    "show",
    "wait_for_all",
]

_ROUNDS = (1, 2, 4)
"""Rounds of the unlooped model."""


@dataclass(frozen=True)
class Contender:
    """One way to train one model.

    Attributes:
        name: ``rounds`` or ``tied`` (stock DeepSpeed) of the looped model; ``unlooped, 2 rounds``.
        depth: of the model.
        passes: times that a micro-batch goes round the pipeline.
        tokens_per_second: median over the rounds of the benchmark.
        ratio: of tokens per second to those of the model's baseline (``tied``; one round), median over rounds.
        spread: smallest and largest of those ratios.
        ideal: that ratio, if ranks waited only for the pipeline to fill and drain.
        state_bytes: weights, gradients and optimizer state of the rank that holds most.
        loop_bytes: of these, those of the looped layers.
        sent_bytes: activations and gradients that go from rank to rank in a step, over all ranks.
        tied_bytes: gradients of copies that are all-reduced in a step, over all ranks; the embedding's included.
        tied_layer_bytes: of these, those of layers.
        loss: of the last step; the same within a model.
    """

    name: str
    depth: str
    passes: int
    tokens_per_second: float
    ratio: float
    spread: tuple[float, float]
    ideal: float
    state_bytes: int
    loop_bytes: int
    sent_bytes: int
    tied_bytes: int
    tied_layer_bytes: int
    loss: float


@dataclass(frozen=True)
class RoundsBenchmark:
    """What the benchmark measured.

    Attributes:
        loop_bytes_ratio: bytes of looped layers on the rank that holds most, ours as a fraction of stock DeepSpeed's.
    """

    machine: str
    shape: str
    precision: str
    pp: int
    micro_batches: int
    micro_batch: int
    sequence_length: int
    rounds: int
    loop_bytes_ratio: float
    contenders: tuple[Contender, ...]


@dataclass(frozen=True)
class Setting:
    """What is measured; see :func:`bench_rounds`."""

    shape: str
    precision: str
    pp: int
    looped: DepthSpec
    unlooped: DepthSpec
    micro_batches: int
    micro_batch: int
    sequence_length: int
    steps: int
    rounds: int

    def config(self, depth: DepthSpec, rounds: int = 1) -> Config:
        """The configuration of one contender."""
        config = Config.model_validate(
            {
                "depth": depth,
                "model": SHAPES[self.shape]["model"],
                "data": {"sources": [{"path": "synthetic"}], "sequence_length": self.sequence_length},
                "parallel": {"pp": self.pp, "rounds": rounds},
                "train": {
                    "steps": 1,
                    "global_batch": self.micro_batches * self.micro_batch,
                    "micro_batch": self.micro_batch,
                    "precision": self.precision,
                },
            }
        )
        config.check()
        config.check_world(self.pp)
        return config

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold; :meth:`from_json` reads it back."""
        return {**vars(self), "looped": str(self.looped), "unlooped": str(self.unlooped)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Setting:
        depths = {name: DepthSpec.parse(values[name]) for name in ("looped", "unlooped")}
        return cls(**{**values, **depths})


def bench_rounds(setting: Setting, start: Callable[[Path], None]) -> RoundsBenchmark:
    """Measure; the ranks leave a line on stderr after each round.

    Args:
        setting: what to measure.
        start: runs :func:`run_rank` with this directory on ``setting.pp`` new ranks, until they have ended.

    Raises:
        MegaloopError: a model that does not fit the pipeline, too few micro-batches, a depth without a loop.
    """
    if setting.shape not in SHAPES:
        raise MegaloopError(f"bench rounds: unknown shape {setting.shape!r}; choose one of {', '.join(SHAPES)}")
    if setting.pp < 2:
        raise MegaloopError("bench rounds: one rank has no pipeline; choose --pp 2 or more")
    if setting.config(setting.looped).plan.loop is None:
        raise MegaloopError(f"bench rounds: depth {setting.looped} has no loop; choose one such as 0-4x4-0")
    for rounds in _ROUNDS:
        setting.config(setting.unlooped, rounds)
    with tempfile.TemporaryDirectory(prefix="megaloop-bench-") as name:
        directory = Path(name)
        (directory / "setting.json").write_text(json.dumps(setting.to_json()), encoding="utf-8")
        start(directory)
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    contenders = tuple(Contender(**item | {"spread": tuple(item["spread"])}) for item in result["contenders"])
    by_name = {contender.name: contender for contender in contenders}
    return RoundsBenchmark(
        machine=result["machine"],
        shape=setting.shape,
        precision=setting.precision,
        pp=setting.pp,
        micro_batches=setting.micro_batches,
        micro_batch=setting.micro_batch,
        sequence_length=setting.sequence_length,
        rounds=setting.rounds,
        loop_bytes_ratio=by_name["rounds"].loop_bytes / by_name["tied"].loop_bytes,
        contenders=contenders,
    )


def show(result: RoundsBenchmark, console: Console) -> None:
    """Print what was measured, for a person."""
    console = SafeConsole(width=max(console.width, 104))
    console.print(
        f"{result.machine}; {result.shape}, {result.precision}, pp {result.pp}, {result.micro_batches} micro-batches of "
        f"{result.micro_batch} x {result.sequence_length} tokens"
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for name in ("tokens/s", "ratio", "spread", "ideal", "state/rank", "sent", "all-reduced"):
        table.add_column(name, justify="right", no_wrap=True)
    for contender in result.contenders:
        table.add_row(
            f"{contender.depth}: {contender.name.removeprefix('unlooped, ')}",
            f"{contender.tokens_per_second:,.0f}",
            f"{contender.ratio:.3f}",
            f"{contender.spread[0]:.3f}-{contender.spread[1]:.3f}",
            f"{contender.ideal:.3f}",
            format_bytes(contender.state_bytes),
            format_bytes(contender.sent_bytes),
            format_bytes(contender.tied_bytes),
        )
    console.print(table)
    console.print(
        f"bytes of looped layers on a rank: {result.loop_bytes_ratio:.3f} of stock DeepSpeed's; sent and all-reduced are "
        "per step, over all ranks"
    )


@dataclass
class _Running:
    """A contender while it is measured."""

    name: str
    baseline: str
    config: Config
    engine: TrainingEngine | TiedEngine
    passes: int
    seconds: list[float]
    loss: float = 0.0


def run_rank(directory: Path) -> None:
    """One rank's part: build all contenders, let them take turns; rank 0 leaves ``result.json`` in ``directory``."""
    setting = Setting.from_json(json.loads((directory / "setting.json").read_text(encoding="utf-8")))
    join_ranks()
    topology = Topology(pp=setting.pp)
    running = list(_build(setting, topology))
    counted = [_count_messages(contender, setting) for contender in running]  # warms up as well
    for number in range(setting.rounds):
        for contender in running:
            batches = random_batches(contender.config, contender.config.model.vocab_size or 0)
            wait_for_all()
            began = time.perf_counter()
            for _ in range(setting.steps):
                contender.loss = contender.engine.train_step(batches, 1e-4).loss
            wait_for_all()
            contender.seconds.append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            tokens = setting.steps * setting.micro_batches * setting.micro_batch * setting.sequence_length
            rates = ", ".join(f"{contender.name} {tokens / contender.seconds[-1]:,.0f}" for contender in running)
            print(f"round {number + 1}: tokens/s: {rates}", file=sys.stderr, flush=True)
    contenders = [_result(item, running, setting, messages) for item, messages in zip(running, counted, strict=True)]
    for contender in running:
        contender.engine.close()
    if dist.get_rank() == 0:
        result = {"machine": describe_machine(), "contenders": [asdict(contender) for contender in contenders]}
        (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _build(setting: Setting, topology: Topology) -> Iterator[_Running]:
    from megaloop.bench.tied import TiedEngine  # DeepSpeed, which join_ranks has loaded without its chatter

    rows = SHAPES[setting.shape]["model"]["vocab_size"]
    looped = setting.config(setting.looped)
    source = InitialValues(looped.model, 0, looped.plan, rows)
    ours = TrainingEngine(looped, looped.plan, topology, rows, source)
    yield _Running("tied", "tied", looped, TiedEngine(looped, looped.plan, topology, rows, source), 1, [])
    yield _Running("rounds", "tied", looped, ours, len(ours.slices), [])
    for rounds in _ROUNDS:
        config = setting.config(setting.unlooped, rounds)
        engine = TrainingEngine(
            config, config.plan, topology, rows, InitialValues(config.model, 0, config.plan, rows)
        )  # fmt: skip
        yield _Running(_unlooped(rounds), _unlooped(1), config, engine, rounds, [])


def _unlooped(rounds: int) -> str:
    return f"unlooped, {rounds} round{'s' if rounds > 1 else ''}"


@dataclass
class _Messages:
    """Bytes of one step, of this rank."""

    sent: int = 0
    tied: int = 0
    tied_layers: int = 0


def _count_messages(contender: _Running, setting: Setting) -> _Messages:
    """Two steps, of which the second is watched."""
    batches = random_batches(contender.config, contender.config.model.vocab_size or 0)
    contender.engine.train_step(batches, 1e-4)
    counted = _Messages()
    with _watched(counted, contender.config.model.hidden_size * (contender.config.model.vocab_size or 0)):
        contender.engine.train_step(batches, 1e-4)
    return counted


@contextmanager
def _watched(counted: _Messages, embedding: int) -> Iterator[None]:
    """Count what this rank sends point to point, and the gradients of copies that it all-reduces.

    Args:
        embedding: elements of the embedding, whose two copies both kinds of engine have.
    """
    from megaloop.parallel.deepspeed import watch_messages

    isend = dist.isend

    def sent(tensor: torch.Tensor) -> None:
        counted.sent += tensor.nbytes

    def counted_isend(
        tensor: torch.Tensor,
        dst: int | None = None,
        group: dist.ProcessGroup | None = None,
        tag: int = 0,
        group_dst: int | None = None,
    ) -> dist.Work | None:
        sent(tensor)
        return isend(tensor, dst, group, tag, group_dst)

    def tied(weight: torch.Tensor, group: dist.ProcessGroup) -> None:
        if dist.get_world_size(group) > 1:
            counted.tied += 4 * weight.numel()  # gradients are summed in fp32
            counted.tied_layers += 4 * weight.numel() * (weight.numel() != embedding)

    with watch_messages(sent, tied):
        dist.isend = counted_isend
        try:
            yield
        finally:
            dist.isend = isend


def _result(item: _Running, running: list[_Running], setting: Setting, messages: _Messages) -> Contender:
    baseline = next(other for other in running if other.name == item.baseline)
    tokens = setting.steps * setting.micro_batches * setting.micro_batch * setting.sequence_length
    ratios = [theirs / ours for ours, theirs in zip(item.seconds, baseline.seconds, strict=True)]
    plan, loop = item.config.plan, item.config.plan.loop
    looped = set(plan.order[loop.start : loop.start + loop.block]) if loop else set()
    total, in_loop = _state_bytes(item, looped)

    def waits(contender: _Running) -> float:
        return 1 - Rounds(setting.pp, setting.micro_batches, contender.passes).bubble

    return Contender(
        name=item.name,
        depth=plan.notation,
        passes=item.passes,
        tokens_per_second=tokens / statistics.median(item.seconds),
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        ideal=waits(item) / waits(baseline),
        state_bytes=_over_ranks(total, dist.ReduceOp.MAX),
        loop_bytes=_over_ranks(in_loop, dist.ReduceOp.MAX),
        sent_bytes=_over_ranks(messages.sent, dist.ReduceOp.SUM),
        tied_bytes=_over_ranks(messages.tied, dist.ReduceOp.SUM),
        tied_layer_bytes=_over_ranks(messages.tied_layers, dist.ReduceOp.SUM),
        loss=item.loss,
    )


def _state_bytes(contender: _Running, looped: set[int]) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer state of this rank, and of these those of the looped layers.

    By parameter, without the padding of ZeRO's shares: in the training dtype, 4 bytes of gradient (in bf16 6), 12 of
    masters and moments.
    """
    per_element = 2 + 6 + 12 if contender.config.train.precision == "bf16" else 4 + 4 + 12
    if not isinstance(contender.engine, TrainingEngine):
        everything = sum(parameter.numel() for parameter in contender.engine.module.parameters())
        mine = sum(parameter.numel() for parameter in contender.engine.layer_parameters(looped))
    else:
        everything = sum(local.parameter.numel() for local in contender.engine.parameters)
        names = {f"layers.{layer_id}." for layer_id in looped}
        mine = sum(
            local.parameter.numel()
            for local in contender.engine.parameters
            if local.name.startswith(tuple(names) or "-")
        )
    return per_element * everything, per_element * mine


def _over_ranks(value: int, operation: dist.ReduceOp.RedOpType) -> int:
    total = torch.tensor(value, dtype=torch.int64)
    if torch.cuda.is_available():
        total = total.cuda()
    dist.all_reduce(total, op=operation)
    return int(total)


def wait_for_all() -> None:
    """Until every rank, and its GPU, is here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
