"""A run on rank 0's console: what happens to it, in words, and its steps as a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import singledispatch

from megaloop.checkpoint import DepthState, RunState
from megaloop.config import Config
from megaloop.depth import DepthPlan, GrowthStage
from megaloop.runs import events
from megaloop.runs.metrics import StepRecord
from megaloop.runs.sinks import Sink
from megaloop.terminal import SafeConsole
from megaloop.text import format_bytes, printable
from megaloop.train.progress import ProgressReporter

__all__ = ["ConsoleSink", "describe_depths", "lines"]


class ConsoleSink(Sink):
    """Shows a run on the console until it is closed.

    Args:
        step: steps already done.
    """

    def __init__(self, config: Config, step: int):
        self._progress = ProgressReporter(config.train.steps, step, config.logging.every, SafeConsole())
        self._progress.__enter__()

    def step(self, record: StepRecord) -> None:
        self._progress.step(record)

    def event(self, event: events.Event) -> None:
        for line in lines(event):
            self._progress.message(line)

    def close(self) -> None:
        self._progress.__exit__(None, None, None)


@singledispatch
def lines(event: events.Event) -> Iterator[str]:
    """What a person is told of an event; of those without words of their own, nothing."""
    yield from ()


# --- beginning and end ---


@lines.register
def _(event: events.RunStarted) -> Iterator[str]:
    yield f"run {event.directory}  on {event.machine}"
    yield (
        f"model {event.parameters / 1e6:.1f}M parameters, {_depth(event.plan)}, "
        f"vocabulary {event.vocab_size}, {event.precision}"
    )
    yield _layout(event.layout)
    yield f"kernels: {event.kernels}"
    yield event.data
    depths = describe_depths(event.state, event.stages)
    if event.operator is not None:
        yield f"growth {event.operator}: {depths}"
    elif len(event.stages) > 1:
        yield f"depth: {depths}"
    if event.checkpoint is not None:
        yield f"resuming {event.checkpoint} at step {event.step}"


@lines.register
def _(event: events.CheckpointPassedOver) -> Iterator[str]:
    yield f"checkpoint of step {event.step_before} is damaged ({event.reason}); going back to step {event.step}"


@lines.register
def _(event: events.ConfigChanged) -> Iterator[str]:
    yield f"step {event.step}  --allow {event.what}: {event.text}"


@lines.register
def _(event: events.DataNotCompared) -> Iterator[str]:
    yield "the checkpoint is of an earlier version, which kept no hashes of the data: whether it is the same is not checked"


@lines.register
def _(event: events.ScheduleChanged) -> Iterator[str]:
    rates = f"{'' if event.lr_before is None else f'from {event.lr_before:.2e} '}to {event.lr:.2e}"
    yield (
        f"step {event.step}  warning: this run was finished (train.steps was {event.steps_before}, now {event.steps}): its "
        f"learning rate jumps {rates}; to train longer, resume from before its cooldown"
        if event.had_finished
        else f"step {event.step}  warning: the schedule is another than that of the steps so far: the learning rate jumps {rates}"
    )


@lines.register
def _(event: events.SettingsChanged) -> Iterator[str]:
    changes = ", ".join(f"{one.key} {_setting(one.now)} (was {_setting(one.before)})" for one in event.changes)
    yield f"step {event.step}  other settings than so far: {changes}"


def _setting(value: object) -> str:
    return printable(json.dumps(value), 60)


@lines.register
def _(event: events.Signalled) -> Iterator[str]:
    yield f"step {event.step}  {event.name}: saving, then leaving"


@lines.register
def _(event: events.StopReached) -> Iterator[str]:
    yield f"step {event.step}  stopping here as --stop-at asks"


@lines.register
def _(event: events.EndedEarly) -> Iterator[str]:
    done = f"stopped after step {event.step}, which is saved" if event.step else "stopped before the first step"
    until = "" if event.stop_at is None else f" --stop-at {event.stop_at}"
    how = f"go on with: {event.go_on}{until}" if event.go_on else "add --resume to go on"
    yield f"{done}; {how}"


@lines.register
def _(event: events.GrowthSavings) -> Iterator[str]:
    share = event.flops / event.full_flops
    steps = round((event.full_flops - event.flops) / event.full_depth_step)
    yield (
        f"{event.flops:.3g} FLOPs, {share:.1%} of what {event.step} steps at full depth cost: "
        f"growing saved {1 - share:.1%}, as much as {steps} step{'s' if steps != 1 else ''} at full depth"
    )


# --- steps ---


@lines.register
def _(event: events.Validated) -> Iterator[str]:
    yield f"step {event.step}  validation loss {event.loss:.4f}  {event.bits_per_byte:.4f} bits/byte"


@lines.register
def _(event: events.StepSkipped) -> Iterator[str]:
    yield f"step {event.step}  warning: the gradient is not finite, the step was skipped"


@lines.register
def _(event: events.Spiked) -> Iterator[str]:
    yield f"step {event.step}  warning: loss {event.loss:.4f}, median before {event.median:.4f}"


@lines.register
def _(event: events.RolledBack) -> Iterator[str]:
    start, stop = event.samples
    yield (
        f"step {event.step_before}  {event.reason}: going back to step {event.step}; "
        f"samples {start} to {stop - 1} are excluded"
    )


# --- depth ---


@lines.register
def _(event: events.DepthChanged) -> Iterator[str]:
    change, flight = _change(event.before, event.plan), event.in_flight
    if flight is None:
        yield f"step {event.step}  {change} while loading; validation loss {event.loss_after:.4f}"
        return
    yield (
        f"step {event.step}  {change} in {flight.seconds:.2f} s, "
        f"{format_bytes(sum(flight.moved))} moved, {format_bytes(sum(flight.in_place))} in place; "
        f"validation loss {flight.loss_before:.4f} -> {event.loss_after:.4f}"
    )
    yield _layout(flight.layout)


# --- saving ---


@lines.register
def _(event: events.Saved) -> Iterator[str]:
    yield f"step {event.step}  saved {event.path}  {format_bytes(event.bytes)} in {event.seconds:.1f} s"
    if event.not_deleted is not None:
        yield f"step {event.step}  warning: {event.not_deleted}"


@lines.register
def _(event: events.SaveFailed) -> Iterator[str]:
    yield f"step {event.step}  warning: {event.reason.removesuffix(', then go on with --resume')}"


@lines.register
def _(event: events.DiskFull) -> Iterator[str]:
    yield f"step {event.step}  warning: no room on the disk; metrics and events wait in memory"


# --- parts of lines ---


def describe_depths(at: RunState, stages: Sequence[GrowthStage]) -> str:
    """The depths that the run had, as its checkpoint tells, and those that are to come."""
    known = [entry for entry in at.depths if entry.step <= at.step]
    ends = [entry.step for entry in known[1:]]
    parts = [f"{_depth_then(entry)} until step {end}" for entry, end in zip(known, ends, strict=False)]
    if known and known[0].step:
        parts.insert(0, f"what it had until step {known[0].step} is not known")
    to_come = [stage for stage in stages if stage.stop > at.step] or list(stages[-1:])
    return ", ".join([*parts, *(f"{_depth(stage.plan)} until step {stage.stop}" for stage in to_come)])


def _depth_then(entry: DepthState) -> str:
    if entry.depth == str(entry.layers):
        return f"{entry.layers} layer{'s' if entry.layers > 1 else ''}"
    return f"{printable(entry.depth)} ({entry.layers} layers)"


def _depth(plan: DepthPlan) -> str:
    """24 layers, or 4-4x4-4 (12 layers, 24 deep)."""
    if plan.is_looped:
        return f"{plan.notation} ({plan.layers} layers, {plan.depth} deep)"
    return f"{plan.layers} layer{'s' if plan.layers > 1 else ''}"


def _change(before: DepthPlan, after: DepthPlan) -> str:
    if before.is_looped or after.is_looped:
        if after.notation == before.notation and after.style.gate != before.style.gate:
            return f"{_depth(after)}: its loop has a gate now"
        word = "grown" if after.layers > before.layers else "changed"
        return f"{word} from {_depth(before)} to {_depth(after)}"
    return f"grown from {before.layers} to {after.layers} layers"


def _layout(layout: events.Layout) -> str:
    ranks = f"{layout.topology.world_size} rank{'s' if layout.topology.world_size > 1 else ''}"
    by_rank = zip(*layout.slices, strict=True)  # more rounds than one: 2+2+1
    stages = ", ".join("+".join(f"{stop - start}" for start, stop in of_rank) for of_rank in by_rank)
    return (
        f"{ranks}: {layout.topology}, layers per stage {stages}, "
        f"{layout.micro_batches} micro-batches of {layout.micro_batch}"
    )
