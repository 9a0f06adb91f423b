"""Which rank holds which piece of which tensor, as DeepSpeed's ZeRO-1 lays it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megaloop.depth import DepthPlan
from megaloop.layout.partition import StageMap, owned_layers
from megaloop.layout.pieces import STATE_NAMES, Box, Piece
from megaloop.layout.topology import Coordinate, Topology
from megaloop.model.parameters import LOOP_ADAPTER, LOOP_GATE, LOOP_NORM, ParameterSpec, loop_ends

__all__ = ["SHARE_UNIT", "Holder", "Placement", "local_box", "stage_parameters", "zero_share"]


@dataclass(frozen=True)
class Holder:
    """A piece of a tensor, and the ranks that hold it alike."""

    piece: Piece
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Which rank holds which piece of which tensor.

    Attributes:
        plan, topology: whose placement it is.
        slices: which rank runs what in which round.
        holders: by (kind, name): who holds what of it. Weights lie whole (a rank's tensor-parallel box) on all
            data-parallel ranks; of masters and moments each data-parallel rank holds a fragment of the box (ZeRO-1).
    """

    plan: DepthPlan
    topology: Topology
    slices: StageMap
    holders: Mapping[tuple[str, str], tuple[Holder, ...]]

    @classmethod
    def of(
        cls,
        specs: Mapping[str, ParameterSpec],
        plan: DepthPlan,
        topology: Topology,
        slices: StageMap,
    ) -> Placement:
        """The placement that DeepSpeed's ZeRO-1 makes of a plan on a topology.

        Args:
            specs: every parameter of the plan, as :func:`megaloop.model.parameter_specs` lists them.
        """
        holders: dict[tuple[str, str], list[Holder]] = defaultdict(list)
        for pp in range(topology.pp):
            names = stage_parameters(specs, plan, slices, pp)
            fragments = _fragments(names, specs, topology)
            for name in names:
                spec = specs[name]
                for boxes in range(1 if spec.shard_dim is None else topology.tp):
                    alike = range(topology.tp) if spec.shard_dim is None else (boxes,)
                    box = local_box(spec, boxes, topology.tp)
                    whole = Piece(name, spec.shape, box)
                    everyone = tuple(topology.rank(Coordinate(pp, dp, tp)) for dp in range(topology.dp) for tp in alike)
                    holders["model", name].append(Holder(whole, everyone))
                    for dp, flat in fragments[name]:
                        holder = Holder(
                            Piece(name, spec.shape, box, flat),
                            tuple(topology.rank(Coordinate(pp, dp, tp)) for tp in alike),
                        )
                        for state_name in STATE_NAMES[1:]:
                            holders[state_name, name].append(holder)
        return cls(plan, topology, slices, {slot: tuple(ranks) for slot, ranks in holders.items()})

    def held_by(self, rank: int) -> Iterator[tuple[str, Piece]]:
        """(kind, piece) of everything that a rank holds."""
        for (state_name, _), holders in self.holders.items():
            for holder in holders:
                if rank in holder.ranks:
                    yield state_name, holder.piece


def stage_parameters(specs: Mapping[str, ParameterSpec], plan: DepthPlan, slices: StageMap, pp: int) -> list[str]:
    """Names of a pipeline stage's parameters, in the order in which it holds them."""
    first, last = pp == 0, pp == len(slices[0]) - 1
    tied = "head.weight" not in specs
    inside = {str(layer_id) for layer_id in owned_layers(plan, slices, pp)}
    names = ["embedding.weight"] if first or (last and tied) else []
    names += [name for name in specs if name.startswith("layers.") and name.split(".", 2)[1] in inside]
    begins, ends = loop_ends(plan)
    names += [
        name
        for name, layer_id in ((LOOP_ADAPTER, begins), *((end, ends) for end in (LOOP_NORM, *LOOP_GATE)))
        if name in specs and str(layer_id) in inside
    ]
    return names + [name for name in ("norm.weight", "head.weight") if last and name in specs]


def local_box(spec: ParameterSpec, tp_rank: int, tp_size: int) -> Box:
    """The box of a parameter that a tensor-parallel rank holds."""
    if spec.shard_dim is None or tp_size == 1:
        return Box.whole(spec.shape)
    size = spec.shape[spec.shard_dim] // tp_size
    offset, shape = [0] * len(spec.shape), list(spec.shape)
    offset[spec.shard_dim], shape[spec.shard_dim] = tp_rank * size, size
    return Box(tuple(offset), tuple(shape))


SHARE_UNIT = 16
"""ZeRO's shares are multiples of this many elements; the engine tells DeepSpeed."""


def zero_share(elements: int, dp: int) -> int:
    """Elements of an optimizer group that each data-parallel rank updates; the group is padded to equal shares."""
    return -(-elements // (SHARE_UNIT * dp)) * SHARE_UNIT


def _fragments(
    names: Sequence[str], specs: Mapping[str, ParameterSpec], topology: Topology
) -> dict[str, list[tuple[int, tuple[int, int]]]]:
    """For each parameter of a stage, (dp rank, flat range of the box) of its masters and moments.

    DeepSpeed lays the parameters of an optimizer group (those with weight decay, then those without) end to end,
    and gives each data-parallel rank an equal range of that.
    """
    found: dict[str, list[tuple[int, tuple[int, int]]]] = {}
    for decay in (True, False):
        group = [name for name in names if specs[name].decay == decay]
        sizes = [local_box(specs[name], 0, topology.tp).numel for name in group]
        share = zero_share(sum(sizes), topology.dp)
        at = 0
        for name, size in zip(group, sizes, strict=True):
            found[name] = [
                (dp, (max(at, dp * share) - at, min(at + size, (dp + 1) * share) - at))
                for dp in range(at // share, (at + size - 1) // share + 1)
            ]
            at += size
    return found
