"""What a run tells: metrics, events and the progress line, from rank 0; the other ranks are silent."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import torch

from megaloop.checkpoint import DepthState, RunState
from megaloop.config import Config
from megaloop.depth import DepthPlan, GrowthStage
from megaloop.depth.flops import flops_per_token, parameters
from megaloop.depth.schedule import full_depth
from megaloop.parallel.engine import StepResult, TrainingEngine
from megaloop.parallel.live import Resharded
from megaloop.runs.directory import RunDirectory, last_records
from megaloop.runs.metrics import MetricsWriter, StepRecord, timestamp
from megaloop.runs.records import number
from megaloop.runtime.device import local_device
from megaloop.runtime.hardware import describe_machine, device_name, memory_bytes, peak_flops
from megaloop.terminal import SafeConsole
from megaloop.text import format_bytes, printable
from megaloop.train.progress import ProgressReporter

if TYPE_CHECKING:
    from megaloop.data import Sources
    from megaloop.runs.position import Change
    from megaloop.train.faults import RollBack, Spike
    from megaloop.train.start import Damage

__all__ = ["RankRecord", "RunReporter", "describe_depths"]


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


class RunReporter:
    """Reports a run on rank 0; every method is a no-op elsewhere.

    Args:
        start: where the run begins.
        directory: rank 0's run directory; anything else on other ranks.
        go_on: the command that goes on with the run, where it is known.
        restarts: how often the launcher has started the ranks again.

    Attributes:
        flops_per_step: model FLOPs of one optimizer step, over all ranks.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        start: RunState,
        directory: object,
        go_on: str | None = None,
        restarts: int = 0,
    ):
        self._config, self._vocab_size = config, vocab_size
        self._start, self._go_on, self._restarts = start, go_on, restarts
        self._directory = directory if isinstance(directory, RunDirectory) else None
        self._began = time.monotonic()
        self._stack = ExitStack()
        self._tokens_per_step = config.train.global_batch * config.data.sequence_length
        self.flops_per_step = 0
        self._peak = peak_flops(device_name(local_device()), config.train.precision)
        self._done = start
        self._ending = "finished"

    def __enter__(self) -> Self:
        if self._directory is not None:
            config, step = self._config, self._start.step
            if step or self._directory.last_step() is not None:
                self._directory.resume_at(step)
            self._metrics = self._stack.enter_context(
                MetricsWriter(self._directory.path, config.logging.tensorboard, start_step=step)
            )
            self._progress = self._stack.enter_context(
                ProgressReporter(config.train.steps, step, config.logging.every, SafeConsole())
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._directory is not None:
            reason = self._ending if kind is None else "interrupted" if kind is KeyboardInterrupt else f"error: {error}"
            seconds = time.monotonic() - self._began
            self._stack.callback(self._metrics.event, "stop", self._done.step, seconds=seconds, reason=reason)
        self._stack.close()  # the event comes first; the live line ends even where it can't be written

    @property
    def lost(self) -> bool:
        """Whether the run's directory, or a file that the run appends to, was deleted, moved or replaced; rank 0 looks."""
        return self._directory is not None and (self._directory.lost or self._metrics.lost)

    def begins(
        self, engine: TrainingEngine, sources: Sources, checkpoint: Path | None, stages: Sequence[GrowthStage]
    ) -> None:
        """Say what was built, from what, on what."""
        self._use(engine)
        if self._directory is None:
            return
        plan, config, topology = self._plan, self._config, self._topology
        count = parameters(plan, config.model, vocab_size=self._vocab_size)
        self._progress.message(f"run {self._directory.path}  on {describe_machine()}")
        self._progress.message(
            f"model {count / 1e6:.1f}M parameters, {_depth(plan)}, "
            f"vocabulary {self._vocab_size}, {config.train.precision}"
        )
        self._progress.message(self._layout(engine))
        self._progress.message(f"kernels: {engine.kernels}")
        self._progress.message(sources.describe())
        depths = describe_depths(self._start, stages)
        if config.growth is not None:
            self._progress.message(f"growth {config.growth.operator}: {depths}")
        elif len(stages) > 1:
            self._progress.message(f"depth: {depths}")
        if checkpoint is not None:
            self._progress.message(f"resuming {checkpoint} at step {self._start.step}")
        self._metrics.event(
            "start",
            self._start.step,
            seconds=time.monotonic() - self._began,
            plan=str(plan),
            pp=topology.pp,
            tp=topology.tp,
            dp=topology.dp,
            parameters=count,
            attention=engine.kernels.attention,
            norm=engine.kernels.norm,
            adam="torch fused",
            torch=torch.__version__,
            ranks=topology.world_size,
            restarts=self._restarts,
        )

    def passed_over(self, damaged: Sequence[Damage]) -> None:
        """Record that the run goes on from an earlier checkpoint than its newest, and why."""
        if self._directory is None:
            return
        for each in damaged:
            self._metrics.event("rollback", self._start.step, step_before=each.step, reason=each.reason)
            self._progress.message(
                f"checkpoint of step {each.step} is damaged ({each.reason}); going back to step {self._start.step}"
            )

    def resumed(self, changes: Sequence[Change], saved: RunState, lr_was: float | None, lr: float) -> None:
        """Record what is other than it was where the run was saved.

        Args:
            saved: its state then.
            lr_was: what this configuration makes the learning rate of the last step; None: there is nothing to compare.
            lr: that of the next step.
        """
        if self._directory is None:
            return
        step = self._start.step
        for change in changes:
            self._metrics.event("changed", step, what=change.what, text=change.text)
            self._progress.message(f"step {step}  --allow {change.what}: {change.text}")
        if saved.data is None or any(each.train is None for each in saved.data.sources):
            self._progress.message(
                "the checkpoint is of an earlier version, which kept no hashes of the data: whether it is the same is not checked"
            )
        finished = saved.steps is not None and saved.step >= saved.steps
        if saved.lr is None:
            differs = finished and saved.steps != self._config.train.steps
        else:
            differs = lr_was is not None and not math.isclose(saved.lr, lr_was, rel_tol=1e-9)
        if not differs:
            return
        steps = self._config.train.steps
        self._metrics.event("schedule", step, lr_before=saved.lr, lr=lr, steps_before=saved.steps, steps=steps)
        rates = f"{'' if saved.lr is None else f'from {saved.lr:.2e} '}to {lr:.2e}"
        self._progress.message(
            f"step {step}  warning: this run was finished (train.steps was {saved.steps}, now {steps}): its learning rate jumps "
            f"{rates}; to train longer, resume from before its cooldown"
            if finished
            else f"step {step}  warning: the schedule is another than that of the steps so far: the learning rate jumps {rates}"
        )

    def rolled_back(self, from_: RollBack) -> None:
        """Record that training went wrong, and where it goes on."""
        if self._directory is None:
            return
        step, (start, stop) = self._start.step, from_.samples
        self._metrics.event("rollback", step, step_before=from_.step, reason=from_.reason, samples=[start, stop])
        self._progress.message(
            f"step {from_.step}  {from_.reason}: going back to step {step}; samples {start} to {stop - 1} are passed over"
        )

    def rolls_back(self) -> None:
        """The run ends here, to go on from an earlier step."""
        self._ending = "rollback"

    def recent_losses(self, count: int) -> list[float]:
        """The last ``count`` losses of the model as it is, oldest first; none on ranks other than 0."""
        if self._directory is None:
            return []
        records = last_records(self._directory.path, count)
        same = itertools.takewhile(
            lambda each: (
                (each.get("layers"), each.get("depth")) == (records[-1].get("layers"), records[-1].get("depth"))
            ),
            reversed(records),
        )
        return [loss for each in same if (loss := number(each, "loss")) is not None][::-1]

    def spiked(self, step: int, spike: Spike) -> None:
        """Record a loss that sticks out."""
        if self._directory is not None:
            self._metrics.event("spike", step, loss=spike.loss, median=spike.median, deviation=spike.deviation)
            self._progress.message(f"step {step}  warning: loss {spike.loss:.4f}, median before {spike.median:.4f}")

    def _use(self, engine: TrainingEngine) -> None:
        """From here on, steps are of this engine's plan, on its topology."""
        self._plan, self._topology = engine.plan, engine.topology
        self.flops_per_step = self.step_flops(None)

    def step_flops(self, times: int | None) -> int:
        """Model FLOPs of one optimizer step over all ranks, with the loop so often (None: as the plan says)."""
        return self._flops_of(self._plan, times)

    def _flops_of(self, plan: DepthPlan, times: int | None) -> int:
        config = self._config
        per_token = flops_per_token(
            plan,
            config.model,
            config.data.sequence_length,
            vocab_size=self._vocab_size,
            times=times,
            backprop=config.loop.backprop,
        )
        return per_token.total * self._tokens_per_step

    def _layout(self, engine: TrainingEngine) -> str:
        ranks = f"{engine.topology.world_size} rank{'s' if engine.topology.world_size > 1 else ''}"
        by_rank = zip(*engine.slices, strict=True)  # more rounds than one: 2+2+1
        stages = ", ".join("+".join(f"{stop - start}" for start, stop in each) for each in by_rank)
        return (
            f"{ranks}: {engine.topology}, layers per stage {stages}, "
            f"{engine.micro_batches} micro-batches of {self._config.train.micro_batch}"
        )

    def ranks(self, step: int, records: Sequence[RankRecord]) -> None:
        """Record what each rank did in a step."""
        if self._directory is None:
            return
        first = records[0].clock
        self._metrics.ranks(
            {
                "step": step,
                "time": timestamp(),
                "pp": self._topology.pp,
                "tp": self._topology.tp,
                "dp": self._topology.dp,
                "busy_seconds": [each.busy for each in records],
                "memory_bytes": [each.memory for each in records],
                "clock_seconds": [each.clock - first for each in records],
                "hosts": [each.host for each in records],
            }
        )

    def grown(self, step: int, before: DepthPlan, resharded: Resharded, loss_before: float, loss_after: float) -> None:
        """Record a growth in flight; losses are those of the validation samples, in nats per token."""
        old = self._topology
        engine, plan = resharded.engine, resharded.plan
        self._use(engine)
        if self._directory is None:
            return
        moved, in_place = plan.received(), plan.in_place
        self._metrics.event(
            _kind(before, engine.plan),
            step,
            seconds=resharded.seconds,
            bytes=sum(moved),
            live=True,
            plan_before=before.to_json(),
            plan=engine.plan.to_json(),
            topology_before={"pp": old.pp, "tp": old.tp, "dp": old.dp},
            topology={"pp": engine.topology.pp, "tp": engine.topology.tp, "dp": engine.topology.dp},
            build_seconds=resharded.build_seconds,
            exchange_seconds=resharded.exchange_seconds,
            moved_bytes=list(moved),
            in_place_bytes=list(in_place),
            loss_before=loss_before,
            loss_after=loss_after,
        )
        self._progress.message(
            f"step {step}  {_change(before, engine.plan)} in {resharded.seconds:.2f} s, "
            f"{format_bytes(sum(moved))} moved, {format_bytes(sum(in_place))} in place; "
            f"validation loss {loss_before:.4f} -> {loss_after:.4f}"
        )
        self._progress.message(self._layout(engine))

    def grown_on_load(self, step: int, before: DepthPlan, engine: TrainingEngine, loss_after: float) -> None:
        """Record that the checkpoint was deepened while it was read."""
        if self._directory is None:
            return
        self._metrics.event(
            _kind(before, engine.plan),
            step,
            live=False,
            plan_before=before.to_json(),
            plan=engine.plan.to_json(),
            loss_after=loss_after,
        )
        self._progress.message(
            f"step {step}  {_change(before, engine.plan)} while loading; validation loss {loss_after:.4f}"
        )

    def stepped(
        self,
        at: RunState,
        result: StepResult,
        lr: float,
        seconds: float,
        validated: tuple[float, float] | None,
        times: int | None = None,
    ) -> None:
        """Record a step; ``validated`` is (nats per token, bits per byte) where validation followed it.

        Args:
            times: how often the loop ran, where that was drawn.
        """
        self._done = at
        if self._directory is None:
            return
        tflops = self.step_flops(times) / seconds / self._topology.world_size / 1e12
        record = StepRecord(
            step=at.step,
            tokens=at.tokens,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            layers=self._plan.layers,
            depth=len(self._plan.uses(times)),
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
        waited = self._metrics.waiting
        self._metrics.step(record)
        if self._metrics.waiting and not waited:
            self._progress.message(f"step {at.step}  warning: no room on the disk; metrics and events wait in memory")
        self._progress.step(record)
        if not result.applied:
            self._metrics.event("skip", at.step, grad_norm=str(result.grad_norm), skipped=at.skipped)
            self._progress.message(f"step {at.step}  warning: the gradient is not finite, the step was skipped")
        if validated is not None:
            self._progress.validation(at.step, *validated)

    def finished(self) -> None:
        """Say what growing has saved."""
        if self._directory is None or self._config.growth is None:
            return
        done = self._done
        per_step = self._flops_of(full_depth(self._config.stages), None)
        full = per_step * done.tokens / self._tokens_per_step  # the batch may have been another for a while
        steps = round((full - done.flops) / per_step)
        self._progress.message(
            f"{done.flops:.3g} FLOPs, {done.flops / full:.1%} of what {done.step} steps at full depth cost: "
            f"growing saved {1 - done.flops / full:.1%}, as much as {steps} step{'s' if steps != 1 else ''} at full depth"
        )

    def signalled(self, step: int, name: str) -> None:
        """Record that a signal asked to end."""
        self._ending = f"signal {name}"
        if self._directory is not None:
            self._metrics.event("signal", step, name=name)
            self._progress.message(f"step {step}  {name}: saving, then leaving")

    def stopped(self, step: int) -> None:
        """Say that the run ends here because it was started with ``stop_at``."""
        self._ending = "stop_at"
        if self._directory is not None:
            self._progress.message(f"step {step}  stopping here as --stop-at asks")

    def ends_early(self, step: int, stop_at: int | None) -> None:
        """Say what is saved, and how to go on, up to ``stop_at`` where the run was to end there and has not come that far."""
        if self._directory is not None:
            done = f"stopped after step {step}, which is saved" if step else "stopped before the first step"
            until = "" if stop_at is None else f" --stop-at {stop_at}"
            how = f"go on with: {self._go_on}{until}" if self._go_on else "add --resume to go on"
            self._progress.message(f"{done}; {how}")

    def not_saved(self, step: int, reason: str) -> None:
        """Warn that a checkpoint could not be written; the run goes on."""
        if self._directory is not None:
            self._metrics.event("save_failed", step, reason=reason)
            self._progress.message(f"step {step}  warning: {reason.removesuffix(', then go on with --resume')}")

    def saved(
        self, step: int, path: Path, size: int, seconds: float, stall: float, not_deleted: str | None = None
    ) -> None:
        """Record a checkpoint.

        Args:
            seconds: until it was whole.
            stall: how long training stood still for it.
            not_deleted: why an older one, which was to go, is still there.
        """
        if self._directory is not None:
            more = {} if not_deleted is None else {"not_deleted": not_deleted}
            self._metrics.event("save", step, seconds=seconds, bytes=size, path=str(path), stall_seconds=stall, **more)
            self._progress.saved(step, path, seconds=seconds, bytes=size)
            if not_deleted is not None:
                self._progress.message(f"step {step}  warning: {not_deleted}")


def _depth(plan: DepthPlan) -> str:
    """24 layers, or 4-4x4-4 (12 layers, 24 deep)."""
    if plan.is_looped:
        return f"{plan.notation} ({plan.layers} layers, {plan.depth} deep)"
    return f"{plan.layers} layer{'s' if plan.layers > 1 else ''}"


def describe_depths(at: RunState, stages: Sequence[GrowthStage]) -> str:
    """The depths that the run had, as its checkpoint tells, and those that are to come."""
    known = [each for each in at.depths if each.step <= at.step]
    ends = [each.step for each in known[1:]]
    parts = [f"{_depth_then(each)} until step {end}" for each, end in zip(known, ends, strict=False)]
    if known and known[0].step:
        parts.insert(0, f"what it had until step {known[0].step} is not known")
    to_come = [stage for stage in stages if stage.stop > at.step] or list(stages[-1:])
    return ", ".join([*parts, *(f"{_depth(stage.plan)} until step {stage.stop}" for stage in to_come)])


def _depth_then(entry: DepthState) -> str:
    if entry.depth == str(entry.layers):
        return f"{entry.layers} layer{'s' if entry.layers > 1 else ''}"
    return f"{printable(entry.depth)} ({entry.layers} layers)"


def _kind(before: DepthPlan, after: DepthPlan) -> Literal["grow", "loop"]:
    """The event's name: layers were added, or only their order changed."""
    return "grow" if after.layers > before.layers else "loop"


def _change(before: DepthPlan, after: DepthPlan) -> str:
    if before.is_looped or after.is_looped:
        word = "grown" if after.layers > before.layers else "changed"
        return f"{word} from {_depth(before)} to {_depth(after)}"
    return f"grown from {before.layers} to {after.layers} layers"
