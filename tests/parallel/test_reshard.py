"""What moves between two placements: exactly what a rank needs and does not hold, each value once, from who holds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, product
from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, Growth, Operator, grow
from megaloop.layout.partition import LayerCosts, partition
from megaloop.layout.pieces import STATE_NAMES, Box, Piece
from megaloop.layout.placement import Holder, Placement
from megaloop.layout.topology import Topology
from megaloop.layout.transfers import Moments, Reshard, takes_zeros, transfers
from megaloop.model import grown_from, parameter_specs

VOCAB = 8
WEIGHT_BYTES = 2


def topologies(world: int, *, pp: int = 8, tp: int = 2) -> list[Topology]:
    """All pp x tp x dp of a world size, with at most this many stages (layers) and tensor-parallel ranks (heads)."""
    sizes = [size for size in (1, 2, 4, 8) if size <= world]
    every = [Topology(*topology) for topology in product(sizes, repeat=3)]
    return [topology for topology in every if topology.world_size == world and topology.pp <= pp and topology.tp <= tp]


def placement(
    plan: DepthPlan, topology: Topology, *, tied: bool = True, head: float = 1.0, heads: int = 2
) -> Placement:
    model = ModelConfig(
        hidden_size=2 * heads, num_heads=heads, num_kv_heads=heads, ffn_size=3 * heads, tied_embeddings=tied
    )
    stages = partition(plan, topology.pp, LayerCosts(0.0, 1.0, head))
    return Placement.of(parameter_specs(model, plan, VOCAB), plan, topology, (stages,))


# --- an independent account, value by value ---

Values = dict[tuple[str, str], set[int]]  # (kind, tensor): numbers of its elements, row-major


def elements(piece: Piece) -> list[int]:
    """Numbers of the elements that a piece covers."""
    numbers = np.arange(int(np.prod(piece.shape))).reshape(piece.shape)
    inside = numbers[tuple(slice(o, o + n) for o, n in zip(piece.box.offset, piece.box.shape, strict=True))].reshape(-1)
    return list(inside[slice(*(piece.flat or (None, None)))])


def held(where: Placement) -> list[Values]:
    """For each rank, what it holds."""
    ranks: list[Values] = [defaultdict(set) for _ in range(where.topology.world_size)]
    for (state_name, name), holders in where.holders.items():
        for holder in holders:
            for rank in holder.ranks:
                ranks[rank][state_name, name].update(elements(holder.piece))
    return ranks


def needed(where: Placement, growth: Growth, moments: Moments) -> list[Values]:
    """For each rank, which values of the plan before its new state is made of."""
    ranks: list[Values] = []
    for values in held(where):
        sources: Values = defaultdict(set)
        for (state_name, name), numbers in values.items():
            source = grown_from(name, growth)
            fresh = source is None or (moments == "zero" and source != name and state_name in ("exp_avg", "exp_avg_sq"))
            if not fresh:
                sources[state_name, str(source)] |= numbers
        ranks.append(sources)
    return ranks


def size_of(state_name: str) -> int:
    return WEIGHT_BYTES if state_name == "model" else 4


def check(old: Placement, new: Placement, growth: Growth, moments: Moments = "copy") -> Reshard:
    """Compare the planned transfers with the account; returns them."""
    plan = transfers(old, new, growth, weight_bytes=WEIGHT_BYTES, moments=moments)
    before, wanted = held(old), needed(new, growth, moments)
    arrived: list[dict[tuple[str, str], list[int]]] = [defaultdict(list) for _ in before]
    shapes = {slot: holders[0].piece.shape for slot, holders in old.holders.items()}
    for transfer in plan.transfers:
        slot = (transfer.state_name, transfer.name)
        numbers = elements(Piece(transfer.name, shapes[slot], transfer.box))
        assert transfer.source != transfer.target
        assert transfer.bytes == size_of(transfer.state_name) * len(numbers)
        assert before[transfer.source][slot].issuperset(numbers), "the sender holds what it sends"
        arrived[transfer.target][slot].extend(numbers)
    for rank, wants in enumerate(wanted):
        lower_bound = in_place = 0
        assert set(arrived[rank]) <= set(wants)
        for slot, wanted_values in wants.items():
            missing = wanted_values - before[rank].get(slot, set())
            assert sorted(arrived[rank][slot]) == sorted(missing), "each missing value comes, and comes once"
            lower_bound += size_of(slot[0]) * len(missing)
            in_place += size_of(slot[0]) * len(wanted_values - missing)
        assert plan.received()[rank] == lower_bound
        assert plan.in_place[rank] == in_place
    assert sum(plan.sent()) == sum(plan.received())
    return plan


GROWTHS: list[tuple[Operator, int, int, int]] = [
    ("lidas", 4, 8, 2), ("midas", 4, 12, 4), ("stack", 4, 8, 4), ("last", 8, 10, 2), ("random", 4, 8, 2)
]  # fmt: skip


@pytest.mark.parametrize("growth", GROWTHS, ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_the_fewest_between_all_topologies(world: int, growth: tuple[Operator, int, int, int]) -> None:
    operator, first, layers, block = growth
    plan = DepthPlan.plain(first)
    grown = grow(plan, operator, layers, block)
    for before, after in product(topologies(world), repeat=2):
        check(placement(plan, before), placement(grown.plan, after), grown)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    operator=st.sampled_from(get_args(Operator)),
    world=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
    tied=st.booleans(),
    moments=st.sampled_from(get_args(Moments)),
    heads=st.tuples(st.floats(0, 3), st.floats(0, 3)),
)
def test_bytes_are_the_fewest(
    operator: Operator, world: int, data: st.DataObject, tied: bool, moments: Moments, heads: tuple[float, float]
) -> None:
    plan = DepthPlan.plain(8)
    grown = grow(plan, operator, 16 if operator == "stack" else 8 + data.draw(st.sampled_from([2, 4])), 2)
    before, after = (data.draw(st.sampled_from(topologies(world))) for _ in range(2))
    old = placement(plan, before, tied=tied, head=heads[0])
    check(old, placement(grown.plan, after, tied=tied, head=heads[1]), grown, moments)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("world", [4, 8])
def test_bytes_are_the_fewest_for_wide_tensor_parallelism(world: int, tied: bool) -> None:
    """Boxes down to a single head, together with ZeRO's fragments of them."""
    plan = DepthPlan.plain(2)
    grown = grow(plan, "lidas", 4, 2)
    wide = topologies(world, pp=2, tp=8)
    assert any(topology.tp == world for topology in wide)
    for before, after in product(wide, repeat=2):
        if max(before.tp, after.tp) > 2:
            old, new = (placement(item, on, tied=tied, heads=8) for item, on in ((plan, before), (grown.plan, after)))
            check(old, new, grown)


@pytest.mark.parametrize("world", [1, 4, 8])
def test_what_stays_where_it_is_does_not_move(world: int) -> None:
    plan = DepthPlan.plain(8)
    for topology in topologies(world):
        same = placement(plan, topology)
        reshard = check(same, placement(plan, topology), Growth.none(plan))
        assert reshard.transfers == ()
        assert sum(reshard.in_place) == sum(size_of(state_name) * piece.numel for state_name, piece in _all_held(same))


def _all_held(where: Placement) -> Iterator[tuple[str, Piece]]:
    for rank in range(where.topology.world_size):
        yield from where.held_by(rank)


def test_topologies_change_without_growth() -> None:
    plan = DepthPlan.plain(8)
    for before, after in product(topologies(8), repeat=2):
        check(placement(plan, before), placement(plan, after), Growth.none(plan))


def test_a_layer_and_its_copy_on_one_rank_come_once() -> None:
    """Stacking 4 layers on two pipeline ranks: the second, which has all copies, lacks the first rank's layers once."""
    plan = DepthPlan.plain(4)
    grown = grow(plan, "stack", 16, 4)
    old, new = (placement(item, Topology(pp=2), head=0.0) for item in (plan, grown.plan))
    reshard = check(old, new, grown)
    first_half = sum(
        size_of(state_name) * piece.numel for state_name, piece in old.held_by(0) if piece.name.startswith("layers.")
    )
    assert reshard.received()[1] == first_half, "three copies of each, one transfer"


def test_zeros_are_not_sent() -> None:
    plan = DepthPlan.plain(4)
    grown = grow(plan, "lidas", 8, 4)
    old, new = placement(plan, Topology(pp=2)), placement(grown.plan, Topology(pp=2))
    copied, zeroed = (check(old, new, grown, moments) for moments in get_args(Moments))
    names = {transfer.name for transfer in zeroed.transfers if transfer.state_name in ("exp_avg", "exp_avg_sq")}
    assert sum(zeroed.received()) < sum(copied.received())
    for name in names:  # only layers that moved as they are bring moments along
        assert not takes_zeros("exp_avg", name, name, "zero")
    assert takes_zeros("exp_avg", "layers.4.norm", "layers.0.norm", "zero")
    assert not takes_zeros("master", "layers.4.norm", "layers.0.norm", "zero")
    assert not takes_zeros("exp_avg", "layers.4.norm", "layers.0.norm", "copy")


def test_whoever_has_sent_least_sends_next() -> None:
    """Eight replicas hold all weights; on a pipeline of eight nobody sends more than twice the even share."""
    plan = DepthPlan.plain(8)
    growth = grow(plan, "lidas", 16, 4)
    reshard = check(placement(plan, Topology(dp=8)), placement(growth.plan, Topology(pp=8)), growth)
    assert len({transfer.target for transfer in reshard.transfers}) == 8
    sent, largest = reshard.sent(), max(transfer.bytes for transfer in reshard.transfers)
    assert max(sent) <= 2 * sum(sent) / 8 + largest


def test_replicas_share_the_sending_of_weights() -> None:
    """Each half of 8 layers lies on four replicas, and others need it: no replica sends more than its even share and
    one tensor. Weights alone: of masters and moments every fragment has a single holder, who has no choice."""
    plan = DepthPlan.plain(8)
    growth = grow(plan, "stack", 16)
    old, new = (placement(item, on) for item, on in ((plan, Topology(pp=2, dp=4)), (growth.plan, Topology(pp=8))))
    old, new = (
        replace(item, holders={slot: held for slot, held in item.holders.items() if slot[0] == "model"})
        for item in (old, new)
    )
    reshard = check(old, new, growth)
    largest = max(transfer.bytes for transfer in reshard.transfers)
    for replicas in (range(4), range(4, 8)):
        sent = [reshard.sent()[rank] for rank in replicas]
        assert sum(sent) > 4 * largest, "enough to share"
        assert max(sent) <= sum(sent) / 4 + largest


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 3), st.booleans())
@example([1, 5, 1, 5, 1, 5], 2, False)  # as many parts each would be 3 and 15
@example([1, 1, 1, 1, 1, 1], 2, True)
def test_equal_holders_share_the_sending_evenly(sizes: list[int], count: int, apart: bool) -> None:
    """Some ranks hold a tensor, another needs its parts: no sender is ahead of another by more than one part.

    ``apart``: they are holders of their own, as the two ends of a pipeline are of a tied embedding.
    """
    shape = (sum(sizes),)
    parts = [
        Piece("norm.weight", shape, Box((stop - size,), (size,)))
        for size, stop in zip(sizes, accumulate(sizes), strict=True)
    ]
    plan, topology, slot = DepthPlan.plain(1), Topology(dp=count + 1), ("master", "norm.weight")
    senders = [(rank,) for rank in range(count)] if apart else [tuple(range(count))]
    old, new = (
        Placement(plan, topology, (((0, 1),),), {slot: tuple(Holder(*item) for item in product(parts, ranks))})
        for ranks in (senders, [(count,)])
    )
    reshard = transfers(old, new, Growth.none(plan), weight_bytes=4)
    *sent, last = reshard.sent()
    assert max(sent) - min(sent) <= 4 * max(sizes)
    assert (sum(sent), last) == (4 * sum(sizes), 0)
    assert reshard.received() == (*[0] * count, 4 * sum(sizes))


def test_a_value_that_nobody_holds_is_a_mistake_of_ours() -> None:
    plan, topology = DepthPlan.plain(1), Topology(dp=2)
    half = Piece("norm.weight", (4,), Box((0,), (2,)))
    whole = Piece("norm.weight", (4,), Box((0,), (4,)))
    old = Placement(plan, topology, (((0, 1),),), {("master", "norm.weight"): (Holder(half, (0,)),)})
    new = Placement(plan, topology, (((0, 1),),), {("master", "norm.weight"): (Holder(whole, (1,)),)})
    with pytest.raises(RuntimeError, match="no rank holds"):
        transfers(old, new, Growth.none(plan), weight_bytes=4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_placement_holds_every_value_and_fragments_once(tied: bool) -> None:
    plan = grow(DepthPlan.plain(4), "lidas", 8, 4).plan
    for topology in topologies(8):
        where = placement(plan, topology, tied=tied)
        for (state_name, name), holders in where.holders.items():
            found = [number for holder in holders for number in elements(holder.piece)]
            once = sorted(set(found))
            assert once == list(range(int(np.prod(holders[0].piece.shape))))
            is_last = tied and name == "embedding.weight" and topology.pp > 1  # at both ends of the pipeline
            assert len(found) == len(once) * (2 if is_last else 1), f"{state_name} of {name} on {topology}"
            for holder in holders:
                alike = topology.tp if holder.piece.box == Box.whole(holder.piece.shape) else 1
                assert len(holder.ranks) == alike * (topology.dp if state_name == "model" else 1), (
                    f"{state_name} of {name}"
                )
        assert {state_name for state_name, _ in where.holders} == set(STATE_NAMES)
