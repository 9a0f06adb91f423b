"""What a run directory says: curves, boundaries, costs and evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaloop.checkpoint import list_checkpoints
from megaloop.checkpoint.manifest import MANIFEST
from megaloop.config.yaml_text import read_yaml
from megaloop.depth import DepthSpec
from megaloop.errors import MegaloopError
from megaloop.evaluation import records as evaluations
from megaloop.evaluation.records import DIFFICULTY, EVALUATION, Record
from megaloop.runs.metrics import EVENTS, METRICS
from megaloop.runs.records import number, parse_record, read_records, text, whole_number
from megaloop.text import printable

__all__ = ["Boundary", "HeldOutText", "Run", "read_run"]

Array = NDArray[np.float64]
_VALUES, _NESTED = 20_000, 20
"""A run's configuration has fewer values, and is less deep."""
_LARGEST = 10**30
_DEEPEST = 100_000
"""No model executes as many layers (:class:`megaloop.depth.DepthPlan` says so), and no task is as difficult."""
_ON_PURPOSE = ("stop_at", "finished", "interrupted", "signal")
"""How the reason of a ``stop`` event begins where somebody wanted that end."""


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
class HeldOutText:
    """What a run is validated on: losses in nats per token compare where this is the same.

    Attributes:
        data: its format and paths, as configured; how they are mixed for training does not matter.
        tokenizer: SHA-256 of the tokenizer, from the newest checkpoint; None where there is none.
        samples: SHA-256 of each source's validation samples, from there too; None where one is not known.
    """

    data: tuple[str, ...]
    tokenizer: str | None
    samples: tuple[str, ...] | None

    def is_that_of(self, other: HeldOutText) -> bool:
        if self.tokenizer != other.tokenizer and None not in (self.tokenizer, other.tokenizer):
            return False
        if self.samples is None or other.samples is None:
            return self.data == other.data
        return self.samples == other.samples  # wherever they lie: a path may hold other data than it did


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: as configured, fit to be shown.
        config: the resolved configuration, of plain values alone.
        held_out: what its validation losses are of.
        step, tokens, flops, seconds, loss: of each optimizer step; all but the loss are counted from the beginning. Losses of a run
            that trains a gate are of something else than predictions, and NaN.
        executed: layers that ran in each step.
        val_at: indices of steps that validation followed; val_loss (nats per token) and val_bits (per byte) of them.
        parameters: of the model that the last start began with, whose depth is ``plan``; None where it does not say.
        torch, attention: versions and kernels of the last start.
        restarts: starts after an end that nobody wanted: an error, or none that was written down.
        evaluations: of the newest step that was evaluated, without those of single difficulties.
        by_step: evaluations of single difficulties, of all steps.
        thinking: those in which tokens left the loop early, of the newest step that has any; single difficulties among them. The
            others have none of these, nor any on fewer caches.
    """

    path: Path
    name: str
    config: dict[str, Any]
    held_out: HeldOutText
    step: Array
    tokens: Array
    flops: Array
    seconds: Array
    loss: Array
    executed: Array
    val_at: NDArray[np.int64]
    val_loss: Array
    val_bits: Array
    layers: int
    depth: int
    ranks: int
    memory_bytes: int
    boundaries: tuple[Boundary, ...]
    parameters: int | None
    plan: DepthSpec | None
    torch: str | None
    attention: str | None
    restarts: int
    rollbacks: int
    evaluations: tuple[Record, ...]
    by_step: tuple[Record, ...]
    thinking: tuple[Record, ...]

    @property
    def steps(self) -> int:
        """Steps that the configuration asks for."""
        return int(self.config["train"]["steps"])

    @property
    def seed(self) -> int | None:
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

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
    records = [record for record in read_records(path / METRICS) if whole_number(record, "step") is not None]
    if not records:
        raise MegaloopError(f"report: {path / METRICS} holds no step yet; wait for the run's first, or leave it out")
    events = list(read_records(path / EVENTS))
    starts = [event for event in events if event.get("event") == "start"]
    start = starts[-1] if starts else {}
    validated = [index for index, record in enumerate(records) if _was_validated(record)]
    last = records[-1]
    model = config.get("model")
    found = _evaluations(path, isinstance(model, dict) and model.get("document_masking") is True)
    plain = [record for record in found if record.subject.is_plain]
    others = [record for record in plain if record.subject.task != DIFFICULTY]
    thought = [record for record in found if record.subject.halt is not None and record.subject.cache == "full"]
    newest_thought = max((record.subject.step for record in thought), default=0)
    newest = max((record.subject.step for record in others), default=0)
    return Run(
        path=path,
        name=printable(config.get("name") or path.name, 80),
        config=config,
        held_out=_held_out(path, config),
        step=_column(records, "step"),
        tokens=_column(records, "tokens"),
        flops=_column(records, "flops"),
        seconds=np.nancumsum(_column(records, "seconds")),
        loss=np.full(len(records), np.nan) if _trains_gate(config) else _column(records, "loss"),
        executed=_column(records, "depth"),
        val_at=np.array(validated, dtype=np.int64),
        val_loss=_column([records[index] for index in validated], "val_loss"),
        val_bits=_column([records[index] for index in validated], "val_bits_per_byte"),
        layers=_count(last, "layers"),
        depth=_count(last, "depth"),
        ranks=math.prod(_count(last, axis) or 1 for axis in ("pp", "tp", "dp")),
        memory_bytes=max(whole_number(record, "memory_bytes") or 0 for record in records),
        boundaries=tuple(_boundaries(events)),
        parameters=whole_number(start, "parameters"),
        plan=_depth(text(start, "plan")),
        torch=_shown(start, "torch"),
        attention=_shown(start, "attention"),
        restarts=_restarts(events),
        rollbacks=sum(event.get("event") == "rollback" for event in events),
        evaluations=tuple(record for record in others if record.subject.step == newest),
        by_step=tuple(record for record in plain if record.subject.task == DIFFICULTY),
        thinking=tuple(record for record in thought if record.subject.step == newest_thought),
    )


def _depth(written: str | None) -> DepthSpec | None:
    """What a record says of depth; None where it says nothing that makes sense."""
    try:
        return None if written is None else DepthSpec.parse(written)
    except MegaloopError:
        return None


def _was_validated(record: dict[str, Any]) -> bool:
    """A validation followed the step, even if its loss was not finite."""
    nonfinite = record.get("nonfinite")
    return isinstance(record.get("val_loss"), int | float) or (isinstance(nonfinite, dict) and "val_loss" in nonfinite)


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    try:
        config = read_yaml(file)
    except (FileNotFoundError, MegaloopError):
        raise MegaloopError(f"report: {file} cannot be read; give run directories of megaloop train") from None
    if not isinstance(config, dict):
        raise MegaloopError(f"report: {file} is no configuration of a run")
    plain: dict[str, Any] = _plain(config, file)
    steps = plain.get("train")
    if not isinstance(steps, dict) or not whole_number(steps, "steps"):
        raise MegaloopError(f"report: {file} is no configuration of a run (train.steps is no number of steps)")
    return plain


def _plain(value: Any, file: Path) -> Any:
    """What JSON can hold: keys are text, and so is every value that is no number, list or mapping.

    Raises:
        MegaloopError: it is larger than any configuration. YAML's references make much of little.
    """
    count = 0

    def plain(value: Any, nested: int) -> Any:
        nonlocal count
        count += 1
        if count > _VALUES or nested > _NESTED:
            raise MegaloopError(
                f"report: {file} is no configuration of a run (more than {_VALUES} values, or nested deeper than {_NESTED})"
            )
        if isinstance(value, dict):
            return {printable(key): plain(element, nested + 1) for key, element in value.items()}
        if isinstance(value, list | tuple | set):
            return [plain(element, nested + 1) for element in value]
        if isinstance(value, int) and abs(value) >= _LARGEST:
            return "a very large number"
        return value if isinstance(value, bool | int | float | None) else printable(value, 500)

    return plain(value, 0)


def _trains_gate(config: dict[str, Any]) -> bool:
    """Its training loss is then binary cross-entropy, or an expected loss less an entropy (megaloop.model.gate)."""
    loop = config.get("loop")
    gate = loop.get("gate") if isinstance(loop, dict) else None
    return isinstance(gate, dict) and gate.get("train") is not None


def _data(config: dict[str, Any]) -> tuple[str, ...]:
    data = config.get("data")
    data = data if isinstance(data, dict) else {}
    sources = data.get("sources")
    paths = (
        [str(source.get("path")) for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    )
    return (str(data.get("format", "shards")), *paths)


def _held_out(path: Path, config: dict[str, Any]) -> HeldOutText:
    """What the run is validated on, as its configuration and its newest checkpoint say."""
    try:
        newest = list_checkpoints(path / "checkpoints")[-1:]
        manifest = parse_record((newest[0] / MANIFEST).read_bytes()) if newest else None
    except (MegaloopError, OSError):
        manifest = None
    return HeldOutText(_data(config), text(_part(manifest, "tokenizer"), "sha256"), _samples(manifest))


def _samples(manifest: dict[str, Any] | None) -> tuple[str, ...] | None:
    """SHA-256 of each source's validation samples; None where a checkpoint does not say (those of earlier versions do not)."""
    sources = _part(_part(manifest, "run"), "data").get("sources")
    listed = sources if isinstance(sources, list) else []
    found = [text(error, "validation") if isinstance(error, dict) else None for error in listed]
    known = tuple(result for result in found if result is not None)
    return known if known and len(known) == len(found) else None


def _part(record: dict[str, Any] | None, key: str) -> dict[str, Any]:
    part = (record or {}).get(key)
    return part if isinstance(part, dict) else {}


def _column(records: list[dict[str, Any]], key: str) -> Array:
    """Numbers; what is none (a loss that was not finite), or so large that sums may not be finite, is a gap."""
    values = (number(record, key) for record in records)
    return np.array([math.nan if value is None or abs(value) >= _LARGEST else value for value in values])


def _count(record: dict[str, Any], key: str) -> int:
    """Of layers or ranks; 0 where it is not known."""
    value = whole_number(record, key) or 0
    return value if value <= _DEEPEST else 0


def _shown(record: dict[str, Any], key: str) -> str | None:
    value = text(record, key)
    return None if value is None else printable(value, 40)


def _restarts(events: Sequence[dict[str, Any]]) -> int:
    """How often the run was started again after an end that nobody wanted."""
    count, began = 0, False
    ending: str | None = None  # of the start before; None: it left none
    for event in events:
        if event.get("event") == "start":
            # after a rollback the same processes go on
            count += began and (ending is None or not ending.startswith((*_ON_PURPOSE, "rollback")))
            began, ending = True, None
        if event.get("event") == "stop":
            ending = str(event.get("reason"))
    return count


def _boundaries(events: Sequence[dict[str, Any]]) -> Iterator[Boundary]:
    last: dict[int, Boundary] = {}  # a run that went back passes a boundary again
    for event in events:
        plan, step = event.get("plan"), whole_number(event, "step")
        order = plan.get("order") if isinstance(plan, dict) else None
        if event.get("event") not in ("grow", "loop") or not isinstance(order, list) or step is None:
            continue
        if all(type(layer) is int for layer in order):
            losses = number(event, "loss_before"), number(event, "loss_after")
            last[step] = Boundary(step, len(set(order)), len(order), *losses)
    yield from (last[step] for step in sorted(last))


def _evaluations(path: Path, document_masking: bool) -> list[Record]:
    """Those that were made as the model was trained."""
    # of a model with document masking, older versions have also left some that let it look across documents
    return [
        record
        for subject, record in evaluations.read_records(path / EVALUATION).items()
        if subject.document_masking is document_masking
        and max(subject.loops, subject.shots, subject.difficulty or 0) <= _DEEPEST
    ]
