"""``megaloop bench reshard``: a growth in flight against saving, stopping, starting and growing on load.

Both do the same growth of the same run, on fresh ranks each time and in turns; batches are made up, so no data is
needed. The bandwidth between ranks is measured on the same ranks, right after the growth.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megaloop.bench.batches import random_batches
from megaloop.checkpoint import Checkpoint, CheckpointInfo, RunState, save_checkpoint
from megaloop.config import Config
from megaloop.depth import GrowthStage
from megaloop.errors import MegaloopError
from megaloop.layout.sources import GrownState, InitialValues
from megaloop.layout.topology import Topology
from megaloop.parallel.engine import TrainingEngine, join_ranks
from megaloop.parallel.live import reshard
from megaloop.runtime.device import local_device
from megaloop.runtime.hardware import describe_machine

__all__ = ["ReshardBenchmark", "Role", "bench_reshard", "run_rank"]

Role = Literal["live", "save", "load"]
_BUFFER = 64 << 20
"""Bytes that each rank sends when the bandwidth is measured."""
_STEPS = 2
"""Optimizer steps before the growth: all memory has been used by then."""


@dataclass(frozen=True)
class ReshardBenchmark:
    """What the benchmark measured; seconds and bandwidth are medians over the rounds.

    Attributes:
        pause: seconds of a growth in flight, from the last step before it to the first one after.
        build: of these, building the new engine.
        exchange: of these, copying and moving the state.
        moved_bytes: all that moves; ``received_bytes``: the most that one rank receives.
        in_place_bytes: what ranks need and hold already, over all ranks.
        bandwidth: bytes per second that a rank receives while it sends as much, point to point.
        bound: received_bytes / bandwidth + build: what a pause cannot be shorter than.
        over_bound: pause / bound.
        restart: seconds of save + stop + start + grow on load for the same growth; None where not asked for.
        ratio: restart / pause, the median over rounds.
        spread: smallest and largest of those ratios.
    """

    machine: str
    precision: str
    layers: tuple[int, int]
    topology: tuple[str, str]
    ranks: int
    rounds: int
    pause: float
    build: float
    exchange: float
    moved_bytes: int
    received_bytes: int
    in_place_bytes: int
    bandwidth: float
    bound: float
    over_bound: float
    restart: float | None
    ratio: float | None
    spread: tuple[float, float] | None


@dataclass(frozen=True)
class _Live:
    """What one growth in flight told."""

    pause: float
    build: float
    exchange: float
    moved: int
    received: int
    in_place: int
    bandwidth: float
    machine: str


def bench_reshard(
    config: Config,
    ranks: int,
    start: Callable[[Role, Path, int], None],
    *,
    stage: int | None = None,
    rounds: int = 3,
    restart: bool = True,
    on_round: Callable[[int, float, float | None], None] | None = None,
) -> ReshardBenchmark:
    """Measure one growth of a run.

    Args:
        config: has a ``growth`` and a ``model.vocab_size``.
        start: runs :func:`run_rank` with these arguments on ``ranks`` new ranks, until they have ended.
        stage: number of the stage to grow into, from 1; default: the last.
        restart: measure the other way too.
        on_round: told its number, the pause and the restart's seconds after each round.

    Raises:
        MegaloopError: the run does not grow, or has no such stage.
    """
    last = len(config.stages) - 1
    number = last if stage is None else stage
    if config.growth is None or not 1 <= number <= last:
        grows = f"it has stages 1 to {last} to grow into" if last else "the run does not grow: set growth"
        raise MegaloopError(f"bench reshard: no growth into stage {number}; {grows}")
    if config.model.vocab_size is None:
        raise MegaloopError("bench reshard: model.vocab_size is empty; set it, for example model.vocab_size=4096")
    config.check_world(ranks)
    lives: list[_Live] = []
    restarts: list[float] = []
    for index in range(rounds):
        with tempfile.TemporaryDirectory(prefix="megaloop-bench-") as name:
            directory = Path(name)
            (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            start("live", directory, number)
            lives.append(_Live(**json.loads((directory / "live.json").read_text())))
            if restart:
                start("save", directory, number)
                start("load", directory, number)
                began, ended = (json.loads((directory / f"{role}.json").read_text()) for role in ("save", "load"))
                restarts.append(ended["time"] - began["time"])
        if on_round is not None:
            on_round(index + 1, lives[-1].pause, restarts[-1] if restart else None)
    build, pause, bandwidth = (
        statistics.median(getattr(live, key) for live in lives) for key in ("build", "pause", "bandwidth")
    )
    bound = lives[0].received / bandwidth + build
    ratios = [other / live.pause for live, other in zip(lives, restarts, strict=False)]
    before, after = config.stages[number - 1], config.stages[number]
    return ReshardBenchmark(
        machine=lives[0].machine,
        precision=config.train.precision,
        layers=(before.plan.layers, after.plan.layers),
        topology=(str(_topology(config, before, ranks)), str(_topology(config, after, ranks))),
        ranks=ranks,
        rounds=rounds,
        pause=pause,
        build=build,
        exchange=statistics.median(live.exchange for live in lives),
        moved_bytes=lives[0].moved,
        received_bytes=lives[0].received,
        in_place_bytes=lives[0].in_place,
        bandwidth=bandwidth,
        bound=bound,
        over_bound=pause / bound,
        restart=statistics.median(restarts) if restarts else None,
        ratio=statistics.median(ratios) if ratios else None,
        spread=(min(ratios), max(ratios)) if ratios else None,
    )


def run_rank(role: Role, directory: Path, stage: int) -> None:
    """One rank's part: grow in flight; or train and save; or load and grow. Rank 0 leaves ROLE.json in ``directory``."""
    from megaloop.config import load_config

    config = load_config(directory / "config.yaml")
    join_ranks()
    before, after = config.stages[stage - 1], config.stages[stage]
    if role == "load":
        result = _load(config, before, after, directory)
    else:
        engine = _engine(config, before, InitialValues(config.model, config.seed, before.plan, _rows(config)))
        batches = random_batches(config, _rows(config))
        for _ in range(_STEPS):
            engine.train_step(batches, config.optimizer.lr)
        _wait()
        result = _grow(config, engine, after) if role == "live" else _save(config, engine, directory)
    if dist.get_rank() == 0:
        (directory / f"{role}.json").write_text(json.dumps(result))


def _grow(config: Config, engine: TrainingEngine, after: GrowthStage) -> dict[str, Any]:
    assert config.growth is not None
    world = dist.get_world_size()
    resharded = reshard(engine, after.growth, _topology(config, after, world), _STEPS, moments=config.growth.moments)
    resharded.engine.train_step(random_batches(config, _rows(config)), config.optimizer.lr)
    received = resharded.plan.received()
    live = _Live(
        pause=resharded.seconds,
        build=resharded.build_seconds,
        exchange=resharded.exchange_seconds,
        moved=sum(received),
        received=max(received),
        in_place=sum(resharded.plan.in_place),
        bandwidth=_bandwidth(),
        machine=describe_machine(),
    )
    return asdict(live)


def _save(config: Config, engine: TrainingEngine, directory: Path) -> dict[str, Any]:
    began = time.time()
    info = CheckpointInfo(
        run=RunState.fresh(config.seed).model_copy(update={"step": _STEPS}), plan=engine.plan, model=config.model, growth=None,
        topology=engine.topology,
        precision=config.train.precision, config=config.model_dump(mode="json"),
    )  # fmt: skip
    save_checkpoint(directory / "checkpoint", engine.pieces(), info)
    return {"time": began}


def _load(config: Config, before: GrowthStage, after: GrowthStage, directory: Path) -> dict[str, Any]:
    assert config.growth is not None
    if dist.get_rank() == 0:
        Checkpoint.open(directory / "checkpoint", verify="checksums").close()
    dist.barrier()
    with Checkpoint.open(directory / "checkpoint") as checkpoint:
        fresh = InitialValues(config.model, config.seed, after.plan, _rows(config))
        engine = _engine(config, after, GrownState(checkpoint, after.growth, fresh, config.growth.moments), _STEPS)
    _wait()
    ready = time.time()
    engine.train_step(random_batches(config, _rows(config)), config.optimizer.lr)
    return {"time": ready}


def _engine(config: Config, stage: GrowthStage, source: Any, step: int = 0) -> TrainingEngine:
    topology = _topology(config, stage, dist.get_world_size())
    return TrainingEngine(config, stage.plan, topology, _rows(config), source, step)


def _topology(config: Config, stage: GrowthStage, ranks: int) -> Topology:
    return Topology(*config.topology(ranks, stage.plan.layers))


def _rows(config: Config) -> int:
    return config.model.vocab_size or 0


def _bandwidth() -> float:
    """Bytes per second that a rank receives from the rank before it while it sends as much to the next; best of 5."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return float("inf")
    outgoing, incoming = (torch.ones(_BUFFER // 4, device=local_device()) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first one connects
        _wait()
        began = time.perf_counter()
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, outgoing, (rank + 1) % world),
                dist.P2POp(dist.irecv, incoming, (rank - 1) % world),
            ]
        )
        for request in requests:
            request.wait()
        _wait()
        best = min(best, time.perf_counter() - began)
    return _BUFFER / best


def _wait() -> None:
    """Until every rank, and its GPU, is here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
