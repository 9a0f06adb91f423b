"""When a run grows: the stages of a run, each with its plan and its steps, and what the whole saves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megaloop.depth.counts import LoopCounts
from megaloop.depth.flops import DecoderShape, flops_per_token
from megaloop.depth.growth import Growth, InsertAt, Operator, grow
from megaloop.depth.loops import loop_layers, reorder, untie
from megaloop.depth.plan import DepthPlan, GateTraining, LoopStyle
from megaloop.depth.spec import DepthSpec
from megaloop.errors import MegaloopError
from megaloop.text import quoted

__all__ = [
    "DepthEvent",
    "GrowthStage",
    "RunFlops",
    "explicit_steps",
    "full_depth",
    "growth_stages",
    "loop_stages",
    "proportional_steps",
    "run_flops",
    "stage_at",
    "stages_between",
    "with_events",
]

_PROPORTIONAL = re.compile(r"prop-([0-9]{1,2}(?:\.[0-9]{1,6})?)")


@dataclass(frozen=True)
class GrowthStage:
    """A part of a run during which the plan stays the same.

    Attributes:
        first_step: the first optimizer step, counted from 0; the growth into this stage happens before it.
        steps: how many.
        plan: the layers.
        growth: how the plan came from that of the stage before (none in the first).
        event: it begins with a depth event, not with growth.
    """

    first_step: int
    steps: int
    plan: DepthPlan
    growth: Growth
    event: bool = False

    @property
    def stop(self) -> int:
        """The first step after the stage."""
        return self.first_step + self.steps


def growth_stages(
    layers: Sequence[int],
    steps: Sequence[int],
    operator: Operator,
    block: int = 4,
    *,
    insert_at: InsertAt = "after",
    first: DepthPlan | None = None,
) -> tuple[GrowthStage, ...]:
    """The stages of a run.

    Args:
        layers: number of layers of each stage, rising.
        steps: optimizer steps of each stage, at least 1.
        first: the plan of the first stage; default: a plain one.

    Raises:
        MegaloopError: as :func:`megaloop.depth.grow`; or a stage that does not deepen the one before.
    """
    plan = first or DepthPlan.plain(layers[0])
    stages = [GrowthStage(0, steps[0], plan, Growth.none(plan))]
    for count, length in zip(layers[1:], steps[1:], strict=True):
        before = stages[-1]
        if count == before.plan.layers:
            raise MegaloopError(f"growth: two stages of {count} layers follow each other; make them one")
        growth = grow(before.plan, operator, count, block, insert_at=insert_at)
        stages.append(GrowthStage(before.stop, length, growth.plan, growth))
    return tuple(stages)


def loop_stages(stages: Sequence[GrowthStage], depth: DepthSpec, style: LoopStyle) -> tuple[GrowthStage, ...]:
    """The stages with the loop that ``depth`` spells for the last; earlier ones loop what they have of its layers.

    So a looped model grows: growth acts on the layers, and what grows inside the loop's place is looped.
    """
    last = reorder(stages[-1].plan, depth, style)
    if not last.is_looped:
        return tuple(stages)
    if last.loop is None:
        if len(stages) > 1:
            raise MegaloopError(
                f"growth: depth {depth} is more than one loop of neighbouring layers; growth takes one, such as 4-4x4-4"
            )
        return (GrowthStage(stages[0].first_step, stages[0].steps, last, Growth.none(last)),)
    ids = last.order[last.loop.start : last.loop.start + last.loop.block]
    looped: list[GrowthStage] = []
    for stage in stages:
        plan = loop_layers(stage.plan, ids, last.loop.iterations, style)
        growth = Growth(plan, stage.growth.lineage)
        growth = growth.loop_of(looped[-1].plan) if looped else growth
        looped.append(GrowthStage(stage.first_step, stage.steps, plan, growth))
    return tuple(looped)


@dataclass(frozen=True)
class DepthEvent:
    """A change of depth in a run that growth does not make.

    Attributes:
        step: the first optimizer step at the new depth.
        depth: the same layers in another order; None: their repetitions become layers (``untie``).
    """

    step: int
    depth: DepthSpec | None


def with_events(
    stages: Sequence[GrowthStage], events: Sequence[DepthEvent], style: LoopStyle
) -> tuple[GrowthStage, ...]:
    """The stages of a run with those that its depth events add.

    Raises:
        MegaloopError: an event before the last growth, after the run's end or out of order; one that changes nothing, or
            that fits the layers not.
    """
    made = list(stages)
    for event in events:
        last = made[-1]
        if not last.first_step < event.step < last.stop:
            raise MegaloopError(
                f"depth_events: one at step {event.step}, but events come one after another, all after the last growth: "
                f"after step {last.first_step} and before {last.stop}"
            )
        if event.depth is None:
            growth = untie(last.plan)
        else:
            growth = Growth.reordered(last.plan, reorder(last.plan, event.depth, style))
            if growth.plan == last.plan:
                raise MegaloopError(f"depth_events: at step {event.step} the depth is {event.depth} already")
        made[-1] = GrowthStage(last.first_step, event.step - last.first_step, last.plan, last.growth, last.event)
        made.append(GrowthStage(event.step, last.stop - event.step, growth.plan, growth, event=True))
    return tuple(made)


def stages_between(stages: Sequence[GrowthStage], first_step: int, stop: int | None) -> list[GrowthStage]:
    """The stages that have steps in [first_step, stop); None: to the end."""
    return [stage for stage in stages if stage.stop > first_step and (stop is None or stage.first_step < stop)]


def stage_at(stages: Sequence[GrowthStage], step: int) -> GrowthStage:
    """The stage to which optimizer step ``step``, counted from 0, belongs (past the end: the last)."""
    return next((stage for stage in stages if step < stage.stop), stages[-1])


def proportional_steps(schedule: str, stages: int, total_steps: int, end: float) -> list[int]:
    """Steps of each stage under PROP-a (arXiv 2409.19044): stage i of k lasts in proportion to i^a.

    The stages share the first ``end`` of the run; what remains (the cooldown) is added to the last.

    Args:
        schedule: ``prop-1``, ``prop-2``, ``prop-0.5``; ``prop-0`` makes all equal.

    Raises:
        MegaloopError: another word, or too few steps for that number of stages.
    """
    match = _PROPORTIONAL.fullmatch(schedule)
    if match is None:
        raise MegaloopError(
            f"growth.schedule: cannot read {quoted(schedule)}; expected prop-1, prop-2 and so on, "
            "or a list such as [{steps: 1000, layers: 4}, {steps: 3000, layers: 8}]"
        )
    try:
        weights = [float(index) ** float(match[1]) for index in range(1, stages + 1)]
    except OverflowError:
        raise MegaloopError(
            f"growth.schedule: {schedule} is too steep for {stages} stages; use prop-2, for example"
        ) from None
    share = total_steps * end / sum(weights)
    stops = [round(share * weight) for weight in accumulate(weights)]
    stops[-1] = total_steps
    steps = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
    if min(steps) < 1:
        raise MegaloopError(
            f"growth.schedule: {total_steps} steps are too few for {stages} stages under {schedule}: "
            f"they would last {', '.join(map(str, steps))}; raise train.steps, growth.start or growth.block"
        )
    return steps


def explicit_steps(steps: Sequence[int], total_steps: int) -> list[int]:
    """The steps of an explicit schedule, which must add up to those of the run.

    Raises:
        MegaloopError: they do not.
    """
    if sum(steps) != total_steps:
        raise MegaloopError(
            f"growth.schedule: the stages' steps add up to {sum(steps)}, but train.steps is {total_steps}; "
            "make them equal"
        )
    return list(steps)


@dataclass(frozen=True)
class RunFlops:
    """What a run costs: model FLOPs, forward and backward.

    Attributes:
        stages: of each stage.
        full_depth: of as many steps at the depth that the run grows to (before depth events).
        matched_steps: steps at that depth that cost as much as this run: the baseline of equal FLOPs.
    """

    stages: tuple[int, ...]
    full_depth: int
    matched_steps: int

    @property
    def total(self) -> int:
        return sum(self.stages)

    @property
    def fraction(self) -> float:
        """The run's FLOPs as a fraction of the full-depth run's."""
        return self.total / self.full_depth


def run_flops(
    stages: Sequence[GrowthStage],
    shape: DecoderShape,
    sequence_length: int,
    tokens_per_step: int,
    *,
    vocab_size: int | None = None,
    counts: LoopCounts | None = None,
    backprop: int | None = None,
    gate: GateTraining | None = None,
) -> RunFlops:
    """FLOPs of a run, by stage and against full depth; the convention is that of :mod:`megaloop.depth.flops`.

    Args:
        counts: how often the loop runs in each step; default: as the plans say.
        backprop, gate: as :func:`megaloop.depth.flops.flops_per_token`.
    """

    def cost(plan: DepthPlan, iterations: int | None = None) -> int:
        flops = flops_per_token(
            plan, shape, sequence_length, vocab_size=vocab_size, iterations=iterations, backprop=backprop, gate=gate
        )  # fmt: skip
        return flops.total * tokens_per_step

    costs = []
    for stage in stages:
        if stage.plan.loop is None or counts is None:
            costs.append(cost(stage.plan) * stage.steps)
            continue
        drawn = counts.of(stage.plan.loop.iterations).drawn(stage.first_step, stage.stop)
        costs.append(sum(cost(stage.plan, iterations) * steps for iterations, steps in drawn.items()))
    full = cost(full_depth(stages))
    return RunFlops(tuple(costs), full * sum(stage.steps for stage in stages), round(sum(costs) / full))


def full_depth(stages: Sequence[GrowthStage]) -> DepthPlan:
    """The plan that a run grows to: that of its last stage before any depth event."""
    return [stage.plan for stage in stages if not stage.event][-1]
