"""The configuration of a run as one value."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import yaml
from pydantic import Field, field_validator

from megaloop.config.checks import check
from megaloop.config.data import DataConfig
from megaloop.config.depth import DepthEventConfig, GrowthConfig, LoopConfig
from megaloop.config.model import ModelConfig
from megaloop.config.section import Depth, Section
from megaloop.config.training import (
    CheckpointConfig,
    FaultsConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)
from megaloop.depth import DepthPlan, DepthSpec, Growth, GrowthStage, LoopCounts, stages_between, unloop
from megaloop.depth.schedule import DepthEvent, loop_stages, with_events
from megaloop.errors import MegaloopError
from megaloop.text import printable

__all__ = ["Config"]


class Config(Section):
    """Everything a run needs to know; written to RUN/config.yaml as resolved."""

    name: str = Field(default="run", min_length=1, pattern=r"^[^/\x00]+$")
    """Name of the run."""
    run_dir: Path | None = None
    """Where the run writes; empty: runs/NAME."""
    init: Path | None = None
    """Checkpoint (or run) whose weights a new run starts from; its moments, step and data position are not taken."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the sample order."""
    depth: Depth = DepthSpec.parse("32")
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
        plan = unloop(self.depth.plan)
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

    def loop_iterations(self, plan: DepthPlan, step: int) -> int | None:
        """How often a plan's loop runs in a step, counted from 0; None where the plan itself says it."""
        if plan.loop is None or (self.loop.count == "fixed" and self.loop.ramp == 0):
            return None
        return self.loop_counts.of(plan.loop.iterations).at(step)

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
        check(self)

    @property
    def cooldown_sample(self) -> int | None:
        """The global sample with which the trapezoid's cooldown begins; None: there is none."""
        begin = self.schedule.cooldown_start(self.train.steps)
        if self.schedule.kind != "trapezoid" or begin >= self.train.steps:
            return None
        return begin * self.train.global_batch

    def parallel_at(self, layers: int) -> tuple[int, int, int | None, str]:
        """(pp, tp, dp or None, the section that says so) at a number of layers."""
        reached = [stage for stage in (self.growth.topology if self.growth else ()) if stage.layers <= layers]
        if not reached:
            return self.parallel.pp, self.parallel.tp, self.parallel.dp, "parallel"
        index, entry = len(reached) - 1, reached[-1]
        return entry.pp, entry.tp or self.parallel.tp, entry.dp, f"growth.topology.{index}"

    def check_vocab(self, rows: int) -> None:
        """Raise MegaloopError where the embedding's rows do not divide over the tensor-parallel ranks."""
        for stage in self.stages:
            _, tp, _, where = self.parallel_at(stage.plan.layers)
            if rows % tp:
                raise MegaloopError(
                    f"{where}.tp {tp} does not divide the vocabulary of {rows} rows; "
                    f"set model.vocab_size to a multiple, for example {-(-rows // tp) * tp}"
                )

    @property
    def smallest_world(self) -> int:
        """The fewest ranks on which every stage's topology fits as far as it is spelled out."""
        needed = [self.parallel_at(stage.plan.layers) for stage in self.stages]
        return max(pp * tp * (dp or 1) for pp, tp, dp, _ in needed)

    @property
    def leaves_dp_open(self) -> bool:
        """Some stage takes as many data-parallel replicas as the world size allows."""
        return any(self.parallel_at(stage.plan.layers)[2] is None for stage in self.stages)

    def topology(self, world_size: int, layers: int | None = None) -> tuple[int, int, int]:
        """(pp, tp, dp) on ``world_size`` ranks.

        Args:
            layers: during the growth stage of this many layers; default: the last.

        Raises:
            MegaloopError: the world size does not factor, or the global batch does not divide over dp.
        """
        pp, tp, spelled, where = self.parallel_at(self.plan.layers if layers is None else layers)
        dp = spelled or max(world_size // (pp * tp), 1)
        if pp * tp * dp != world_size:
            raise MegaloopError(
                f"{where}: pp {pp} x tp {tp} x dp {dp} makes {pp * tp * dp} ranks, but there are {world_size}; "
                "use that many, or change the topology"
            )
        self.train.micro_batches(dp)  # refuses a batch that does not divide
        return pp, tp, dp

    def check_world(self, world_size: int, first_step: int = 0, stop: int | None = None) -> None:
        """Raise MegaloopError unless every growth stage has a topology on ``world_size`` ranks.

        Args:
            first_step, stop: only stages with steps in [first_step, stop) count; the others run on other ranks.
        """
        for stage in stages_between(self.stages, first_step, stop):
            pp, _, dp = self.topology(world_size, stage.plan.layers)
            micro_batches = self.train.micro_batches(dp)
            if pp > micro_batches and (self.parallel.rounds > 1 or stage.plan.is_looped):
                raise MegaloopError(
                    f"train.global_batch {self.train.global_batch} makes {micro_batches} micro-batches of "
                    f"{self.train.micro_batch} per step and replica; rounds over {pp} pipeline ranks need {pp} or more: "
                    "raise train.global_batch, or lower train.micro_batch or pp"
                )

    def to_yaml(self) -> str:
        """The configuration as YAML that :func:`load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
