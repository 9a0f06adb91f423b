"""Which pipeline stage owns which layers: contiguous runs of the plan, the slowest stage as fast as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.depth.flops import head_flops, layer_flops
from megaloop.errors import MegaloopError

__all__ = ["LayerCosts", "estimated_costs", "partition"]


@dataclass(frozen=True)
class LayerCosts:
    """Relative time of the parts of a decoder (seconds or FLOPs; only ratios matter)."""

    embedding: float
    layer: float
    head: float


def estimated_costs(model: ModelConfig, vocab_size: int, sequence_length: int) -> LayerCosts:
    """Costs by FLOPs per token: the head is one large product, the embedding a look-up."""
    return LayerCosts(
        embedding=0.0,
        layer=float(layer_flops(model, sequence_length)),
        head=float(head_flops(model, vocab_size)),
    )


def partition(plan: DepthPlan, stages: int, costs: LayerCosts) -> tuple[tuple[int, int], ...]:
    """Split the plan's positions into ``stages`` runs so that the largest cost is least.

    The embedding counts for the first stage and the head for the last. Every stage gets at least one layer.
    Of several best splits, the most even one is taken (least sum of squares), then the one that keeps early
    stages longest: a pure function of its arguments, the same on every rank.

    Returns:
        [start, stop) positions per stage.

    Raises:
        MegaloopError: more stages than layers.
    """
    if stages > plan.depth:
        raise MegaloopError(f"{stages} pipeline stages for {plan.depth} layers; each stage needs at least one")
    prefix = (0.0, *accumulate([costs.layer] * plan.depth))

    def cost(start: int, stop: int) -> float:
        ends = (costs.embedding if start == 0 else 0.0) + (costs.head if stop == plan.depth else 0.0)
        return prefix[stop] - prefix[start] + ends

    # best[stop] = (largest cost, sum of squares, cuts) over the layers before stop
    best: dict[int, tuple[float, float, Sequence[int]]] = {0: (0.0, 0.0, (0,))}
    for stage in range(1, stages + 1):
        last = stage == stages
        stops = [plan.depth] if last else range(stage, plan.depth - (stages - stage) + 1)
        best = {
            stop: min(
                (max(worst, cost(start, stop)), squares + cost(start, stop) ** 2, (*cuts, stop))
                for start, (worst, squares, cuts) in best.items()
                if start < stop
            )
            for stop in stops
        }
    cuts = best[plan.depth][2]
    return tuple(pairwise(cuts))
