"""How the depth of a run changes: growth, loops, and what comes or goes in between."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megaloop.config.section import Depth, Section
from megaloop.depth import DepthPlan, GrowthStage, InsertAt, LoopStyle, Operator, growth_stages
from megaloop.depth.counts import CountKind
from megaloop.depth.plan import GateTraining, Injection, ResidualScale
from megaloop.depth.schedule import explicit_steps, proportional_steps
from megaloop.errors import MegaloopError

__all__ = ["DepthEventConfig", "GateConfig", "GrowthConfig", "GrowthTopologyConfig", "LoopConfig", "StageConfig"]


class StageConfig(Section):
    """One stage of an explicit growth schedule."""

    steps: PositiveInt
    """Optimizer steps of the stage."""
    layers: PositiveInt
    """Layers during the stage."""


class GrowthTopologyConfig(Section):
    """The topology from a number of layers on; the world size and the global batch stay."""

    layers: PositiveInt
    """The topology holds from this many layers on, until the next entry's."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    tp: PositiveInt | None = None
    """Tensor-parallel ranks per stage; empty: parallel.tp."""
    dp: PositiveInt | None = None
    """Data-parallel replicas; empty: what is left of the world size."""


class GrowthConfig(Section):
    """How the model deepens during the run; ``depth`` is the depth that it ends with."""

    operator: Operator = "lidas"
    """Which layers are copied, and to where: lidas, midas, stack, last or random."""
    block: PositiveInt = 4
    """Layers per copied block (stack copies all layers)."""
    start: PositiveInt = 4
    """Layers of the first stage."""
    schedule: str | tuple[StageConfig, ...] = "prop-1"
    """prop-A (stage i lasts in proportion to i^A), or a list of stages: [{steps: 1000, layers: 4}, ...]."""
    end: float | None = Field(default=None, gt=0, le=1)
    """Under prop-A: the stages share this fraction of the steps, the rest is full depth; empty: 0.85."""
    moments: Literal["copy", "zero"] = "copy"
    """Adam's moments of a copied layer: those of its parent, or zeros."""
    insert_at: InsertAt = "after"
    """Where lidas and random put the new block: right after the middle range, as the paper does, or at the middle itself."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up of the learning rate after each growth."""
    save_before: bool = False
    """Write a checkpoint right before each growth."""
    topology: tuple[GrowthTopologyConfig, ...] = ()
    """The topology by depth: [{layers: 4, pp: 1}, {layers: 12, pp: 2}]; empty: parallel, throughout."""

    def stages(self, layers: int, total_steps: int, first: DepthPlan | None = None) -> tuple[GrowthStage, ...]:
        """The stages of a run of ``total_steps`` that ends with ``layers`` layers.

        Args:
            first: the plan of the first stage, of ``start`` layers; default: a plain one.

        Raises:
            MegaloopError: the target cannot be reached, or the schedule does not fit the steps.
        """
        if isinstance(self.schedule, str):
            if self.start >= layers:
                raise MegaloopError(
                    f"growth.start {self.start} is not below depth {layers}: growth only deepens; "
                    "choose a smaller start, or leave growth out"
                )
            step = layers - self.start if self.operator == "stack" else self.block
            counts = [*range(self.start, layers, step), layers]
            steps = proportional_steps(self.schedule, len(counts), total_steps, 0.85 if self.end is None else self.end)
        else:
            if self.end is not None:
                raise MegaloopError("growth.end belongs to prop schedules; the list of stages says when growth is over")
            counts = [stage.layers for stage in self.schedule]
            if not counts or counts[0] != self.start or counts[-1] != layers:
                raise MegaloopError(
                    f"growth.schedule: the stages go through {', '.join(map(str, counts)) or 'no'} layers; the first must "
                    f"have growth.start {self.start}, and the last depth {layers}"
                )
            if counts != sorted(counts):
                raise MegaloopError(
                    f"growth.schedule: the stages go through {', '.join(map(str, counts))} layers; growth only deepens"
                )
            steps = explicit_steps([stage.steps for stage in self.schedule], total_steps)
        return growth_stages(counts, steps, self.operator, self.block, insert_at=self.insert_at, first=first)


class GateConfig(Section):
    """A gate that learns after how many iterations a token may stop (arXiv 2510.25741); on one pipeline rank, tp 1."""

    train: GateTraining
    """frozen: the gate alone, on what each iteration still saves of the model's loss; joint: gate and model, on the expected loss."""
    slope: PositiveFloat = 50.0
    """Frozen: how sharply the target to go on rises around the threshold."""
    threshold: float = Field(default=0.005, ge=0)
    """Frozen: nats that the next iteration must save of a token's loss for its target to go on to be a half."""
    beta: float = Field(default=0.1, ge=0)
    """Joint: what an entropy of a nat of where to stop takes off the loss; keeps all iterations in use."""


class LoopConfig(Section):
    """How a loop runs and learns; by default plain composition, as often as ``depth`` says (arXiv 2502.17416)."""

    count: CountKind = "fixed"
    """Times that the loop runs in a step: fixed, or drawn anew for each: uniform, poisson or lognormal-poisson; ``depth`` has the mean."""
    min_count: PositiveInt = 1
    """The fewest times that are drawn, and where the ramp begins."""
    max_count: PositiveInt | None = None
    """The most times that are drawn; empty: four times the mean."""
    sigma: PositiveFloat = 0.5
    """Of lognormal-poisson: standard deviation of the logarithm of the Poisson mean (arXiv 2502.05171)."""
    ramp: float = Field(default=0.0, ge=0, le=1)
    """The mean rises linearly from min_count over this fraction of the run, from the first looped step on; 0: at once."""
    backprop: PositiveInt | None = None
    """Gradients pass only through the last N iterations of the loop; needs an injection. Empty: through all."""
    injection: Injection = "none"
    """What becomes of the state that entered the loop: none; add (to the state, each time but the first); concat (a linear adapter makes both into one)."""
    residual_scale: ResidualScale = "none"
    """1/k: what looped layers add to the residual stream is divided by the number of times (arXiv 2606.18524)."""
    norm: bool = False
    """An RMSNorm of its own at the end of each iteration of the loop."""
    gate: GateConfig | None = None
    """Train a gate: {train: frozen} on the weights of init, or {train: joint}; empty: the loop has none."""

    @property
    def gate_training(self) -> GateTraining | None:
        """How the loop's gate is trained; None: it has none."""
        return None if self.gate is None else self.gate.train

    @property
    def style(self) -> LoopStyle:
        """What the plan says of its loop."""
        return LoopStyle(self.injection, self.residual_scale, self.norm, self.gate is not None)


class DepthEventConfig(Section):
    """A change of depth during the run that is no growth: another order of the layers, or repetitions made layers."""

    at: float = Field(gt=0, lt=1)
    """When, as a fraction of the run's steps."""
    depth: Depth | None = None
    """The same layers in another order from then on: 10-4x2-10 loops the middle four of 24."""
    untie: bool = False
    """Instead: repetitions become layers of their own, which begin as copies."""
