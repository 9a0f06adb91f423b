"""Real runs of the training loop, small, on real ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

import megaloop.parallel.live as live
import megaloop.train.loop as loop
from megaloop.checkpoint import CheckpointInfo, RunState, save_checkpoint
from megaloop.config import Config
from megaloop.data import BatchLoader, MicroBatch
from megaloop.data.order import CURRENT
from megaloop.depth import Growth
from megaloop.layout.topology import Topology
from megaloop.parallel.engine import StepResult, TrainingEngine
from megaloop.parallel.live import Resharded
from megaloop.runs.allow import Allow
from tests import processes
from tests.processes import Command

__all__ = [
    "configuration",
    "events",
    "hold",
    "losses",
    "metrics",
    "pace",
    "release",
    "start",
    "start_held",
    "steps_done",
    "train",
    "train_dying_in_growth",
    "train_keeping_growths",
    "train_on_bad_samples",
    "train_with_a_drifting_replica",
    "wait_for",
]


def configuration(
    data: Path, directory: Path, layout: tuple[int, int, int] = (1, 1, 1), **changes: Any
) -> dict[str, Any]:
    """A tiny run on pp x tp x dp ranks; ``section__key=value`` changes a field."""
    pp, tp, dp = layout
    values: dict[str, Any] = {
        "run_dir": str(directory),
        "depth": "3",
        "model": {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64},
        "data": {"sources": [{"path": str(data)}], "sequence_length": 32},
        "parallel": {"pp": pp, "tp": tp, "dp": dp},
        "train": {"steps": 20, "global_batch": 4, "micro_batch": 1, "precision": "fp32"},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 4},
        "validation": {"every": 10, "samples": 4},
        "checkpoint": {"every": 10, "keep": 5},
        "logging": {"tensorboard": False, "every": 100},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            values[section][field] = value
        else:
            values[section] = value
    return values


class _Recording(BatchLoader):
    """A loader that remembers which samples the run took (not those that it only read ahead)."""

    def __next__(self) -> MicroBatch:
        batch = super().__next__()
        _TAKEN.extend(batch.sample_ids)
        return batch


_TAKEN: list[int] = []


def train(values: dict[str, Any], resume: bool = False, allowed: Sequence[Allow] = ()) -> list[int]:
    """Run on this rank; returns the global sample numbers that it trained on."""
    _TAKEN.clear()
    loop.BatchLoader = _Recording  # type: ignore[attr-defined]
    try:
        loop.run(Config.model_validate(values), resume=resume, allowed=allowed)
    finally:
        loop.BatchLoader = BatchLoader  # type: ignore[attr-defined]
    return list(_TAKEN)


def train_with_a_drifting_replica(values: dict[str, Any], name: str, step: int) -> list[int]:
    """Run on this rank; on rank 1, one weight changes by itself after ``step``."""
    taken = TrainingEngine.train_step
    count = 0

    def drifting(engine: TrainingEngine, *arguments: Any) -> StepResult:
        nonlocal count
        result = taken(engine, *arguments)
        count += 1
        if count == step and dist.get_rank() == 1:
            local = next(parameter for parameter in engine.parameters if parameter.name == name)
            local.parameter.data.view(-1)[0] += 1e-4
        return result

    TrainingEngine.train_step = drifting  # type: ignore[method-assign, assignment]
    try:
        return train(values)
    finally:
        TrainingEngine.train_step = taken  # type: ignore[method-assign]


def train_on_bad_samples(
    values: dict[str, Any], bad: Sequence[int], added: float = math.inf, resume: bool = False
) -> list[int]:
    """Run on this rank; the loss of each micro-batch that holds one of the samples is ``added`` too high.

    An infinite loss by addition has finite gradients: the harder case.
    """
    from megaloop.parallel.pipeline import PipelinedDecoder  # imports DeepSpeed, which only ranks need

    plainly = PipelinedDecoder._loss

    def spoiled(*arguments: Any) -> torch.Tensor:
        loss = plainly(*arguments)
        # the rank with the loss has read its micro-batch right before
        return loss + added if torch.is_grad_enabled() and set(_TAKEN[-1:]) & set(bad) else loss

    PipelinedDecoder._loss = spoiled  # type: ignore[method-assign, assignment]
    try:
        return train(values, resume)
    finally:
        PipelinedDecoder._loss = plainly  # type: ignore[method-assign]


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def train_keeping_growths(values: dict[str, Any], keep: str) -> list[int]:
    """Run on this rank; saves the state right before and right after each growth in flight to KEEP/{before,after}-N."""
    config = Config.model_validate(values)
    plainly = live.reshard

    def keeping(engine: TrainingEngine, growth: Growth, topology: Topology, step: int, **options: Any) -> Resharded:
        _keep(Path(keep) / f"before-{step}", engine, config, step)
        resharded = plainly(engine, growth, topology, step, **options)
        _keep(Path(keep) / f"after-{step}", resharded.engine, config, step)
        return resharded

    loop.reshard = keeping  # type: ignore[attr-defined]
    try:
        return train(values)
    finally:
        loop.reshard = plainly  # type: ignore[attr-defined]


def _keep(directory: Path, engine: TrainingEngine, config: Config, step: int) -> None:
    samples = step * config.train.global_batch
    info = CheckpointInfo(
        run=RunState(
            step=step,
            samples=samples,
            tokens=samples * config.data.sequence_length,
            flops=0,
            skipped=0,
            seed=config.seed,
            order_version=CURRENT,
        ),
        plan=engine.plan,
        model=config.model.model_copy(update={"vocab_size": engine.vocab_size}),
        topology=engine.topology,
        precision=config.train.precision,
        config={},
        growth=None,
    )
    save_checkpoint(directory, engine.pieces(), info)


def train_dying_in_growth(values: dict[str, Any], moment: str) -> None:
    """Run on this rank; the last rank is killed during the first growth, at the ``moment`` build or exchange."""
    taken: Any = getattr(live, {"build": "TrainingEngine", "exchange": "exchange"}[moment])

    def dying(*arguments: Any, **options: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return taken(*arguments, **options)

    setattr(live, {"build": "TrainingEngine", "exchange": "exchange"}[moment], dying)
    train(values)


def events(directory: Path, state_name: str) -> list[dict[str, Any]]:
    """The events of a kind of a run."""
    everything = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [event for event in everything if event["event"] == state_name]


def losses(directory: Path) -> list[float]:
    """The loss of each step of a run, which its metrics must hold exactly once and in order."""
    records = metrics(directory)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1)), "each step exactly once"
    return [record["loss"] for record in records]


def start(values: dict[str, Any], folder: Path, *arguments: str, **options: Any) -> Command:
    """``megaloop train``, as a user starts it."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return processes.start("train", path, *arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def hold(folder: Path) -> None:
    """A run's ``setup``: it stands before each step S for which there is a file ``hold-S``, until that is gone."""
    plainly = TrainingEngine.train_step
    count = 0

    def held(engine: TrainingEngine, *arguments: Any) -> StepResult:
        nonlocal count
        count += 1
        while (folder / f"hold-{count}").exists():
            time.sleep(0.01)
        return plainly(engine, *arguments)

    TrainingEngine.train_step = held  # type: ignore[method-assign, assignment]


def pace(seconds: float) -> None:
    """A run's ``setup``: each of its steps takes at least so long."""
    plainly = TrainingEngine.train_step

    def slowly(engine: TrainingEngine, *arguments: Any) -> StepResult:
        time.sleep(seconds)
        return plainly(engine, *arguments)

    TrainingEngine.train_step = slowly  # type: ignore[method-assign, assignment]


def start_held(values: dict[str, Any], folder: Path, step: int, *arguments: str, **options: Any) -> Command:
    """A run that stands after ``step`` steps, which it has done when this returns; ``release`` lets it go on."""
    (folder / f"hold-{step + 1}").touch()
    process = start(values, folder, *arguments, setup=hold, setup_arguments=(folder,), **options)
    wait_for(lambda: steps_done(Path(values["run_dir"])) == step, process)
    return process


def release(folder: Path) -> None:
    """Let a run that stands go on."""
    for path in folder.glob("hold-*"):
        path.unlink()


def wait_for(condition: Any, process: Command, seconds: float = 300) -> None:
    """Wait while the process lives and the condition does not hold."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate(60)[0].decode()
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.02)


def steps_done(directory: Path) -> int:
    """Lines of ``metrics.jsonl``."""
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
