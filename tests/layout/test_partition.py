"""Stages are contiguous, complete, and as balanced as can be."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.layout.partition import LayerCosts, estimated_costs, partition
from megaloop.layout.topology import Topology

SMOLLM_360M = ModelConfig(hidden_size=960, num_heads=15, num_kv_heads=5, ffn_size=2560)


def _worst(stages: tuple[tuple[int, int], ...], costs: LayerCosts) -> float:
    iterations = [(stop - start) * costs.layer for start, stop in stages]
    iterations[0] += costs.embedding
    iterations[-1] += costs.head
    return max(iterations)


@given(
    layers=st.integers(1, 12),
    stages=st.integers(1, 6),
    embedding=st.floats(0, 5),
    head=st.floats(0, 5),
)
def test_no_split_has_a_faster_slowest_stage(layers: int, stages: int, embedding: float, head: float) -> None:
    costs = LayerCosts(embedding, 1.0, head)
    plan = DepthPlan.plain(layers)
    if stages > layers:
        with pytest.raises(MegaloopError, match=f"{stages} pipeline stages for {layers} layers"):
            partition(plan, stages, costs)
        return
    found = partition(plan, stages, costs)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == layers
    assert all(start < stop for start, stop in found)
    everything = [
        tuple(zip((0, *cuts), (*cuts, layers), strict=True)) for cuts in combinations(range(1, layers), stages - 1)
    ]
    assert _worst(found, costs) == pytest.approx(min(_worst(item, costs) for item in everything))


def test_the_head_counts_as_the_layers_it_is_worth() -> None:
    costs = estimated_costs(SMOLLM_360M, 49152, 2048)
    assert 3 < costs.head / costs.layer < 4  # the head of SmolLM-360M is worth more than three layers
    stages = partition(DepthPlan.plain(32), 4, costs)
    assert [stop - start for start, stop in stages] == [9, 9, 9, 5]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_and_coordinates_are_one_to_one(pp: int, tp: int, dp: int) -> None:
    topology = Topology(pp, tp, dp)
    ranks = range(pp * tp * dp)
    assert topology.world_size == len(ranks)
    assert [topology.rank(topology.coordinate(rank)) for rank in ranks] == list(ranks)
