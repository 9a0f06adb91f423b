"""What happens to a run, as values. Where they go (a file, a console, a tracker) is the business of :mod:`megaloop.runs.sinks`.

An event that has a kind is a line of ``events.jsonl``, with the keys that docs/RUNS.md lists; the others are only for whoever
looks on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from megaloop.checkpoint import RunState
from megaloop.config.changes import ChangedSetting
from megaloop.depth import DepthPlan, GrowthStage
from megaloop.layout.partition import StageMap
from megaloop.layout.topology import Topology
from megaloop.model import Kernels
from megaloop.runs.allow import Allow
from megaloop.runs.records import is_finite, timestamp

__all__ = [
    "CheckpointPassedOver",
    "ConfigChanged",
    "DataNotCompared",
    "DepthChanged",
    "DiskFull",
    "EndedEarly",
    "Event",
    "Grown",
    "GrowthSavings",
    "InFlight",
    "Layout",
    "LoopChanged",
    "RolledBack",
    "RunResumed",
    "RunStarted",
    "RunStopped",
    "SaveFailed",
    "Saved",
    "ScheduleChanged",
    "SettingsChanged",
    "Signalled",
    "Spiked",
    "StepSkipped",
    "StopReached",
    "Validated",
]


@dataclass(frozen=True)
class Event:
    """Something that happened when a run had done ``step`` optimizer steps.

    Attributes:
        kind: its name in ``events.jsonl``; None: it is not recorded there.
    """

    kind: ClassVar[str | None] = None
    step: int

    def to_json(self) -> dict[str, Any]:
        """Its line of ``events.jsonl``; numbers that are not finite become null."""
        own: dict[str, Any] = {
            "event": self.kind, "step": self.step, "time": timestamp(), "seconds": None, "bytes": None
        }  # fmt: skip
        return own | {key: value if is_finite(value) else None for key, value in self._details().items()}

    def _details(self) -> dict[str, Any]:
        """What belongs to its kind; also ``seconds``, which it took, and ``bytes``, written or moved, where they are known."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "step"}


# --- beginning and end ---


@dataclass(frozen=True)
class Layout:
    """How a model lies on ranks, and what they do in a step.

    Attributes:
        slices: which pipeline rank runs which positions of the plan in which round.
        micro_batches: per step and data-parallel replica.
        micro_batch: samples in each.
    """

    topology: Topology
    slices: StageMap
    micro_batches: int
    micro_batch: int


@dataclass(frozen=True)
class RunStarted(Event):
    """The engine is built and the run is about to train.

    Attributes:
        directory: the run's.
        machine: what rank 0 runs on, in words.
        parameters: of the model.
        torch: its version.
        data: what it is trained on, a line for each source.
        state: how far it is.
        stages: those of the whole run.
        operator: of its growth; None: it does not grow.
        checkpoint: which it goes on from; None: it begins anew.
        restarts: how often the launcher has started the ranks again.
        seconds: of preparation.
    """

    kind = "start"
    directory: Path
    machine: str
    plan: DepthPlan
    layout: Layout
    parameters: int
    vocab_size: int
    precision: str
    kernels: Kernels
    torch: str
    data: str
    state: RunState
    stages: Sequence[GrowthStage]
    operator: str | None
    checkpoint: Path | None
    restarts: int
    seconds: float

    def _details(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "plan": str(self.plan),
            **_sizes(self.layout.topology),
            "parameters": self.parameters,
            "attention": self.kernels.attention,
            "norm": self.kernels.norm,
            "adam": "torch fused",
            "torch": self.torch,
            "ranks": self.layout.topology.world_size,
            "restarts": self.restarts,
        }


@dataclass(frozen=True)
class RunResumed(Event):
    """The metrics were made to end at this step.

    Attributes:
        discarded: records of later steps.
    """

    kind = "resume"
    discarded: int


@dataclass(frozen=True)
class CheckpointPassedOver(Event):
    """The run goes on from here, as its newer checkpoint of ``step_before`` is damaged."""

    kind = "rollback"
    step_before: int
    reason: str


@dataclass(frozen=True)
class ConfigChanged(Event):
    """Something that a place in the data rests on is another than it was, which ``--allow`` took."""

    kind = "changed"
    what: Allow
    text: str


@dataclass(frozen=True)
class DataNotCompared(Event):
    """The checkpoint holds no hashes of its data."""


@dataclass(frozen=True)
class ScheduleChanged(Event):
    """The learning rate jumps here, as the configuration is another.

    Attributes:
        lr_before: of the last step; None: not known.
        lr: of the next.
        steps_before, steps: ``train.steps`` as it was (None: not known), and as it is.
    """

    kind = "schedule"
    lr_before: float | None
    lr: float
    steps_before: int | None
    steps: int

    @property
    def had_finished(self) -> bool:
        """The run was at its end already."""
        return self.steps_before is not None and self.step >= self.steps_before


@dataclass(frozen=True)
class SettingsChanged(Event):
    """The run goes on with settings that decide its curve and are others than those of the checkpoint."""

    kind = "settings"
    changes: tuple[ChangedSetting, ...]

    def _details(self) -> dict[str, Any]:
        return {"changes": {one.key: [one.before, one.now] for one in self.changes}}


@dataclass(frozen=True)
class Signalled(Event):
    """A signal asked to end."""

    kind = "signal"
    name: str


@dataclass(frozen=True)
class StopReached(Event):
    """The step at which the run was to stop."""


@dataclass(frozen=True)
class EndedEarly(Event):
    """The run ends before its last step; what was trained is saved.

    Attributes:
        stop_at: where it was to stop, and has not come to.
        go_on: the command that goes on with it; None: not known.
    """

    stop_at: int | None
    go_on: str | None


@dataclass(frozen=True)
class GrowthSavings(Event):
    """All steps are done.

    Attributes:
        flops: that they took.
        full_flops: that they would have taken at full depth.
        full_depth_step: those of one step at full depth.
    """

    flops: int
    full_flops: float
    full_depth_step: int


@dataclass(frozen=True)
class RunStopped(Event):
    """The last event of a process that was not killed.

    Attributes:
        seconds: since it began.
        reason: ``finished``, ``stop_at``, ``signal NAME``, ``rollback``, ``interrupted`` or ``error: ...``.
    """

    kind = "stop"
    seconds: float
    reason: str


# --- steps ---


@dataclass(frozen=True)
class Validated(Event):
    """The loss of the held-out samples: nats per token, and bits per byte of text."""

    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class StepSkipped(Event):
    """The step changed nothing, as its gradient was not finite.

    Attributes:
        skipped: how many steps so far.
    """

    kind = "skip"
    grad_norm: float | None
    skipped: int

    def _details(self) -> dict[str, Any]:
        return {"grad_norm": str(self.grad_norm), "skipped": self.skipped}


@dataclass(frozen=True)
class Spiked(Event):
    """A loss that sticks out of those before it, in nats per token."""

    kind = "spike"
    loss: float
    median: float
    deviation: float


@dataclass(frozen=True)
class RolledBack(Event):
    """Training went wrong at ``step_before`` and goes on from here.

    Attributes:
        samples: passed over from now on, [start, stop) of the global order.
    """

    kind = "rollback"
    step_before: int
    reason: str
    samples: tuple[int, int]


# --- depth ---


@dataclass(frozen=True)
class InFlight:
    """What it took to give a running model another depth.

    Attributes:
        seconds: from the last use of the old engine to the first of the new; of these ``build_seconds`` and
            ``exchange_seconds``.
        moved: bytes that each rank received.
        in_place: bytes that each rank needed and held.
        loss_before: of the validation samples, in nats per token.
    """

    topology_before: Topology
    layout: Layout
    seconds: float
    build_seconds: float
    exchange_seconds: float
    moved: tuple[int, ...]
    in_place: tuple[int, ...]
    loss_before: float


@dataclass(frozen=True)
class DepthChanged(Event):
    """The model has another plan from here on.

    Attributes:
        loss_after: of the validation samples, in nats per token.
        in_flight: None: a checkpoint was changed while it was loaded.
    """

    before: DepthPlan
    plan: DepthPlan
    loss_after: float
    in_flight: InFlight | None = None

    @classmethod
    def between(
        cls, step: int, before: DepthPlan, plan: DepthPlan, loss_after: float, in_flight: InFlight | None = None
    ) -> DepthChanged:
        """A growth where layers were added, otherwise a change of their order."""
        kind = Grown if plan.layers > before.layers else LoopChanged
        return kind(step, before, plan, loss_after, in_flight)

    def _details(self) -> dict[str, Any]:
        plans = {"plan_before": self.before.to_json(), "plan": self.plan.to_json()}
        flight = self.in_flight
        if flight is None:
            return {"live": False, **plans, "loss_after": self.loss_after}
        return {
            "seconds": flight.seconds,
            "bytes": sum(flight.moved),
            "live": True,
            **plans,
            "topology_before": _sizes(flight.topology_before),
            "topology": _sizes(flight.layout.topology),
            "build_seconds": flight.build_seconds,
            "exchange_seconds": flight.exchange_seconds,
            "moved_bytes": list(flight.moved),
            "in_place_bytes": list(flight.in_place),
            "loss_before": flight.loss_before,
            "loss_after": self.loss_after,
        }


@dataclass(frozen=True)
class Grown(DepthChanged):
    """Layers were added."""

    kind = "grow"


@dataclass(frozen=True)
class LoopChanged(DepthChanged):
    """Only the order of the layers is another: a loop came, went or moved."""

    kind = "loop"


# --- saving ---


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is whole.

    Attributes:
        seconds: until it was; of these training stood still for ``stall_seconds``.
        not_deleted: why an older one, which was to go, is still there.
    """

    kind = "save"
    seconds: float
    bytes: int
    path: Path
    stall_seconds: float
    not_deleted: str | None = None

    def _details(self) -> dict[str, Any]:
        details = super()._details() | {"path": str(self.path)}
        if self.not_deleted is None:
            del details["not_deleted"]
        return details


@dataclass(frozen=True)
class SaveFailed(Event):
    """A checkpoint could not be written; the run goes on and tries again."""

    kind = "save_failed"
    reason: str


@dataclass(frozen=True)
class DiskFull(Event):
    """From here on, records wait in memory for room on the disk."""


def _sizes(topology: Topology) -> dict[str, int]:
    return {"pp": topology.pp, "tp": topology.tp, "dp": topology.dp}
