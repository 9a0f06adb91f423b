"""What is measured of a run's steps: the records of ``metrics.jsonl`` and ``ranks.jsonl``. See docs/RUNS.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megaloop.layout.topology import Topology
from megaloop.runs.records import is_finite, timestamp

__all__ = ["EVENTS", "METRICS", "RANKS", "RankRecord", "RanksRecord", "StepRecord"]

METRICS = "metrics.jsonl"
RANKS = "ranks.jsonl"
EVENTS = "events.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as ``metrics.jsonl`` records it; None where a value is not known.

    Attributes:
        step: optimizer steps done, this one included: the first is 1.
        tokens: tokens predicted so far in the run, all ranks together.
        loss: mean training loss of the step's global batch, nats per token.
        lr: learning rate of the step.
        grad_norm: norm of the whole gradient before clipping.
        layers: unique layers.
        depth: layers executed per forward pass.
        flops: model FLOPs so far in the run (forward and backward, without recomputation).
        tokens_per_second: of this step, all ranks together.
        tflops: model TFLOP/s per rank in this step.
        mfu: ``tflops`` as a fraction of the device's peak.
        pp, tp, dp: the topology.
        seconds: wall-clock time of the step.
        memory_bytes: rank 0's peak on its GPU, or its resident set on a CPU.
        val_loss: validation loss after this step, nats per token.
        val_bits_per_byte: the same loss per byte of text, in bits.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float | None
    layers: int
    depth: int
    flops: int
    tokens_per_second: float | None
    tflops: float | None
    mfu: float | None
    pp: int
    tp: int
    dp: int
    seconds: float | None = None
    memory_bytes: int | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A value that JSON can hold: numbers that are not finite become null and are named under ``nonfinite``."""
        values = asdict(self)
        nonfinite = {key: str(value) for key, value in values.items() if not is_finite(value)}
        values |= dict.fromkeys(nonfinite)
        return values | ({"nonfinite": nonfinite} if nonfinite else {})


@dataclass(frozen=True)
class RankRecord:
    """What a rank says of itself after a step.

    Attributes:
        busy: seconds of forward and backward passes in it.
        memory: bytes, as :func:`megaloop.runtime.hardware.memory_bytes` counts.
        clock: seconds since the epoch, by the host's clock, at a moment at which all ranks are at the same place.
        host: its name.
    """

    busy: float
    memory: int
    clock: float
    host: str


@dataclass(frozen=True)
class RanksRecord:
    """What each rank did in a step, as ``ranks.jsonl`` records it; lists are by rank.

    Attributes:
        step: optimizer steps done, that one included.
        topology: of the ranks.
        ranks: what they say.
    """

    step: int
    topology: Topology
    ranks: Sequence[RankRecord]

    def to_json(self) -> dict[str, Any]:
        """A value that JSON can hold; clocks are relative to rank 0's."""
        return {
            "step": self.step,
            "time": timestamp(),
            "pp": self.topology.pp,
            "tp": self.topology.tp,
            "dp": self.topology.dp,
            "busy_seconds": [rank.busy for rank in self.ranks],
            "memory_bytes": [rank.memory for rank in self.ranks],
            "clock_seconds": [rank.clock - self.ranks[0].clock for rank in self.ranks],
            "hosts": [rank.host for rank in self.ranks],
        }
