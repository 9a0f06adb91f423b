"""``megaloop bench checkpoint``: what a save costs training, waited for and in the background, and how fast bytes move.

Each round, on the same engine and in turns: training steps undisturbed, a save that is waited for, a save in the background with
training steps while it is written, reading the checkpoint back, and copying its files. Batches are made up, so no data is needed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaloop.bench.batches import random_batches
from megaloop.checkpoint import BackgroundSaver, Checkpoint, CheckpointInfo, RunState, save_checkpoint
from megaloop.config import Config
from megaloop.errors import MegaloopError
from megaloop.files import fsync_path
from megaloop.layout.sources import InitialValues
from megaloop.layout.topology import Topology
from megaloop.parallel.engine import TrainingEngine, join_ranks
from megaloop.runtime.collectives import gather_objects
from megaloop.runtime.hardware import describe_machine

__all__ = ["CheckpointBenchmark", "bench_checkpoint", "run_rank"]

_WARM_UP = 2
_BYTES_PER_PARAMETER = 16
"""At most: weights, masters and two moments in fp32."""


@dataclass(frozen=True)
class CheckpointBenchmark:
    """What the benchmark measured; seconds are medians over the rounds.

    Attributes:
        bytes: of a checkpoint.
        step: seconds of a training step that nothing disturbs.
        waited: seconds for which a save that is waited for stops training.
        blocked: seconds for which one in the background does: the copy.
        stall: blocked / waited, the median over rounds, and ``stall_spread``: the smallest and the largest.
        written: seconds until the checkpoint in the background was whole.
        slowed: seconds by which the steps meanwhile took longer, all together: the thread needs a core, and memory.
        slowed_share: slowed / waited.
        save_bytes_per_second, load_bytes_per_second: waited for; every rank its own part, all together.
        copy_bytes_per_second: plain copies of the same files by rank 0, synced to disk, from the page cache.
    """

    machine: str
    precision: str
    parameters: int
    ranks: int
    rounds: int
    bytes: int
    step: float
    waited: float
    blocked: float
    stall: float
    stall_spread: tuple[float, float]
    written: float
    slowed: float
    slowed_share: float
    save_bytes_per_second: float
    load_bytes_per_second: float
    copy_bytes_per_second: float


@dataclass(frozen=True)
class _Round:
    step: float
    waited: float
    blocked: float
    written: float
    slowed: float
    loaded: float
    copied: float
    bytes: int


def bench_checkpoint(
    config: Config,
    ranks: int,
    start: Callable[[Path, Path, int], None],
    *,
    rounds: int = 5,
    directory: Path | None = None,
) -> CheckpointBenchmark:
    """Measure saving and loading at the depth with which a run ends.

    Args:
        config: has a ``model.vocab_size``.
        start: runs :func:`run_rank` with these arguments on ``ranks`` new ranks, until they have ended.
        directory: where checkpoints are written (and deleted again): on the file system to be measured.

    Raises:
        MegaloopError: no vocabulary, or too little room.
    """
    if config.model.vocab_size is None:
        raise MegaloopError("bench checkpoint: model.vocab_size is empty; set it, for example model.vocab_size=4096")
    config.check_world(ranks)
    plan = config.stages[-1].plan
    parameters = _parameters(config)
    where = directory or Path(tempfile.gettempdir())
    try:
        where.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(where).free
    except OSError as error:
        raise MegaloopError(f"bench checkpoint: {where} cannot be used ({error.strerror})") from None
    if free < (needed := 3 * _BYTES_PER_PARAMETER * parameters):
        raise MegaloopError(
            f"bench checkpoint: {where} has {free / 1e9:.1f} GB free, three checkpoints of {plan.layers} layers take up to "
            f"{needed / 1e9:.1f} GB; choose another --directory"
        )
    with tempfile.TemporaryDirectory(prefix="megaloop-bench-", dir=where) as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        start(folder / "config.yaml", folder, rounds)
        measured = [_Round(**load) for load in json.loads((folder / "rounds.json").read_text())]
        machine = (folder / "machine").read_text()

    def median(key: str) -> float:
        return statistics.median(getattr(measurement, key) for measurement in measured)

    stalls = [measurement.blocked / measurement.waited for measurement in measured]
    size = measured[0].bytes
    return CheckpointBenchmark(
        machine=machine,
        precision=config.train.precision,
        parameters=parameters,
        ranks=ranks,
        rounds=rounds,
        bytes=size,
        step=median("step"),
        waited=median("waited"),
        blocked=median("blocked"),
        stall=statistics.median(stalls),
        stall_spread=(min(stalls), max(stalls)),
        written=median("written"),
        slowed=median("slowed"),
        slowed_share=statistics.median(measurement.slowed / measurement.waited for measurement in measured),
        save_bytes_per_second=size / median("waited"),
        load_bytes_per_second=size / median("loaded"),
        copy_bytes_per_second=size / median("copied"),
    )


def _parameters(config: Config) -> int:
    from megaloop.depth.flops import parameters

    return parameters(config.stages[-1].plan, config.model, vocab_size=config.model.vocab_size or 0)


def run_rank(config_path: Path, folder: Path, rounds: int) -> None:
    """One rank's part; rank 0 leaves rounds.json in ``folder`` and tells each round on stderr."""
    from megaloop.config import load_config

    config = load_config(config_path)
    join_ranks()
    plan, rows = config.stages[-1].plan, config.model.vocab_size or 0
    topology = Topology(*config.topology(dist.get_world_size(), plan.layers))
    engine = TrainingEngine(config, plan, topology, rows, InitialValues(config.model, config.seed, plan, rows))
    batches = random_batches(config, rows)
    saver = BackgroundSaver()
    saver.prepare(engine.pieces())
    for _ in range(_WARM_UP):
        engine.train_step(batches, config.optimizer.lr)
    measured = []
    for number in range(rounds):
        measured.append(_round(config, engine, batches, saver, folder, number))
        if dist.get_rank() == 0:
            last = measured[-1]
            line = f"round {number + 1}: waited for {last.waited:.3f} s, in the background {last.blocked:.3f} s"
            print(f"{line} ({last.blocked / last.waited:.1%})", file=sys.stderr, flush=True)
    saver.close()
    if dist.get_rank() == 0:
        (folder / "rounds.json").write_text(json.dumps([asdict(measurement) for measurement in measured]))
        (folder / "machine").write_text(describe_machine())
    dist.barrier()


def _round(
    config: Config, engine: TrainingEngine, batches: Iterator[Any], saver: BackgroundSaver, folder: Path, number: int
) -> _Round:
    def steps(until: Callable[[], bool]) -> list[float]:
        """Train until all ranks say so; the seconds of each step."""
        seconds = []
        while True:
            _wait()
            began = time.perf_counter()
            engine.train_step(batches, config.optimizer.lr)
            _wait()
            seconds.append(time.perf_counter() - began)
            if all(gather_objects(until())):
                return seconds

    count = iter(range(3))
    step = statistics.median(steps(lambda: next(count) == 2))
    info = CheckpointInfo(
        run=RunState.fresh(config.seed).model_copy(update={"step": 1}), plan=engine.plan, model=config.model, growth=None,
        topology=engine.topology,
        precision=config.train.precision, config=config.model_dump(mode="json"),
    )  # fmt: skip

    def waited_for() -> tuple[float, int]:
        _wait()
        began = time.perf_counter()
        result = save_checkpoint(folder / "waited", engine.pieces(), info)
        _wait()
        return time.perf_counter() - began, result.bytes

    def in_background() -> tuple[float, float, float]:
        _wait()
        began = time.perf_counter()
        saver.start(folder / "background", engine.pieces(), info, None, lambda: None)
        _wait()
        blocked = time.perf_counter() - began
        meanwhile = steps(lambda: not saver.busy)
        saver.collect()
        return blocked, time.perf_counter() - began, max(sum(meanwhile) - len(meanwhile) * step, 0.0)

    if number % 2:  # in turns: neither has the other's garbage to wait for each time
        (blocked, written, slowed), (waited, size) = in_background(), waited_for()
    else:
        (waited, size), (blocked, written, slowed) = waited_for(), in_background()
    loaded, copied = _load(engine, folder / "waited"), _copy(folder)
    if dist.get_rank() == 0:
        for name in ("waited", "background", "copy"):
            shutil.rmtree(folder / name, ignore_errors=True)
    _wait()
    return _Round(step, waited, blocked, written, slowed, loaded, copied, size)


def _load(engine: TrainingEngine, path: Path) -> float:
    """Seconds to open a checkpoint and read what each rank needs of it."""
    _wait()
    began = time.perf_counter()
    with Checkpoint.open(path) as checkpoint:
        for piece in engine.pieces():
            checkpoint.read_piece(piece.state_name, piece.piece)
    _wait()
    return time.perf_counter() - began


def _copy(folder: Path) -> float:
    """Seconds for plain copies of the same files."""
    _wait()
    began = time.perf_counter()
    if dist.get_rank() == 0:
        for path in sorted((folder / "waited").rglob("*")):
            target = folder / "copy" / path.relative_to(folder / "waited")
            if path.is_dir():
                target.mkdir(parents=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            fsync_path(target)
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    """Until every rank, and its GPU, is here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
