from __future__ import annotations

import json
import pickle
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError

orders = st.lists(st.integers(0, 9), min_size=1, max_size=16).map(tuple)
loops = st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 6))


@st.composite
def plans(draw: st.DrawFn) -> DepthPlan:
    """Any order, with a lineage in which a parent always has the smaller id."""
    order = draw(orders)
    copies = [layer_id for layer_id in sorted(set(order)) if layer_id > 0 and draw(st.booleans())]
    return DepthPlan(order, {layer_id: draw(st.integers(0, layer_id - 1)) for layer_id in copies})


@given(plans())
def test_what_a_plan_writes_reads_back_as_the_same_order(plan: DepthPlan) -> None:
    assert DepthPlan.parse(str(plan)).order == plan.order


@given(orders, orders)
def test_two_orders_never_have_the_same_text(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assume(one != other)
    assert str(DepthPlan(one)) != str(DepthPlan(other))


@given(st.integers(1, 200))
def test_a_number_is_a_plain_model(layers: int) -> None:
    plan = DepthPlan.parse(layers)
    assert plan == DepthPlan.plain(layers) == DepthPlan.parse(str(layers))
    assert plan.order == plan.ids == tuple(range(layers))
    assert str(plan) == str(layers)
    assert not plan.is_looped


@given(loops)
def test_the_loop_notation_gives_the_loop_of_the_paper(loop: tuple[int, int, int, int]) -> None:
    before, block, iterations, after = loop
    plan = DepthPlan.parse(f"{before}-{block}x{iterations}-{after}")
    assert plan.depth == before + block * iterations + after
    assert plan.layers == before + block + after
    assert plan.order[before : before + block * iterations] == tuple(range(before, before + block)) * iterations
    assert plan.is_looped == (iterations > 1)


def test_the_two_examples_of_the_documentation() -> None:
    assert DepthPlan.parse("2-2x3-1").order == (0, 1, 2, 3, 2, 3, 2, 3, 4)
    assert DepthPlan.parse("(0,1,4)(2,3)x2(5)").order == (0, 1, 4, 2, 3, 2, 3, 5)
    assert str(DepthPlan((0, 1, 4, 2, 3, 2, 3, 5))) == "(0,1,4)(2,3)x2(5)"
    assert str(DepthPlan.parse("4-4x4-4")) == "4-4x4-4"


@given(plans())
def test_ids_are_unique_and_every_position_belongs_to_one(plan: DepthPlan) -> None:
    assert len(set(plan.ids)) == len(plan.ids) == plan.layers
    assert [call.layer_id for call in plan.calls()] == list(plan.order)
    assert list(plan.ids) == sorted(plan.ids, key=plan.order.index)
    assert tuple(plan) == plan.order
    assert len(plan) == plan.depth


@given(plans())
def test_lineage_leads_from_every_layer_to_a_fresh_one(plan: DepthPlan) -> None:
    for layer_id in plan.ids:
        root = plan.root(layer_id)
        assert root not in plan.lineage
        chain = (layer_id, *plan.ancestors(layer_id))
        assert chain[-1] == root
        assert all(plan.lineage[child] == parent for child, parent in pairwise(chain))


@given(plans())
def test_json_and_pickle_keep_order_and_lineage(plan: DepthPlan) -> None:
    for copy in (DepthPlan.from_json(json.loads(json.dumps(plan.to_json()))), pickle.loads(pickle.dumps(plan))):
        assert copy == plan
        assert hash(copy) == hash(plan)


def test_a_plan_cannot_be_changed() -> None:
    parents = {1: 0}
    plan = DepthPlan((0, 1), parents)
    parents[0] = 1
    assert dict(plan.lineage) == {1: 0}
    with pytest.raises(TypeError):
        plan.lineage[0] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        plan.order = (0,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("order", "lineage"),
    [((), {}), ((-1,), {}), ((0, 1), {2: 0}), ((0, 1), {0: 1, 1: 0}), ((0,), {0: 0})],
)
def test_a_plan_that_makes_no_sense_is_refused(order: tuple[int, ...], lineage: dict[int, int]) -> None:
    with pytest.raises(MegaloopError, match="depth"):
        DepthPlan(order, lineage)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "4.5", "24 layers", "4-4x4", "4-0x4-4", "4-4x0-4", "0-0x0-0", "4x4", "٣", "()", "(,)", "(0,,1)",
     "(0)x0", "(0)(1", "999999999", "1-1x999999999-1", "(0)x999999999", "9" * 5000, f"({'9' * 5000})"],
)  # fmt: skip
def test_bad_text_gets_an_error_of_one_line(text: str) -> None:
    with pytest.raises(MegaloopError) as caught:
        DepthPlan.parse(text)
    assert "\n" not in str(caught.value)


@given(st.one_of(st.text(max_size=12), st.text("0123456789-x(),", max_size=12)))
def test_any_text_is_a_plan_or_a_clear_error(text: str) -> None:
    try:
        plan = DepthPlan.parse(text)
    except MegaloopError:
        return
    assert DepthPlan.parse(str(plan)) == plan


def test_the_package_does_not_import_torch() -> None:
    code = "import sys, megaloop.depth, megaloop.depth.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_next_id_is_above_all_that_were_ever_used() -> None:
    assert DepthPlan.plain(3).next_id == 3
    assert DepthPlan((0, 1), {1: 7}).next_id == 8  # the parent has gone, its id is not free
