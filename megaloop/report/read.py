"""What a run directory says: curves, boundaries, costs and evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megaloop.errors import MegaloopError
from megaloop.evaluation.records import EVALUATION, Record, read_records
from megaloop.train.metrics import EVENTS, METRICS

__all__ = ["Boundary", "Run", "read_run"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Boundary:
    """A change of depth.

    Attributes:
        step: optimizer steps done before it.
        layers, depth: after it: unique layers, and layers executed.
        loss_before, loss_after: validation losses around it, nats per token; None where not measured.
    """

    step: int
    layers: int
    depth: int
    loss_before: float | None
    loss_after: float | None


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        config: the resolved configuration.
        step, tokens, flops, seconds, loss: of each optimizer step; all but the loss are counted from the beginning.
        val_at: indices of steps that validation followed; val_loss (nats per token) and val_bits (per byte) of them.
        start: the last ``start`` event.
        evaluations: of the newest step that was evaluated.
    """

    path: Path
    name: str
    config: dict[str, Any]
    step: Array
    tokens: Array
    flops: Array
    seconds: Array
    loss: Array
    val_at: NDArray[np.int64]
    val_loss: Array
    val_bits: Array
    layers: int
    depth: int
    ranks: int
    memory_bytes: int
    boundaries: tuple[Boundary, ...]
    start: dict[str, Any]
    restarts: int
    rollbacks: int
    evaluations: tuple[Record, ...]

    @property
    def steps(self) -> int:
        """Steps that the configuration asks for."""
        return int(self.config["train"]["steps"])

    @property
    def finished(self) -> bool:
        return int(self.step[-1]) >= self.steps


def read_run(path: Path) -> Run:
    """Read a run.

    Raises:
        MegaloopError: no run there, one without a step, or a configuration that cannot be read.
    """
    if not path.is_dir():
        raise MegaloopError(f"report: {path} is no directory; give run directories, which hold {METRICS}")
    if not (path / METRICS).is_file():
        raise MegaloopError(f"report: {path} holds no {METRICS}; give run directories that megaloop train wrote")
    config = _config(path)
    records = list(_lines(path / METRICS, "step"))
    if not records:
        raise MegaloopError(f"report: {path / METRICS} holds no step yet; wait for the run's first, or leave it out")
    events = list(_lines(path / EVENTS, "event"))
    starts = [event for event in events if event["event"] == "start"]
    validated = [index for index, record in enumerate(records) if isinstance(record.get("val_loss"), int | float)]
    last = records[-1]
    return Run(
        path=path,
        name=str(config.get("name", path.name)),
        config=config,
        step=_column(records, "step"),
        tokens=_column(records, "tokens"),
        flops=_column(records, "flops"),
        seconds=np.nancumsum(_column(records, "seconds")),
        loss=_column(records, "loss"),
        val_at=np.array(validated, dtype=np.int64),
        val_loss=_column([records[index] for index in validated], "val_loss"),
        val_bits=_column([records[index] for index in validated], "val_bits_per_byte"),
        layers=int(last.get("layers") or 0),
        depth=int(last.get("depth") or 0),
        ranks=int(last.get("pp", 1)) * int(last.get("tp", 1)) * int(last.get("dp", 1)),
        memory_bytes=max(int(record.get("memory_bytes") or 0) for record in records),
        boundaries=tuple(_boundaries(events)),
        start=starts[-1] if starts else {},
        restarts=max(len(starts) - 1, 0),
        rollbacks=sum(event["event"] == "rollback" for event in events),
        evaluations=_evaluations(path),
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise MegaloopError(
            f"report: {path / 'config.yaml'} cannot be read; give run directories of megaloop train"
        ) from None
    if not isinstance(config, dict) or not isinstance((config.get("train") or {}).get("steps"), int):
        raise MegaloopError(f"report: {path / 'config.yaml'} is no configuration of a run")
    return config


def _lines(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """The objects of a file that have a key; lines that a crash tore are passed over."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and key in value:
                yield value


def _column(records: list[dict[str, Any]], key: str) -> Array:
    """Numbers; what is none (a loss that was not finite) is a gap."""
    values = (record.get(key) for record in records)
    return np.array([float(value) if isinstance(value, int | float) else math.nan for value in values])


def _boundaries(events: list[dict[str, Any]]) -> Iterator[Boundary]:
    last: dict[int, Boundary] = {}  # a run that went back passes a boundary again
    for event in events:
        if event["event"] not in ("grow", "loop") or not isinstance(event.get("plan"), dict):
            continue
        order = event["plan"].get("order", [])
        step = int(event.get("step", 0))
        last[step] = Boundary(step, len(set(order)), len(order), event.get("loss_before"), event.get("loss_after"))
    yield from (last[step] for step in sorted(last))


def _evaluations(path: Path) -> tuple[Record, ...]:
    records = read_records(path / EVALUATION)
    newest = max((subject.step for subject in records), default=0)
    return tuple(record for subject, record in records.items() if subject.step == newest)
