"""What a run tells of itself: training's results as the events and records of :mod:`megaloop.runs`, sent to rank 0's sinks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from megaloop.checkpoint import RunState
from megaloop.config import Config
from megaloop.depth import DepthPlan, GrowthStage
from megaloop.depth.flops import flops_per_token, parameters
from megaloop.depth.schedule import full_depth
from megaloop.parallel.engine import StepResult, TrainingEngine
from megaloop.parallel.live import Resharded
from megaloop.runs import events
from megaloop.runs.directory import NoDirectory, RunDirectory
from megaloop.runs.metrics import RankRecord, RanksRecord, StepRecord
from megaloop.runs.sinks import TENSORBOARD, Hub, RunFiles, TensorBoard
from megaloop.runtime.device import local_device
from megaloop.runtime.hardware import describe_machine, device_name, memory_bytes, peak_flops
from megaloop.train.console import ConsoleSink

if TYPE_CHECKING:
    from megaloop.config.changes import ChangedSetting
    from megaloop.data import Sources
    from megaloop.runs.position import Change
    from megaloop.train.faults import RollBack
    from megaloop.train.start import Damage

__all__ = ["RunReporter"]


class RunReporter:
    """Makes events and records of what a run does; a context, in which rank 0's sinks are open. Every rank has one.

    Args:
        start: where the run begins.
        directory: the run's, as this rank has it.
        go_on: the command that goes on with the run, where it is known.
        restarts: how often the launcher has started the ranks again.

    Attributes:
        hub: takes events as they are; it has sinks on rank 0 only.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        start: RunState,
        directory: RunDirectory | NoDirectory,
        go_on: str | None = None,
        restarts: int = 0,
    ):
        self._config, self._vocab_size = config, vocab_size
        self._start, self._directory = start, directory
        self._go_on, self._restarts = go_on, restarts
        self._began = time.monotonic()
        self._tokens_per_step = config.train.global_batch * config.data.sequence_length
        self._peak = peak_flops(device_name(local_device()), config.train.precision)
        self._done = start
        self._ending = "finished"
        self.hub = Hub()

    def __enter__(self) -> Self:
        directory, step = self._directory, self._start.step
        if isinstance(directory, NoDirectory):
            return self
        if step or directory.last_step() is not None:
            directory.resume_at(step)
        try:
            self.hub.add(RunFiles(directory.path))
            if self._config.logging.tensorboard:
                self.hub.add(TensorBoard(directory.path / TENSORBOARD, start_step=step))
            self.hub.add(ConsoleSink(self._config, step))
        except BaseException:
            self.hub.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reason = self._ending if kind is None else "interrupted" if kind is KeyboardInterrupt else f"error: {error}"
        try:
            self.hub.event(events.RunStopped(self._done.step, time.monotonic() - self._began, reason))
        finally:  # the live line ends even where the event can't be written
            self.hub.close()

    @property
    def lost(self) -> bool:
        """Whether the run's directory, or a file that the run appends to, was deleted, moved or replaced; rank 0 looks."""
        return self._directory.lost or self.hub.lost

    def recent_losses(self, count: int) -> list[float]:
        """The last ``count`` losses of the model as it is, oldest first; none on ranks other than 0."""
        return self._directory.recent_losses(count)

    # --- beginning and end ---

    def begins(
        self, engine: TrainingEngine, sources: Sources, checkpoint: Path | None, stages: Sequence[GrowthStage]
    ) -> None:
        """What was built, from what, on what."""
        self._use(engine)
        config = self._config
        self.hub.event(
            events.RunStarted(
                self._start.step,
                directory=config.directory,
                machine=describe_machine(),
                plan=engine.plan,
                layout=self._layout(engine),
                parameters=parameters(engine.plan, config.model, vocab_size=self._vocab_size),
                vocab_size=self._vocab_size,
                precision=config.train.precision,
                kernels=engine.kernels,
                torch=torch.__version__,
                data=sources.describe(),
                state=self._start,
                stages=stages,
                operator=None if config.growth is None else config.growth.operator,
                checkpoint=checkpoint,
                restarts=self._restarts,
                seconds=time.monotonic() - self._began,
            )
        )

    def passed_over(self, damaged: Sequence[Damage]) -> None:
        """The run goes on from an earlier checkpoint than its newest, and why."""
        for damage in damaged:
            self.hub.event(events.CheckpointPassedOver(self._start.step, damage.step, damage.reason))

    def resumed(
        self,
        changes: Sequence[Change],
        settings: Sequence[ChangedSetting],
        saved: RunState,
        lr_was: float | None,
        lr: float,
    ) -> None:
        """What is other than it was where the run was saved.

        Args:
            saved: its state then.
            lr_was: what this configuration makes the learning rate of the last step; None: there is nothing to compare.
            lr: that of the next step.
        """
        step, steps = self._start.step, self._config.train.steps
        for change in changes:
            self.hub.event(events.ConfigChanged(step, change.what, change.text))
        if settings:
            self.hub.event(events.SettingsChanged(step, tuple(settings)))
        if saved.data is None or any(source.train is None for source in saved.data.sources):
            self.hub.event(events.DataNotCompared(step))
        jump = events.ScheduleChanged(step, saved.lr, lr, saved.steps, steps)
        if saved.lr is None:
            differs = jump.had_finished and saved.steps != steps
        else:
            differs = lr_was is not None and not math.isclose(saved.lr, lr_was, rel_tol=1e-9)
        if differs:
            self.hub.event(jump)

    def rolled_back(self, from_: RollBack) -> None:
        """Training went wrong, and where it goes on."""
        self.hub.event(events.RolledBack(self._start.step, from_.step, from_.reason, from_.samples))

    def ends(self, reason: str) -> None:
        """Why the run will end before its last step, as its last event is to say."""
        self._ending = reason

    def ends_early(self, step: int, stop_at: int | None) -> None:
        """What is saved, and how to go on, up to ``stop_at`` where the run was to end there and has not come that far."""
        self.hub.event(events.EndedEarly(step, stop_at, self._go_on))

    def finished(self) -> None:
        """What growing has saved."""
        if self._config.growth is None:
            return
        done = self._done
        per_step = self._flops_of(full_depth(self._config.stages), None)
        full = per_step * done.tokens / self._tokens_per_step  # the batch may have been another for a while
        self.hub.event(events.GrowthSavings(done.step, done.flops, full, per_step))

    # --- depth ---

    def grown(self, step: int, before: DepthPlan, resharded: Resharded, loss_before: float, loss_after: float) -> None:
        """A growth in flight; losses are those of the validation samples, in nats per token."""
        engine, topology_before = resharded.engine, self._topology
        self._use(engine)
        flight = events.InFlight(
            topology_before=topology_before,
            layout=self._layout(engine),
            seconds=resharded.seconds,
            build_seconds=resharded.build_seconds,
            exchange_seconds=resharded.exchange_seconds,
            moved=tuple(resharded.plan.received()),
            in_place=tuple(resharded.plan.in_place),
            loss_before=loss_before,
        )
        self.hub.event(events.DepthChanged.between(step, before, engine.plan, loss_after, flight))

    def grown_on_load(self, step: int, before: DepthPlan, engine: TrainingEngine, loss_after: float) -> None:
        """The checkpoint was deepened while it was read."""
        self.hub.event(events.DepthChanged.between(step, before, engine.plan, loss_after))

    def _use(self, engine: TrainingEngine) -> None:
        """From here on, steps are of this engine's plan, on its topology."""
        self._plan, self._topology = engine.plan, engine.topology

    def _layout(self, engine: TrainingEngine) -> events.Layout:
        return events.Layout(engine.topology, engine.slices, engine.micro_batches, self._config.train.micro_batch)

    # --- steps ---

    def stepped(
        self,
        at: RunState,
        result: StepResult,
        lr: float,
        seconds: float,
        validated: tuple[float, float] | None,
        iterations: int | None = None,
    ) -> None:
        """A step; ``validated`` is (nats per token, bits per byte) where validation followed it.

        Args:
            iterations: how often the loop ran, where that was drawn.
        """
        self._done = at
        tflops = self.step_flops(iterations) / seconds / self._topology.world_size / 1e12
        record = StepRecord(
            step=at.step,
            tokens=at.tokens,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            layers=self._plan.layers,
            depth=len(self._plan.calls(iterations)),
            flops=at.flops,
            tokens_per_second=self._tokens_per_step / seconds,
            tflops=tflops,
            mfu=tflops * 1e12 / self._peak if self._peak else None,
            pp=self._topology.pp,
            tp=self._topology.tp,
            dp=self._topology.dp,
            seconds=seconds,
            memory_bytes=memory_bytes(local_device()),
        )
        if validated is not None:
            record = replace(record, val_loss=validated[0], val_bits_per_byte=validated[1])
        self.hub.step(record)
        if not result.applied:
            self.hub.event(events.StepSkipped(at.step, result.grad_norm, at.skipped))
        if validated is not None:
            self.hub.event(events.Validated(at.step, *validated))

    def ranks(self, step: int, records: Sequence[RankRecord]) -> None:
        """What each rank did in a step."""
        self.hub.ranks(RanksRecord(step, self._topology, records))

    def step_flops(self, iterations: int | None) -> int:
        """Model FLOPs of one optimizer step over all ranks, with the loop so often (None: as the plan says)."""
        return self._flops_of(self._plan, iterations)

    def _flops_of(self, plan: DepthPlan, iterations: int | None) -> int:
        config = self._config
        per_token = flops_per_token(
            plan,
            config.model,
            config.data.sequence_length,
            vocab_size=self._vocab_size,
            iterations=iterations,
            backprop=config.loop.backprop,
            gate=config.loop.gate_training,
        )
        return per_token.total * self._tokens_per_step
