"""Real runs of the training loop, small, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megaloop.train.loop as loop
from megaloop.config import Config
from megaloop.data import BatchLoader, MicroBatch
from megaloop.parallel.engine import StepResult, TrainingEngine

__all__ = ["configuration", "metrics", "train", "train_with_a_drifting_replica"]


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


def train(values: dict[str, Any], resume: bool = False) -> list[int]:
    """Run on this rank; returns the global sample numbers that it trained on."""
    _TAKEN.clear()
    loop.BatchLoader = _Recording  # type: ignore[attr-defined]
    try:
        loop.run(Config.model_validate(values), resume=resume)
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
            local = next(each for each in engine.parameters if each.name == name)
            local.parameter.data.view(-1)[0] += 1e-4
        return result

    TrainingEngine.train_step = drifting  # type: ignore[method-assign, assignment]
    try:
        return train(values)
    finally:
        TrainingEngine.train_step = taken  # type: ignore[method-assign]


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
