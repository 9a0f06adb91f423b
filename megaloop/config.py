"""The configuration of a run: YAML read into strict models, with overrides from the command line.

Each section is a frozen pydantic model; the sentence under a field is what the documentation says of it.
An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from megaloop.depth import (
    DepthPlan,
    Growth,
    GrowthStage,
    InsertAt,
    LoopCounts,
    LoopStyle,
    Operator,
    growth_stages,
    stages_between,
    unloop,
)
from megaloop.depth.counts import CountKind
from megaloop.depth.plan import Injection, ResidualScale
from megaloop.depth.schedule import DepthEvent, explicit_steps, loop_stages, proportional_steps, with_events
from megaloop.errors import MegaloopError
from megaloop.text import parse_whole, printable, quoted
from megaloop.yaml_text import parse_yaml, read_yaml

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DepthEventConfig",
    "FaultsConfig",
    "GrowthConfig",
    "GrowthTopologyConfig",
    "LoggingConfig",
    "LoopConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseWeightsConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "TrainConfig",
    "ValidationConfig",
    "load_config",
    "parse_override",
]


_LARGEST = 2**53
"""No count, size or seed is larger; floats and JSON hold every whole number up to it."""
_LONGEST = 4096
"""Characters of a name, a path or another text."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take ``true`` and ``yes`` for 1."""
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("should not be true or false")
        return value

    @field_validator("*")
    @classmethod
    def _in_reason(cls, value: Any) -> Any:
        """Refuse numbers that overflow somewhere, and texts that no file could have as its name."""
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"should be at most {_LARGEST}")
        if isinstance(value, str | Path) and len(str(value)) > _LONGEST:
            raise ValueError(f"should have at most {_LONGEST} characters")
        if isinstance(value, str | Path) and "\0" in str(value):
            raise ValueError("should hold no zero byte")
        return value


class ModelConfig(_Section):
    """The Llama-family decoder of SmolLM v1."""

    hidden_size: PositiveInt = 960
    """Width of the residual stream."""
    num_heads: PositiveInt = 15
    """Query heads; must divide hidden_size."""
    num_kv_heads: PositiveInt = 5
    """Key and value heads (grouped-query attention); must divide num_heads."""
    ffn_size: PositiveInt = 2560
    """Inner width of the SwiGLU MLP."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; empty: the tokenizer's size rounded up to a multiple of 128."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of every freshly initialised matrix."""
    tied_embeddings: bool = True
    """The output head shares the embedding's weight."""
    document_masking: bool = False
    """Attention does not cross document boundaries within a packed sample."""

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def check(self) -> None:
        """Raise MegaloopError where the shape does not fit together."""
        if self.hidden_size % self.num_heads:
            raise MegaloopError(
                f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}; choose a "
                f"multiple, for example {self.hidden_size // self.num_heads * self.num_heads or self.num_heads}"
            )
        if self.head_size % 2:
            raise MegaloopError(
                f"model: head size {self.head_size} (hidden_size / num_heads) is odd; "
                "rotary embeddings need an even one"
            )
        if self.num_heads % self.num_kv_heads:
            raise MegaloopError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {self.num_kv_heads}; "
                "each key-value head serves the same number of query heads"
            )


class PhaseWeightsConfig(_Section):
    """Shares of a source by phase of the learning rate; 0: none of it."""

    stable: float = Field(ge=0)
    """Until the cooldown begins."""
    cooldown: float = Field(ge=0)
    """From there on."""


class SourceConfig(_Section):
    """One set of shards made by ``megaloop prep``."""

    path: Path
    """Directory that holds data.json."""
    weight: PositiveFloat | PhaseWeightsConfig = 1.0
    """Share of the samples, relative to the other sources; by phase: {stable: 1, cooldown: 0.5}."""

    @property
    def weights(self) -> tuple[float, float]:
        """In the stable phase, and in the cooldown."""
        weight = self.weight
        return (weight.stable, weight.cooldown) if isinstance(weight, PhaseWeightsConfig) else (weight, weight)


class DataConfig(_Section):
    """Where samples come from, and how long they are."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """One or more sets of shards, mixed by weight."""
    sequence_length: PositiveInt = 2048
    """Tokens per sample (predicted tokens; a sample holds one more)."""
    format: Literal["tokens", "sft"] = "tokens"
    """tokens: shards made by ``megaloop prep``; sft: jsonl of prompts and answers, of which the answers are learnt."""
    prompt_field: str = "prompt"
    """Of sft: the field that holds the prompt."""
    answer_field: str = "answer"
    """Of sft: the field that holds the answer."""
    tokenizer: Path | None = None
    """Of sft: sentencepiece model; empty: that of the checkpoint in ``init``."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Of sft: share of the examples that are held out, chosen by a hash of their text; at least one."""
    prefetch: int = Field(default=4, ge=0)
    """Micro-batches read ahead in the background."""


class StageConfig(_Section):
    """One stage of an explicit growth schedule."""

    steps: PositiveInt
    """Optimizer steps of the stage."""
    layers: PositiveInt
    """Layers during the stage."""


class GrowthTopologyConfig(_Section):
    """The topology from a number of layers on; the world size and the global batch stay."""

    layers: PositiveInt
    """The topology holds from this many layers on, until the next entry's."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    tp: PositiveInt | None = None
    """Tensor-parallel ranks per stage; empty: parallel.tp."""
    dp: PositiveInt | None = None
    """Data-parallel replicas; empty: what is left of the world size."""


class GrowthConfig(_Section):
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
    """Where lidas and random put the new block: right after the middle range, or at the middle itself."""
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


class LoopConfig(_Section):
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
    """Gradients pass only through the last so many times of the loop; needs an injection. Empty: through all."""
    injection: Injection = "none"
    """What becomes of the state that entered the loop: none; add (to the state, each time but the first); concat (a linear adapter makes both into one)."""
    residual_scale: ResidualScale = "none"
    """1/k: what looped layers add to the residual stream is divided by the number of times (arXiv 2606.18524)."""
    norm: bool = False
    """An RMSNorm of its own at the end of each time of the loop."""

    @property
    def style(self) -> LoopStyle:
        """What the plan says of its loop."""
        return LoopStyle(self.injection, self.residual_scale, self.norm)


class DepthEventConfig(_Section):
    """A change of depth during the run that is no growth: another order of the layers, or repetitions made layers."""

    at: float = Field(gt=0, lt=1)
    """When, as a fraction of the run's steps."""
    depth: str | None = None
    """The same layers in another order from then on: 10-4x2-10 loops the middle four of 24."""
    untie: bool = False
    """Instead: repetitions become layers of their own, which begin as copies."""

    @field_validator("depth", mode="before")
    @classmethod
    def _depth_as_text(cls, value: Any) -> Any:
        return _text_of_number(value)


class ParallelConfig(_Section):
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


class TrainConfig(_Section):
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


class OptimizerConfig(_Section):
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


class ScheduleConfig(_Section):
    """Learning rate over the run."""

    kind: Literal["trapezoid", "cosine"] = "trapezoid"
    """trapezoid: warm-up, stable, linear cooldown (arXiv 2405.18392); cosine: warm-up, then half a cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    cooldown: float = Field(default=0.15, ge=0, le=1)
    """Fraction of the run over which the trapezoid falls."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""

    def cooldown_start(self, total_steps: int) -> int:
        """The step, counted from 0, with which the learning rate begins to fall (``total_steps``: it never does)."""
        if self.kind == "cosine":
            return min(self.warmup_steps, total_steps)
        return total_steps - round(total_steps * self.cooldown)


class ValidationConfig(_Section):
    """Held-out loss during the run."""

    every: int = Field(default=0, ge=0)
    """Steps between validations; 0: only at the end."""
    samples: PositiveInt = 64
    """Validation samples to use at most (rounded down to whole micro-batches over dp)."""


class CheckpointConfig(_Section):
    """When checkpoints are written, and how many stay."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 3
    """Newest checkpoints to keep."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps that this divides stay for good; 0: none does."""
    asynchronous: bool = True
    """Train on while a copy of the state is written; the copy takes as much main memory as the state."""


class FaultsConfig(_Section):
    """What happens when training goes wrong: docs/FAULTS.md."""

    max_skipped: int = Field(default=10, ge=0)
    """Steps in a row without a finite gradient (each is skipped) that roll the run back; 0: never."""
    spike_deviations: float = Field(default=8.0, ge=0)
    """A loss so many deviations above the median of the window is a spike; 0: none is."""
    spike_window: PositiveInt = 100
    """Losses by which a spike is measured."""
    spike_rollback: bool = False
    """Roll back at a spike; otherwise it is only recorded."""
    margin: int = Field(default=0, ge=0)
    """Steps before the first bad one whose samples are passed over with it, after rolling back."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Rolling back more often ends the run."""
    step_limit: float = Field(default=1500.0, ge=0)
    """Seconds that a step (or a validation, a growth, a save) may take before the ranks end, with their stacks; 0: any."""


class LoggingConfig(_Section):
    """What the run writes while it trains."""

    every: PositiveInt = 1
    """Steps between plain log lines (metrics.jsonl gets every step)."""
    ranks_every: int = Field(default=50, ge=0)
    """Steps between records of each rank (how long it computed, memory, clock) in RUN/ranks.jsonl; 0: none."""
    tensorboard: bool = True
    """Write TensorBoard event files to RUN/tensorboard."""


class Config(_Section):
    """Everything a run needs to know; written to RUN/config.yaml as resolved."""

    name: str = Field(default="run", min_length=1, pattern=r"^[^/\x00]+$")
    """Name of the run."""
    run_dir: Path | None = None
    """Where the run writes; empty: runs/NAME."""
    init: Path | None = None
    """Checkpoint (or run) whose weights a new run starts from; its moments, step and data position are not taken."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the sample order."""
    depth: str = "32"
    """Layers: 24, or a loop such as 4-4x4-4 (4 layers, 4 layers 4 times, 4 layers). Of a run that grows: what it grows to."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    growth: GrowthConfig | None = None
    """Growth during the run; empty: no layers are added."""
    loop: LoopConfig = LoopConfig()
    depth_events: tuple[DepthEventConfig, ...] = ()
    """Loops that come or go during the run, after growth: [{at: 0.85, depth: 10-4x2-10}]."""

    @field_validator("depth", mode="before")
    @classmethod
    def _depth_as_text(cls, value: Any) -> Any:
        return _text_of_number(value)

    @field_validator("name")
    @classmethod
    def _name_of_a_directory(cls, value: str) -> str:
        if value in (".", ".."):
            raise ValueError("should be the name of a directory of its own")
        if len(value.encode(errors="replace")) > 200:
            raise ValueError("should have at most 200 bytes")
        if value != printable(value):
            raise ValueError("should hold no control characters")
        return value

    @cached_property
    def stages(self) -> tuple[GrowthStage, ...]:
        """The stages of the run, each with its plan; a run whose depth stays has one."""
        return self.stages_from(None)

    def stages_from(self, first: DepthPlan | None) -> tuple[GrowthStage, ...]:
        """The stages of a run that begins with the layers of ``first``, an unlooped plan (None: fresh ones).

        Raises:
            MegaloopError: growth, loops or depth events that do not fit the layers or the steps.
        """
        plan = unloop(DepthPlan.parse(self.depth))
        if self.growth is None:
            plan = first or plan
            stages: tuple[GrowthStage, ...] = (GrowthStage(0, self.train.steps, plan, Growth.none(plan)),)
        else:
            stages = self.growth.stages(plan.layers, self.train.steps, first)
        stages = loop_stages(stages, self.depth, self.loop.style)
        events = []
        for event in self.depth_events:
            if (event.depth is None) != event.untie:
                raise MegaloopError(f"depth_events: the one at {event.at:g} needs either a depth, or untie: true")
            events.append(DepthEvent(round(event.at * self.train.steps), event.depth))
        return with_events(stages, events, self.loop.style)

    @cached_property
    def loop_counts(self) -> LoopCounts:
        """How often a loop runs in each step; :meth:`megaloop.depth.LoopCounts.of` a stage's mean."""
        looped = [stage.first_step for stage in self.stages if stage.plan.is_looped]
        return LoopCounts(
            kind=self.loop.count,
            least=self.loop.min_count,
            most=self.loop.max_count,
            sigma=self.loop.sigma,
            first_step=looped[0] if looped else 0,
            ramp_steps=round(self.loop.ramp * self.train.steps),
            seed=self.seed,
        )

    def loop_times(self, plan: DepthPlan, step: int) -> int | None:
        """How often a plan's loop runs in a step, counted from 0; None where the plan itself says it."""
        if plan.loop is None or (self.loop.count == "fixed" and self.loop.ramp == 0):
            return None
        return self.loop_counts.of(plan.loop.times).at(step)

    @property
    def plan(self) -> DepthPlan:
        """The plan of the last stage; the ids of a grown one tell its history."""
        return self.stages[-1].plan

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run_dir or Path("runs") / self.name

    def check(self) -> None:
        """Raise MegaloopError where single values are fine but do not fit together (no files are read)."""
        self.model.check()
        self._check_loops()
        for stage in self.stages:
            self._check_parallel(stage.plan)
        if self.model.vocab_size is not None:
            self.check_vocab(self.model.vocab_size)
        if self.parallel.rounds > 1 and not any(
            self._parallel_at(stage.plan.layers)[0] > 1 and not stage.plan.is_looped for stage in self.stages
        ):
            raise MegaloopError(
                f"parallel.rounds {self.parallel.rounds}: rounds are for pipelines of unlooped models (a loop sets its own); "
                "set parallel.pp to 2 or more, or leave rounds out"
            )
        for stage in self.stages:
            dp = self._parallel_at(stage.plan.layers)[2]
            if dp is not None and self.train.global_batch % (self.train.micro_batch * dp):
                raise _batch_error(self.train, dp)
        if self.schedule.warmup_steps > self.train.steps:
            raise MegaloopError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is more than train.steps {self.train.steps}"
            )
        self._check_weights()
        self._check_fine_tuning()
        if self.growth is not None:
            self._check_growth(self.growth)

    def _check_fine_tuning(self) -> None:
        """Refuse options of fine-tuning that nothing would take up, and fine-tuning without a tokenizer."""
        data, default = self.data, DataConfig.model_fields
        if data.format == "tokens":
            for name in ("prompt_field", "answer_field", "tokenizer", "validation_fraction"):
                if getattr(data, name) != default[name].default:
                    raise MegaloopError(f"data.{name} is of data.format sft; set that, or leave it out")
        elif data.tokenizer is None and self.init is None:
            raise MegaloopError(
                "data.format sft: no tokenizer; begin with a checkpoint that has one (init=CKPT), or set data.tokenizer"
            )

    def _check_weights(self) -> None:
        """Refuse phases of the mixture without samples, and a cooldown's weights where there is no cooldown."""
        for phase, name in enumerate(("stable", "cooldown")):
            if not any(source.weights[phase] for source in self.data.sources):
                raise MegaloopError(f"data.sources: every weight of the {name} phase is 0; give one source a share")
        if self.cooldown_sample is None and any(len(set(source.weights)) > 1 for source in self.data.sources):
            raise MegaloopError(
                f"data.sources: weights of a cooldown, but schedule.kind {self.schedule.kind} with cooldown "
                f"{self.schedule.cooldown:g} has none; use a trapezoid with a cooldown, or give each source one weight"
            )

    @property
    def cooldown_sample(self) -> int | None:
        """The global sample with which the trapezoid's cooldown begins; None: there is none."""
        begin = self.schedule.cooldown_start(self.train.steps)
        if self.schedule.kind != "trapezoid" or begin >= self.train.steps:
            return None
        return begin * self.train.global_batch

    def _check_loops(self) -> None:
        """Refuse options of loops that contradict each other, or that nothing would take up."""
        loop, plans = self.loop, [stage.plan for stage in self.stages if stage.plan.is_looped]
        if loop != LoopConfig() and not plans:
            changed = next(
                name for name in LoopConfig.model_fields if getattr(loop, name) != getattr(LoopConfig(), name)
            )
            raise MegaloopError(
                f"loop.{changed}: depth {self.depth} has no loop; use one, for example depth={_looped_example(self.plan)}, "
                "or leave it out"
            )
        for plan in plans:
            if plan.loop is None:
                if loop != LoopConfig():
                    raise MegaloopError(f"loop: depth {plan} is more than one loop, which has no options")
                continue
            times = plan.loop.times
            if loop.backprop is not None and loop.backprop > times:
                raise MegaloopError(
                    f"loop.backprop {loop.backprop} is more than the {times} times that {plan.notation} loops; "
                    f"choose at most {times}, or leave it out"
                )
            if not loop.min_count <= times <= (loop.max_count or times):
                raise MegaloopError(
                    f"loop: min_count {loop.min_count} and max_count {loop.max_count} exclude the {times} times, the mean, "
                    f"that {plan.notation} loops"
                )
        if loop.backprop is not None and loop.injection == "none":
            raise MegaloopError(
                f"loop.backprop {loop.backprop} without loop.injection: no gradient would reach what comes before the loop; "
                "use loop.injection=add or concat, or leave backprop out"
            )

    def _check_parallel(self, plan: DepthPlan) -> None:
        """Refuse a topology that does not fit a plan."""
        layers = plan.layers
        pp, tp, _, where = self._parallel_at(layers)
        model = self.model
        for what, value in (
            ("num_heads", model.num_heads),
            ("num_kv_heads", model.num_kv_heads),
            ("ffn_size", model.ffn_size),
        ):
            if value % tp:
                raise MegaloopError(
                    f"{where}.tp {tp} does not divide model.{what} {value}; choose a tp that divides it"
                )
        if self.parallel.sequence_parallel and self.data.sequence_length % tp:
            raise MegaloopError(
                f"parallel.sequence_parallel: tp {tp} does not divide data.sequence_length {self.data.sequence_length}"
            )
        rounds = self.parallel.rounds
        if pp > 1 and plan.is_looped and plan.loop is None:
            raise MegaloopError(
                f"depth {plan} is more than one loop of neighbouring layers, which a pipeline cannot spread over ranks; "
                f"use {where}.pp=1, or a depth such as 4-4x4-4"
            )
        if pp > 1 and not plan.is_looped and rounds > 1 and pp * rounds > layers:
            raise MegaloopError(
                f"parallel.rounds {rounds} x {where}.pp {pp} makes {pp * rounds} slices, more than the {layers} layers; "
                f"use at most {max(layers // pp, 1)} rounds, or fewer pipeline ranks"
            )
        if pp > layers:
            raise MegaloopError(
                f"{where}.pp {pp} is more pipeline ranks than the {layers} layers of "
                f"{f'depth {self.depth}' if self.growth is None else 'that growth stage'}; "
                f"use pp <= {layers} or a deeper model"
            )

    def _check_growth(self, growth: GrowthConfig) -> None:
        """Refuse a growth during the cooldown, and topologies out of order or never reached."""
        begin = self.schedule.cooldown_start(self.train.steps)
        late = [stage for stage in self.stages[1:] if stage.first_step > begin and not stage.event]
        if self.schedule.kind == "trapezoid" and late:
            raise MegaloopError(
                f"growth: to {late[0].plan.layers} layers at step {late[0].first_step}, but the cooldown begins at step "
                f"{begin} (schedule.cooldown {self.schedule.cooldown:g}); end the growth earlier (growth.end, or the list of stages)"
            )
        counts = [each.layers for each in growth.topology]
        if counts != sorted(set(counts)):
            raise MegaloopError(
                f"growth.topology: layers {', '.join(map(str, counts))}; each must be more than the one before"
            )
        if counts and counts[-1] > self.plan.layers:
            raise MegaloopError(
                f"growth.topology: an entry for {counts[-1]} layers, but there are {self.plan.layers}; it is never reached"
            )

    def _parallel_at(self, layers: int) -> tuple[int, int, int | None, str]:
        """(pp, tp, dp or None, the section that says so) at a number of layers."""
        reached = [each for each in (self.growth.topology if self.growth else ()) if each.layers <= layers]
        if not reached:
            return self.parallel.pp, self.parallel.tp, self.parallel.dp, "parallel"
        index, entry = len(reached) - 1, reached[-1]
        return entry.pp, entry.tp or self.parallel.tp, entry.dp, f"growth.topology.{index}"

    def check_vocab(self, rows: int) -> None:
        """Raise MegaloopError where the embedding's rows do not divide over the tensor-parallel ranks."""
        for stage in self.stages:
            _, tp, _, where = self._parallel_at(stage.plan.layers)
            if rows % tp:
                raise MegaloopError(
                    f"{where}.tp {tp} does not divide the vocabulary of {rows} rows; "
                    f"set model.vocab_size to a multiple, for example {-(-rows // tp) * tp}"
                )

    @property
    def smallest_world(self) -> int:
        """The fewest ranks on which every stage's topology fits as far as it is spelled out."""
        needed = [self._parallel_at(stage.plan.layers) for stage in self.stages]
        return max(pp * tp * (dp or 1) for pp, tp, dp, _ in needed)

    @property
    def leaves_dp_open(self) -> bool:
        """Some stage takes as many data-parallel replicas as the world size allows."""
        return any(self._parallel_at(stage.plan.layers)[2] is None for stage in self.stages)

    def topology(self, world_size: int, layers: int | None = None) -> tuple[int, int, int]:
        """(pp, tp, dp) on ``world_size`` ranks.

        Args:
            layers: during the growth stage of this many layers; default: the last.

        Raises:
            MegaloopError: the world size does not factor, or the global batch does not divide over dp.
        """
        pp, tp, spelled, where = self._parallel_at(self.plan.layers if layers is None else layers)
        dp = spelled or max(world_size // (pp * tp), 1)
        if pp * tp * dp != world_size:
            raise MegaloopError(
                f"{where}: pp {pp} x tp {tp} x dp {dp} makes {pp * tp * dp} ranks, but there are {world_size}; "
                "use that many, or change the topology"
            )
        if self.train.global_batch % (self.train.micro_batch * dp):
            raise _batch_error(self.train, dp)
        return pp, tp, dp

    def check_world(self, world_size: int, first_step: int = 0, stop: int | None = None) -> None:
        """Raise MegaloopError unless every growth stage has a topology on ``world_size`` ranks.

        Args:
            first_step, stop: only stages with steps in [first_step, stop) count; the others run on other ranks.
        """
        for stage in stages_between(self.stages, first_step, stop):
            pp, _, dp = self.topology(world_size, stage.plan.layers)
            micro_batches = self.train.global_batch // (self.train.micro_batch * dp)
            if pp > micro_batches and (self.parallel.rounds > 1 or stage.plan.is_looped):
                raise MegaloopError(
                    f"train.global_batch {self.train.global_batch} makes {micro_batches} micro-batches of "
                    f"{self.train.micro_batch} per step and replica; rounds over {pp} pipeline ranks need {pp} or more: "
                    "raise train.global_batch, or lower train.micro_batch or pp"
                )

    def to_yaml(self) -> str:
        """The configuration as YAML that :func:`load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _text_of_number(value: Any) -> Any:
    """YAML reads a depth of 24 layers as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _looped_example(plan: DepthPlan) -> str:
    block = min(4, plan.layers)
    before = (plan.layers - block) // 2
    return f"{before}-{block}x2-{plan.layers - block - before}"


def _batch_error(train: TrainConfig, dp: int) -> MegaloopError:
    unit = train.micro_batch * dp
    return MegaloopError(
        f"train.global_batch {train.global_batch} is not a multiple of "
        f"micro_batch {train.micro_batch} x dp {dp} = {unit}; "
        f"choose for example {-(-train.global_batch // unit) * unit}"
    )


def parse_override(text: str) -> tuple[list[str], Any]:
    """``"train.steps=10"`` as (["train", "steps"], 10); the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise MegaloopError(f"override {quoted(text)}: expected key=value, for example train.steps=100")
    try:
        return key.strip().split("."), parse_yaml(value)
    except MegaloopError as error:
        raise MegaloopError(f"override {quoted(text)}: the value is {error}") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides, validate.

    Raises:
        MegaloopError: no such file, not YAML, an unknown key (the nearest known one is named), a bad value.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise MegaloopError(f"configuration {path}: no such file") from None
    except MegaloopError as error:
        raise MegaloopError(f"configuration {path}: {error}") from None
    if not isinstance(values, dict):
        raise MegaloopError(f"configuration {path}: expected a mapping of keys, found {type(values).__name__}")
    for override in overrides:
        keys, value = parse_override(override)
        _set(values, keys, value, override)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise MegaloopError(f"configuration {path}: {_explain(error)}") from None
    config.check()
    return config


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    node: Any = values
    for key in keys[:-1]:
        if isinstance(node, list):
            node = node[_place(node, key, override)]
            continue
        if not isinstance(node, dict):
            raise _no_section(override, key)
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
    if isinstance(node, list):
        node[_place(node, keys[-1], override)] = value
    elif isinstance(node, dict):
        node[keys[-1]] = value
    else:
        raise _no_section(override, keys[-1])


def _no_section(override: str, key: str) -> MegaloopError:
    return MegaloopError(f"override {quoted(override)}: {quoted(key)} lies under a value that is no section")


def _place(items: list[Any], key: str, override: str) -> int:
    """Which element of a list a key means."""
    place = parse_whole(key)
    if place is None or place >= len(items):
        have = f"places 0 to {len(items) - 1}" if items else "none"
        raise MegaloopError(f"override {quoted(override)}: {quoted(key)} is no element of this list; it has {have}")
    return place


def fields(model: type[BaseModel] | None = None, prefix: str = "", item: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, pydantic's field) of every value and section of a configuration, parents first.

    Args:
        item: what stands for an element of a list in the names: ``"0."``, or nothing.
    """
    for name, field in (model or Config).model_fields.items():
        yield prefix + name, field
        section, listed = _section_of(field.annotation)
        if section is not None:
            yield from fields(section, f"{prefix}{name}.{item if listed else ''}", item)


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if it does, and whether as a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for inner in typing.get_args(annotation):
        section, listed = _section_of(inner)
        if section is not None:
            return section, listed or typing.get_origin(annotation) is tuple
    return None, False


_BRANCHES = (
    "tuple[StageConfig, ...]",
    "PhaseWeightsConfig",
)  # pydantic's names of what a value may be instead of plain


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error, as one line."""
    errors: list[Mapping[str, Any]] = [*error.errors()]
    # of a schedule that is a list, what is wrong inside, not that it is no text; an unknown key before what it left out
    listed = [each for each in errors if each["loc"][-1] not in _BRANCHES and set(each["loc"]) & set(_BRANCHES)]
    first = min(listed or errors[:1], key=lambda each: each["type"] != "extra_forbidden")
    if first["loc"][:2] == ("growth", "schedule") or "weight" in first["loc"]:
        plain_names = ("str", "constrained-float", *_BRANCHES)
        first = {**first, "loc": tuple(part for part in first["loc"] if part not in plain_names)}
    where = printable(".".join(str(part) for part in first["loc"]), 200)
    if first["type"] == "missing":
        return f"{where}: missing"
    if first["type"] != "extra_forbidden":
        return f"{where}: {printable(first['msg'].removeprefix('Value error, '), 300)} (found {quoted(first['input'])})"
    plain = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    return f"unknown key {where!r}; {_nearest(plain)}"


def _nearest(key: str) -> str:
    """What somebody may have meant by a key that there is not; what there is, where nothing is like it."""
    names = [name for name, _ in fields(Config)]
    parent, _, leaf = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == parent]
    if len(key) <= 100:  # comparing takes time in proportion to the square
        if near := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6):
            return f"did you mean {'.'.join(filter(None, [parent, near[0]]))!r}?"
        # the right name in the wrong section, or the whole of it misspelt
        elsewhere = [name for name in names if name.rpartition(".")[2] == leaf]
        if near := elsewhere[:1] or difflib.get_close_matches(key, names, n=1, cutoff=0.75):
            return f"did you mean {near[0]!r}?"
    return f"{parent or 'a configuration'} has {', '.join(siblings)}"
