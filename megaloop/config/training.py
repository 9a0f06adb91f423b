"""How a run trains: topology, steps, optimizer, learning rate, and what it writes meanwhile."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from megaloop.config.section import Section
from megaloop.errors import MegaloopError

__all__ = [
    "CheckpointConfig",
    "FaultsConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "TrainConfig",
    "ValidationConfig",
]


class ParallelConfig(Section):
    """How the model lies on ranks: pp x tp x dp."""

    pp: PositiveInt = 1
    """Pipeline stages."""
    tp: PositiveInt = 1
    """Tensor-parallel ranks per stage."""
    dp: PositiveInt | None = None
    """Data-parallel replicas; empty: what is left of the world size."""
    rounds: PositiveInt = 1
    """Times that micro-batches go round the pipeline (interleaved 1F1B); more shrink the bubble. A loop sets its own."""
    sequence_parallel: bool = False
    """Split the norms' regions over the tensor-parallel ranks along the sequence."""
    layer_costs: tuple[PositiveFloat, ...] | None = None
    """Seconds of embedding, one layer and head, as ``megaloop bench layers`` measures; empty: estimated by FLOPs."""

    @field_validator("layer_costs")
    @classmethod
    def _three_costs(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and len(value) != 3:
            raise ValueError(f"needs three numbers (embedding, one layer, head); found {len(value)}")
        return value


class TrainConfig(Section):
    """The training loop."""

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    global_batch: PositiveInt = 8
    """Samples per optimizer step, over all ranks."""
    micro_batch: PositiveInt = 1
    """Samples per forward pass of one rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: bf16 weights and activations with fp32 master weights; fp32: everything in fp32."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation checkpointing: keep all; recompute every layer; or keep matrix products and recompute the rest."""
    compile: bool = False
    """torch.compile each layer."""
    check_replicas: int = Field(default=0, ge=0)
    """Every N steps, verify that parameters which several ranks hold are bit-identical; 0: never."""

    def micro_batches(self, dp: int) -> int:
        """Micro-batches per optimizer step of each of ``dp`` data-parallel replicas.

        Raises:
            MegaloopError: the global batch does not divide into them.
        """
        unit = self.micro_batch * dp
        if self.global_batch % unit:
            raise MegaloopError(
                f"train.global_batch {self.global_batch} is not a multiple of "
                f"micro_batch {self.micro_batch} x dp {dp} = {unit}; "
                f"choose for example {-(-self.global_batch // unit) * unit}"
            )
        return self.global_batch // unit


class OptimizerConfig(Section):
    """AdamW; no decay on norms and embeddings."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm over the whole model; 0: no clipping."""


class ScheduleConfig(Section):
    """Learning rate over the run."""

    kind: Literal["trapezoid", "cosine"] = "trapezoid"
    """trapezoid: warm-up, stable, cooldown (arXiv 2405.18392); cosine: warm-up, then half a cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    cooldown: float = Field(default=0.15, ge=0, le=1)
    """Fraction of the run over which the trapezoid falls."""
    decay: Literal["linear", "sqrt"] = "linear"
    """How the trapezoid falls: by 1 - t over the fraction t of the cooldown, or by 1 - sqrt(t), first fast, then slowly."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""

    def cooldown_start(self, total_steps: int) -> int:
        """The step, counted from 0, with which the learning rate begins to fall (``total_steps``: it never does)."""
        if self.kind == "cosine":
            return min(self.warmup_steps, total_steps)
        return total_steps - round(total_steps * self.cooldown)


class ValidationConfig(Section):
    """Held-out loss during the run."""

    every: int = Field(default=0, ge=0)
    """Steps between validations; 0: only at the end."""
    samples: PositiveInt = 64
    """Validation samples to use at most (rounded down to whole micro-batches over dp)."""


class CheckpointConfig(Section):
    """When checkpoints are written, and how many stay."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 3
    """Newest checkpoints to keep."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps that this divides stay for good; 0: none does."""
    asynchronous: bool = True
    """Train on while a copy of the state is written; the copy takes as much main memory as the state."""


class FaultsConfig(Section):
    """What happens when training goes wrong: docs/FAULTS.md."""

    max_skipped: int = Field(default=10, ge=0)
    """Steps in a row without a finite gradient (each is skipped) that roll the run back; 0: never."""
    spike_deviations: float = Field(default=8.0, ge=0)
    """A loss this many deviations above the median of the window is a spike; 0: none is."""
    spike_window: PositiveInt = 100
    """Losses by which a spike is measured."""
    spike_rollback: bool = False
    """Roll back at a spike; otherwise it is only recorded."""
    margin: int = Field(default=0, ge=0)
    """Steps before the first bad one whose samples are excluded with it, after rolling back."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Rolling back more often ends the run."""
    step_limit: float = Field(default=1500.0, ge=0)
    """Seconds that a step (or a validation, a growth, a save) may take before the ranks end, with their stacks; 0: any."""


class LoggingConfig(Section):
    """What the run writes while it trains."""

    every: PositiveInt = 1
    """Steps between plain log lines (metrics.jsonl gets every step)."""
    ranks_every: int = Field(default=50, ge=0)
    """Steps between records of each rank (how long it computed, memory, clock) in RUN/ranks.jsonl; 0: none."""
    tensorboard: bool = True
    """Write TensorBoard event files to RUN/tensorboard."""
