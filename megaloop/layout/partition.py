"""Which pipeline stage owns which layers: contiguous runs of the plan, the slowest stage as fast as can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from megaloop.config import Config, ModelConfig
from megaloop.depth import DepthPlan, Loop
from megaloop.depth.flops import head_flops, layer_flops
from megaloop.errors import MegaloopError
from megaloop.layout.rounds import Rounds
from megaloop.layout.topology import Topology

__all__ = [
    "LayerCosts",
    "StageMap",
    "estimated_costs",
    "owned_layers",
    "partition",
    "pass_costs",
    "slice_rounds",
    "slices_for",
    "split_rounds",
]

StageMap = tuple[tuple[tuple[int, int], ...], ...]
"""For each round, for each pipeline rank: the [start, stop) positions of the plan that it runs (it may be empty)."""


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


def slice_rounds(plan: DepthPlan, ranks: int, rounds: int, micro_batches: int, costs: LayerCosts) -> StageMap:
    """Which rank runs which positions of a plan in which round, every layer always on the rank that owns it.

    A plan that runs each layer once is cut into ``rounds`` x ``ranks`` slices of even cost. Of a loop e-Lxk-d each part
    is spread over the ranks, and every iteration of the loop is a round; ``rounds`` does not matter then. What comes before
    the loop shares its first round, and what comes after it shares its last, where the ranks that own them stand in that order.
    Of several ways to spread, the one is taken that makes a step shortest, by :class:`Rounds`' own timeline. Every rank
    owns a layer. On one rank everything is one round.

    Raises:
        MegaloopError: fewer layers than slices, or a repetition that is more than one loop.
    """
    if ranks == 1:
        return (((0, plan.depth),),)
    if plan.is_looped:
        return _spread_loop(plan, ranks, micro_batches, costs)
    cuts = partition(plan, ranks * rounds, costs)
    return tuple(cuts[first : first + ranks] for first in range(0, ranks * rounds, ranks))


def split_rounds(config: Config, plan: DepthPlan, topology: Topology, vocab_size: int) -> StageMap:
    """Which pipeline rank runs which positions of the plan in which round, by measured or estimated costs."""
    costs = (
        LayerCosts(*config.parallel.layer_costs)
        if config.parallel.layer_costs
        else estimated_costs(config.model, vocab_size, config.data.sequence_length)
    )
    micro_batches = config.train.micro_batches(topology.dp)
    return slice_rounds(plan, topology.pp, config.parallel.rounds, micro_batches, costs)


def slices_for(plan: DepthPlan, slices: StageMap, iterations: int) -> StageMap:
    """The slices of the same layers on the same ranks, for a loop that runs ``iterations`` times."""
    loop, ranks = plan.loop, len(slices[0])
    if loop is None or iterations == loop.iterations:
        return slices
    if ranks == 1:
        return (((0, plan.depth + loop.block * (iterations - loop.iterations)),),)
    prelude, recurrent, coda = _owned_counts(plan, loop, slices)
    return _fold(prelude, recurrent, coda, iterations)


def _owned_counts(plan: DepthPlan, loop: Loop, slices: StageMap) -> tuple[tuple[int, ...], ...]:
    """How many layers of each part (prelude, recurrent block, coda) each rank owns."""
    bounds = ((0, loop.start), (loop.start, loop.start + loop.block), (loop.stop, plan.depth))
    return tuple(
        tuple(
            sum(max(min(stop, high) - max(start, low), 0) for start, stop in (slice_[rank] for slice_ in slices))
            for rank in range(len(slices[0]))
        )
        for low, high in bounds
    )


def _fold(prelude: Sequence[int], loop: Sequence[int], coda: Sequence[int], iterations: int) -> StageMap:
    """Slices from the number of layers that ranks own of each part: a new round begins where the next layer's rank is lower."""
    ranks = len(loop)
    rounds: list[list[tuple[int, int]]] = [[]]
    at, current = 0, 0
    for part in (prelude, *[loop] * iterations, coda):
        for rank, count in enumerate(part):
            if count == 0:
                continue
            if rank < current:
                rounds[-1] += [(at, at)] * (ranks - len(rounds[-1]))
                rounds.append([])
            rounds[-1] += [(at, at)] * (rank - len(rounds[-1]))
            if len(rounds[-1]) > rank:  # the rank goes on where it is
                rounds[-1][rank] = (rounds[-1][rank][0], at + count)
            else:
                rounds[-1].append((at, at + count))
            at, current = at + count, rank
    rounds[-1] += [(at, at)] * (ranks - len(rounds[-1]))
    return tuple(map(tuple, rounds))


_HOP = 0.1
"""What a pass costs besides its layers (messages, launching), as a part of a layer: rounds that gain less do not pay."""
_TRIED = 8
"""Spreads whose timelines are compared: those that an estimate finds shortest."""


@lru_cache(maxsize=256)
def _spread_loop(plan: DepthPlan, ranks: int, micro_batches: int, costs: LayerCosts) -> StageMap:
    """The way to spread a loop whose step is shortest; the first such one, so that every rank finds the same."""
    loop = plan.loop
    if loop is None:
        raise MegaloopError(
            f"depth: {plan} is more than one loop of neighbouring layers, which a pipeline cannot spread over ranks; "
            "use pp 1, or a depth such as 4-4x4-4"
        )
    if ranks > plan.layers:
        raise MegaloopError(f"{ranks} pipeline ranks for {plan.layers} layers; each needs at least one")
    few = min(max(micro_batches, ranks), 4 * ranks)  # more would only repeat the steady state
    spreads = dict.fromkeys(_spreads(loop, plan.depth, ranks, costs))
    slices = [_fold(*spread, loop.iterations) for spread in spreads]
    likely = sorted(slices, key=lambda slice_: _estimate(slice_, few, costs))[:_TRIED]
    return min(likely, key=lambda candidate: (_seconds(candidate, few, costs), len(candidate)))


_Spread = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _spreads(loop: Loop, depth: int, ranks: int, costs: LayerCosts) -> Iterator[_Spread]:
    """Ways to give each rank layers of the prelude, of the recurrent block and of the coda.

    The loop lies evenly on some neighbouring ranks. The other layers go where there is least to do, those before the loop
    to the first ranks and those after it to the last, or both mixed; or they lie evenly over all ranks.
    """
    prelude, coda = loop.start, depth - loop.stop
    for first in range(ranks):
        for last in range(first, min(ranks, first + loop.block)):
            width = last - first + 1
            recurrent = tuple(
                loop.block // width + (rank - first < loop.block % width) if first <= rank <= last else 0
                for rank in range(ranks)
            )
            idle = ranks - width
            if idle > prelude + coda:
                continue  # a rank would own nothing
            work = list(_work(((0,) * ranks, recurrent, (0,) * ranks), loop.iterations, costs))
            count = [0] * ranks
            for _ in range(
                prelude + coda
            ):  # each layer to the rank with least to do; first of all, one to each without
                rank = min(range(ranks), key=lambda rank: (recurrent[rank] + count[rank] > 0, work[rank], rank))
                count[rank] += 1
                work[rank] += costs.layer
            left: list[int] = []
            right: list[int] = []
            for layers in count:
                left.append(min(layers, prelude - sum(left)))
                right.append(layers - left[-1])
            yield tuple(left), recurrent, tuple(right)
            mixed = _share(count, prelude)
            yield mixed, recurrent, tuple(layers - own for layers, own in zip(count, mixed, strict=True))
            yield _share([1] * ranks, prelude), recurrent, _share([1] * ranks, coda)


def _share(weights: Sequence[int], layers: int) -> tuple[int, ...]:
    """Layers over ranks in proportion to whole numbers; of the same weights' sum or less, no rank gets more than its own."""
    total, stops = sum(weights) or 1, [0]
    for reached in accumulate(weights):
        stops.append(layers * reached // total)
    return tuple(stop - start for start, stop in pairwise(stops))


def _work(spread: _Spread, iterations: int, costs: LayerCosts) -> Iterator[float]:
    """What each rank does in a forward pass."""
    last = len(spread[0]) - 1
    for rank, (prelude, recurrent, coda) in enumerate(zip(*spread, strict=True)):
        ends = (costs.embedding if rank == 0 else 0.0) + (costs.head if rank == last else 0.0)
        yield (prelude + recurrent * iterations + coda) * costs.layer + ends


def _estimate(slices: StageMap, micro_batches: int, costs: LayerCosts) -> float:
    """About how long a step takes: the busiest rank's work, and the pipeline filled with its longest slice."""
    seconds = pass_costs(slices, costs)
    return micro_batches * max(map(sum, zip(*seconds, strict=True))) + (len(slices[0]) - 1) * max(map(max, seconds))


def _seconds(slices: StageMap, micro_batches: int, costs: LayerCosts) -> float:
    """How long a step takes; infinite where a rank owns no layer."""
    if any(all(start == stop for start, stop in own) for own in zip(*slices, strict=True)):
        return float("inf")
    seconds = pass_costs(slices, costs)
    spans = Rounds(len(slices[0]), micro_batches, len(slices)).timeline(
        lambda rank, work: (seconds[work.round][rank] + _HOP * costs.layer) * (2.0 if work.backward else 1.0)
    )
    return max(span[-1].stop for span in spans)


def pass_costs(slices: StageMap, costs: LayerCosts) -> tuple[tuple[float, ...], ...]:
    """Time of a micro-batch's forward pass, by round and rank, the embedding and the head included."""
    seconds = [[(stop - start) * costs.layer for start, stop in slice_] for slice_ in slices]
    seconds[0][0] += costs.embedding
    seconds[-1][-1] += costs.head
    return tuple(map(tuple, seconds))


def owned_layers(plan: DepthPlan, slices: StageMap, rank: int) -> tuple[int, ...]:
    """Ids of the layers that a pipeline rank holds, in the order in which it first runs them."""
    return tuple(dict.fromkeys(layer_id for slice_ in slices for layer_id in plan.order[slice(*slice_[rank])]))
