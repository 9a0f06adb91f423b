"""Looping as algebra: the same layers in another order, and repetitions turned into layers of their own.

``loop`` and ``unloop`` are inverse to each other and touch no parameter. ``untie`` makes of every repetition a copy of
its layer: a grown model, which computes what the looped one computed. Looping and growing are one algebra
(arXiv 2602.16490).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from megaloop.depth.growth import Growth
from megaloop.depth.plan import DepthPlan, LayerCall, LoopStyle
from megaloop.depth.spec import DepthSpec
from megaloop.errors import MegaloopError

__all__ = ["Execution", "loop", "loop_layers", "reorder", "unloop", "untie", "with_inference_loop"]


def loop(plan: DepthPlan, start: int, stop: int, iterations: int, style: LoopStyle = LoopStyle()) -> DepthPlan:
    """Run the layers at positions [start, stop) ``iterations`` times.

    Raises:
        MegaloopError: the plan is looped already, or has no such positions.
    """
    if plan.is_looped:
        raise MegaloopError(f"loop: plan {plan} is looped already; unloop it first")
    if not 0 <= start < stop <= plan.depth or iterations < 1:
        raise MegaloopError(
            f"loop: layers {start} to {stop} (exclusive), {iterations} times, of a plan of {plan.depth}; there are no such layers"
        )
    order = (*plan.order[:start], *plan.order[start:stop] * iterations, *plan.order[stop:])
    return DepthPlan(order, plan.lineage, style if iterations > 1 else LoopStyle())


def unloop(plan: DepthPlan) -> DepthPlan:
    """Every layer once, in the order of first use."""
    return DepthPlan(plan.ids, plan.lineage)


def loop_layers(plan: DepthPlan, ids: Iterable[int], iterations: int, style: LoopStyle = LoopStyle()) -> DepthPlan:
    """Run those layers of an unlooped plan that are among ``ids`` ``iterations`` times; as it is, if none are.

    They must be neighbours in the plan.
    """
    positions = [position for position, layer_id in enumerate(plan.order) if layer_id in set(ids)]
    return loop(plan, positions[0], positions[-1] + 1, iterations, style) if positions else plan


def reorder(plan: DepthPlan, depth: DepthSpec, style: LoopStyle = LoopStyle()) -> DepthPlan:
    """The same layers, with ids and lineage, in the order that ``depth`` spells: ``10-4x2-10`` of 24 layers.

    Raises:
        MegaloopError: ``depth`` has fewer or more layers than the plan.
    """
    if depth.layers != plan.layers:
        fewer = f"{plan.layers - depth.layers} would be dropped, and loops leave the layers as they are"
        raise MegaloopError(
            f"depth {depth} has {depth.layers} layers of its own, and there are {plan.layers}: "
            f"{fewer if depth.layers < plan.layers else 'loops add none, growth does'}; "
            f"of {plan.layers} layers for example {_example(plan.layers)}"
        )
    ids = dict(zip(depth.plan.ids, plan.ids, strict=True))
    order = tuple(ids[place] for place in depth.plan.order)
    return DepthPlan(order, plan.lineage, style if depth.plan.loop is not None else LoopStyle())


def untie(plan: DepthPlan) -> Growth:
    """Every repetition becomes a layer of its own, a copy of the one that it repeated; the first use stays.

    The result computes the same, with more parameters: a grown model, to which growth and loops apply again. With LN-scaling it
    computes something else: each layer has the factor of its place, which for repetitions is a new one. A gate goes with its loop.

    Raises:
        MegaloopError: the plan is not looped, or its loop is more than plain composition.
    """
    if not plan.is_looped:
        raise MegaloopError(f"untie: plan {plan} repeats no layer; there is nothing to untie")
    if not plan.style.is_plain:
        raise MegaloopError(
            "untie: a loop with injection, a norm or scaled residuals is more than its layers in a row; "
            "only loops of plain composition can be untied"
        )
    free = plan.next_id
    order: list[int] = []
    parents: dict[int, int] = {}
    for layer_id in plan.order:
        if layer_id in order:
            parents[free], layer_id = layer_id, free
            free += 1
        order.append(layer_id)
    return Growth(DepthPlan(tuple(order), {**plan.lineage, **parents}), dict(parents))


@dataclass(frozen=True)
class Execution:
    """A way to run a trained model.

    Attributes:
        depth: how many layers it has, and in which order they run.
        calls: the executions of its layers, in order: what a decoder is given to run.
    """

    depth: DepthSpec
    calls: tuple[LayerCall, ...]

    @classmethod
    def as_trained(cls, plan: DepthPlan) -> Self:
        """As its plan says."""
        return cls(DepthSpec.of(plan), plan.calls())


def with_inference_loop(plan: DepthPlan, depth: DepthSpec) -> Execution:
    """How to run a trained model at another depth.

    A loop of plain composition may be moved, taken away or put in. One with parameters or scales of its own stays where it
    is and changes only its number of times, 1 included.

    Raises:
        MegaloopError: ``depth`` has other layers, or moves a loop that has to stay.
    """
    if plan.style.is_plain or plan.loop is None:
        return Execution.as_trained(reorder(plan, depth))
    loop, asked = plan.loop, depth.loop
    if asked is None or (asked.start, asked.block, depth.layers) != (loop.start, loop.block, plan.layers):
        raise MegaloopError(
            f"depth {depth}: the loop of {plan.notation} was trained with an injection, a norm or scaled residuals and "
            f"stays where it is; choose {loop.start}-{loop.block}xTIMES-{plan.depth - loop.stop}"
        )
    return Execution(depth, plan.calls(asked.iterations))


def _example(layers: int) -> str:
    before = (layers - 1) // 2
    return f"{before}-1x2-{layers - before - 1}"
