"""An engine that grows and changes its topology in flight trains the curve of one rank with the same growths."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from megaloop.depth import Operator
from megaloop.parallel.reshard import Moments
from tests.distributed import RankPool, run_ranks
from tests.parallel.layouts import configuration
from tests.parallel.morphing import Layout, compare_bits, measure_memory, morph

PATH = [(4, 4), (6, 4), (8, 4)]
"""(layers, steps) of the stages."""


def _stages(layouts: list[Layout], path: list[tuple[int, int]]) -> list[tuple[int, Layout, int]]:
    return [(layers, layout, steps) for (layers, steps), layout in zip(path, layouts, strict=True)]


@pytest.fixture(scope="module")
def alone(ranks_1: RankPool) -> Any:
    """The same growths on one rank, made once per setting."""

    @cache
    def make(precision: str, operator: Operator, moments: Moments, stages: int) -> dict[str, Any]:
        path = _stages([(1, 1, 1)] * stages, PATH[:stages])
        result: dict[str, Any] = ranks_1.run(morph, configuration(train__precision=precision), path, operator, moments)[
            0
        ]
        return result

    return make


def _furthest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _check(everyone: list[dict[str, Any]], expected: dict[str, Any], limit: float) -> None:
    found = everyone[0]
    assert all(each["losses"] == found["losses"] for each in everyone), "ranks report different losses"
    assert _furthest(found["losses"], expected["losses"]) < limit
    assert found["losses"][-1] < 0.95 * found["losses"][0], "it does not learn, so the comparison says little"
    assert found["differing"] == []
    for number, report in enumerate(found["reports"]):
        assert all(each["reports"][number]["moved"] == report["moved"] for each in everyone), "all plan the same"
        assert report["seconds"][0] >= report["seconds"][1] + report["seconds"][2] > 0
    for each in everyone:
        assert each["groups"][1] == 1, "only the default process group is left"
        for report in each["reports"]:
            assert report["buffer"] <= report["largest_tensor"], "a rank needs one tensor beyond its old and new state"


MORPHS = [
    ([(1, 1, 4), (2, 1, 2), (4, 1, 1)], 2e-5),
    ([(4, 1, 1), (2, 1, 2), (1, 1, 4)], 2e-5),
    ([(1, 1, 4), (1, 2, 2), (2, 2, 1)], 1e-4),
    ([(4, 1, 1), (1, 1, 4), (2, 2, 1)], 1e-4),
]


@pytest.mark.parametrize(("layouts", "limit"), MORPHS, ids=str)
def test_depth_and_topology_change_in_fp32(ranks_4: RankPool, alone: Any, layouts: list[Layout], limit: float) -> None:
    _check(ranks_4.run(morph, configuration(), _stages(layouts, PATH)), alone("fp32", "lidas", "copy", 3), limit)


def test_depth_and_topology_change_in_bf16(ranks_4: RankPool, alone: Any) -> None:
    everyone = ranks_4.run(morph, configuration(train__precision="bf16"), _stages(MORPHS[2][0], PATH))
    _check(everyone, alone("bf16", "lidas", "copy", 3), 5e-3)


@pytest.mark.parametrize(
    ("operator", "moments"),
    [("midas", "copy"), ("last", "copy"), ("random", "copy"), ("lidas", "zero"), ("random", "zero")],
)
def test_other_operators_and_moments(ranks_2: RankPool, alone: Any, operator: Operator, moments: Moments) -> None:
    path = _stages([(2, 1, 1), (1, 1, 2)], PATH[:2])
    expected = alone("fp32", operator, moments, 2)
    _check(ranks_2.run(morph, configuration(), path, operator, moments), expected, 2e-5)
    if operator != "random":
        assert expected["losses"] != alone("fp32", "lidas", "copy", 2)["losses"], "it makes a difference"


@pytest.mark.parametrize("moments", ["copy", "zero"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("after", [(2, 2, 1), (2, 1, 2)], ids=str)
def test_every_bit_of_the_state_is_the_parents(
    ranks_4: RankPool, after: Layout, precision: str, moments: Moments
) -> None:
    values = configuration(train__precision=precision)
    for compared, differing in ranks_4.run(compare_bits, values, (2, 1, 2), after, moments):
        assert compared > 0
        assert differing == []


def test_what_is_in_place_stays(ranks_2: RankPool) -> None:
    """The same topology before and after: the first stage keeps its layers, and nothing of them moves."""
    everyone = ranks_2.run(morph, configuration(), _stages([(2, 1, 1), (2, 1, 1)], [(4, 2), (6, 2)]))
    (report,) = everyone[0]["reports"]
    assert sum(report["in_place"]) > 2 * sum(report["moved"]) > 0


def test_the_process_groups_of_earlier_topologies_are_gone(ranks_4: RankPool) -> None:
    grown = ranks_4.run(morph, configuration(), _stages([(1, 2, 2), (4, 1, 1), (2, 1, 2)], [(4, 1), (6, 1), (8, 1)]))
    fresh = ranks_4.run(morph, configuration(), [(8, (2, 1, 2), 1)])
    assert [each["groups"] for each in grown] == [each["groups"] for each in fresh]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("after", [(2, 1, 1), (1, 1, 2)], ids=str)
def test_a_ranks_memory_is_its_old_state_its_new_engine_and_a_tensor(after: Layout, precision: str) -> None:
    wide = {"hidden_size": 512, "num_heads": 4, "num_kv_heads": 4, "ffn_size": 2048}
    values = configuration(train__precision=precision, train__global_batch=2, train__micro_batch=1, model=wide)
    for rank in run_ranks(2, measure_memory, values, (2, 1, 1), after):  # fresh ranks: what they keep is of this run
        assert rank["gone"], "the old engine is still in memory"
        assert rank["old_state"] > 50e6
        assert rank["over"] < rank["old_state"] + rank["largest_tensor"] + 8e6
