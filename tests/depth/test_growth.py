"""Growth operators against the formulas of their papers, written out on lists; and what every growth keeps."""

from __future__ import annotations

from functools import reduce
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megaloop.depth import DepthPlan, Growth, InsertAt, Operator, before_growth, copied_block, grow
from megaloop.errors import MegaloopError

OPERATORS: tuple[Operator, ...] = get_args(Operator)
DEPTHS = range(4, 33)
BLOCKS = (1, 2, 4)


def parents(plan: DepthPlan, growth: Growth) -> list[int]:
    """For each layer of the grown plan, in order, the layer of the plan before whose state it takes (fresh: -1)."""
    sources = [growth.source(layer_id) for layer_id in growth.plan.order]
    return [-1 if source is None else source for source in sources]


# --- the formulas, one block at a time, as lists of positions of the model before ---


def lidas(layers: int, block: int, insert_at: InsertAt) -> list[int]:
    model = list(range(layers))
    middle = model[(layers - block) // 2 :][:block]
    cut = middle[-1] + 1 if insert_at == "after" else layers // 2
    return model[:cut] + middle + model[cut:]


def midas(layers: int, block: int) -> list[int]:
    blocks = [list(range(first, first + block)) for first in range(0, layers, block)]
    middle = -(-len(blocks) // 2)  # counted from 1
    return [position for item in [*blocks[:middle], blocks[middle - 1], *blocks[middle:]] for position in item]


def last(layers: int, block: int) -> list[int]:
    return [*range(layers), *range(layers - block, layers)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("layers", DEPTHS)
def test_one_block_is_copied_as_the_papers_say(layers: int, block: int) -> None:
    plan = DepthPlan.plain(layers)
    for insert_at in get_args(InsertAt):
        assert parents(plan, grow(plan, "lidas", layers + block, block, insert_at=insert_at)) == lidas(
            layers, block, insert_at
        )
        control = grow(plan, "random", layers + block, block, insert_at=insert_at)
        copied = grow(plan, "lidas", layers + block, block, insert_at=insert_at)
        assert control.plan.order == copied.plan.order
        assert set(control.lineage.values()) == {None}
        assert not control.plan.lineage
    assert parents(plan, grow(plan, "last", layers + block, block)) == last(layers, block)
    if layers % block == 0:
        assert parents(plan, grow(plan, "midas", layers + block, block)) == midas(layers, block)
    for iterations in (2, 3):
        assert parents(plan, grow(plan, "stack", iterations * layers, block)) == list(range(layers)) * iterations


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("operator", [operator for operator in OPERATORS if operator != "random"])
def test_a_model_that_has_grown_is_copied_by_position_not_by_id(operator: Operator, block: int) -> None:
    plan = DepthPlan((7, 2, 11, 0))  # neither in order nor without gaps
    roots = list(plan.order)
    for _ in range(4 if operator == "stack" else 7):
        layers = plan.layers
        positions = {
            "lidas": lidas(layers, block, "after"),
            "midas": midas(layers, block),
            "last": last(layers, block),
            "stack": list(range(layers)) * 2,
        }[operator]
        growth = grow(plan, operator, len(positions), block)
        assert parents(plan, growth) == [plan.order[position] for position in positions]
        assert min(growth.lineage) > max(plan.ids)
        plan, roots = growth.plan, [roots[position] for position in positions]
        assert [plan.root(layer_id) for layer_id in plan.order] == roots


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("blocks", range(1, 9))
def test_lidas_is_midas_where_the_number_of_blocks_is_odd(blocks: int, block: int) -> None:
    plan = DepthPlan.plain(blocks * block)
    ours, theirs = (grow(plan, operator, plan.layers + block, block) for operator in ("lidas", "midas"))
    # a single layer is never centred in an even number of them: rounding down agrees with ceil(n/2)
    assert (ours.plan == theirs.plan) == (blocks % 2 == 1 or block == 1)


def test_the_ancestry_of_lidas_from_4_to_24_is_0123_six_times() -> None:
    plan = grow(DepthPlan.plain(4), "lidas", 24, 4).plan
    assert [plan.root(layer_id) for layer_id in plan.order] == [0, 1, 2, 3] * 6
    middle = grow(DepthPlan.plain(4), "lidas", 12, 4, insert_at="middle").plan
    assert [middle.root(layer_id) for layer_id in middle.order] != [0, 1, 2, 3] * 3


# --- properties ---


@st.composite
def growths(draw: st.DrawFn) -> tuple[DepthPlan, Operator, list[int], dict[str, Any]]:
    """A plan, an operator, the depths that it goes through one after another, and the options."""
    block = draw(st.sampled_from(BLOCKS))
    operator = draw(st.sampled_from(OPERATORS))
    first = block * draw(st.integers(1, 8 // block + 1))
    depths: list[int] = []
    for blocks in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)):
        before = depths[-1] if depths else first
        depths.append(before * (blocks + 1) if operator == "stack" else before + block * blocks)
    assume(depths[-1] <= 128)
    options = {"block": block, "insert_at": draw(st.sampled_from(get_args(InsertAt)))}
    return DepthPlan.plain(first), operator, depths, options


def _steps(plan: DepthPlan, operator: Operator, depths: list[int], options: dict[str, Any]) -> list[Growth]:
    found: list[Growth] = []
    for depth in depths:
        found.append(grow(found[-1].plan if found else plan, operator, depth, **options))
    return found


@given(growths())
def test_what_every_growth_keeps(case: tuple[DepthPlan, Operator, list[int], dict[str, Any]]) -> None:
    plan, operator, depths, options = case
    before = plan
    for growth in _steps(plan, operator, depths, options):
        after = growth.plan
        new = set(after.ids) - set(before.ids)
        assert len(set(after.order)) == len(after.order) == after.layers, "each id once"
        assert [layer_id for layer_id in after.order if layer_id not in new] == list(before.order), "the old stay"
        assert min(new) > max(before.ids), "an id is a name for life: none is used again"
        assert set(growth.lineage) == new, "the lineage is complete"
        copies = {child: parent for child, parent in growth.lineage.items() if parent is not None}
        assert set(copies.values()) <= set(before.ids)
        assert set(after.lineage) == set(before.lineage) | set(copies)
        assert all(after.lineage[layer_id] == before.lineage[layer_id] for layer_id in before.lineage)
        assert all(after.root(layer_id) in plan.ids for layer_id in after.ids if operator != "random")
        assert all(growth.source(layer_id) == layer_id for layer_id in before.ids)
        assert DepthPlan.from_json(after.to_json()) == after
        assert before_growth(after, before.layers) == before
        before = after


@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_block_is_told_from_what_was_copied_last(operator: Operator, block: int) -> None:
    """At every depth on the way, wherever later copies have been put between earlier ones; fresh layers tell nothing."""
    for insert_at in get_args(InsertAt):
        plan, depths = DepthPlan.plain(2 * block), [block * count for count in range(3, 9)]
        assert copied_block(plan) is None
        for growth in _steps(
            plan,
            operator,
            [4 * block, 8 * block] if operator == "stack" else depths,
            {"block": block, "insert_at": insert_at},
        ):
            copied = growth.plan.layers // 2 if operator == "stack" else block
            assert copied_block(growth.plan) == (None if operator == "random" else copied)


@given(growths())
def test_growing_step_by_step_is_growing_at_once(case: tuple[DepthPlan, Operator, list[int], dict[str, Any]]) -> None:
    plan, operator, depths, options = case
    steps = _steps(plan, operator, depths, options)
    composed = reduce(Growth.then, steps)
    assert composed.plan == steps[-1].plan
    assert set(composed.lineage) == set(composed.plan.ids) - set(plan.ids)
    for layer_id in composed.plan.ids:  # the composed lineage leads where the single ones lead
        source: int | None = layer_id
        for growth in reversed(steps):
            source = None if source is None else growth.source(source)
        assert composed.source(layer_id) == source
    if operator != "stack":  # stacking twice copies copies, stacking once does not
        at_once = grow(plan, operator, depths[-1], **options)
        assert (at_once.plan, dict(at_once.lineage)) == (composed.plan, dict(composed.lineage))


@given(growths())
def test_composition_is_associative_and_has_a_neutral_element(
    case: tuple[DepthPlan, Operator, list[int], dict[str, Any]],
) -> None:
    plan, operator, depths, options = case
    steps = _steps(plan, operator, depths, options)
    if len(steps) == 3:
        one, two, three = steps
        left, right = one.then(two).then(three), one.then(two.then(three))
        assert (left.plan, dict(left.lineage)) == (right.plan, dict(right.lineage))
    first = steps[0]
    for same in (Growth.none(plan).then(first), first.then(Growth.none(first.plan))):
        assert (same.plan, dict(same.lineage)) == (first.plan, dict(first.lineage))


@given(st.sampled_from(OPERATORS), st.integers(4, 12))
def test_growing_to_the_same_depth_changes_nothing(operator: Operator, layers: int) -> None:
    plan = DepthPlan.plain(layers)
    growth = grow(plan, operator, layers, 1)
    assert growth.plan == plan
    assert not growth.lineage


def test_a_growth_is_a_value_that_nobody_changes() -> None:
    lineage: dict[int, int | None] = {1: 0}
    growth = Growth(DepthPlan((0, 1), {1: 0}), lineage)
    lineage[1] = None
    assert growth.source(1) == 0
    with pytest.raises(TypeError, match="does not support item assignment"):
        growth.lineage[1] = None  # type: ignore[index]


# --- bad input ---


@pytest.mark.parametrize(
    ("plan", "operator", "layers", "block", "message"),
    [
        (DepthPlan.plain(8), "lidas", 4, 4, "from 8 to 4 layers; growth never shrinks"),
        (
            DepthPlan.plain(4),
            "lidas",
            10,
            4,
            "10 layers cannot be reached from 4 by blocks of 4; choose for example 12",
        ),
        (DepthPlan.plain(4), "last", 7, 2, "choose for example 8 layers, or a block that divides 3"),
        (DepthPlan.plain(4), "lidas", 9, 5, "a block of 5 layers, and 4 to copy from; choose a block of 1 to 4"),
        (DepthPlan.plain(4), "lidas", 8, 0, "a block of 0 layers"),
        (DepthPlan.plain(6), "midas", 10, 4, "6 layers are no multiple of block 4"),
        (DepthPlan.plain(4), "stack", 10, 4, "stack repeats all 4 layers, which never makes 10; choose a multiple"),
        (DepthPlan.parse("1-2x2-1"), "lidas", 8, 2, "is looped; only a plan that runs every layer once can grow"),
    ],
)
def test_what_cannot_be_reached_is_refused_in_a_line(
    plan: DepthPlan, operator: Operator, layers: int, block: int, message: str
) -> None:
    with pytest.raises(MegaloopError) as caught:
        grow(plan, operator, layers, block)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_id_of_a_parent_that_has_gone_is_not_used_again() -> None:
    plan = DepthPlan((0, 1), {0: 2})
    grown = grow(plan, "last", 3, 1)
    assert grown.plan.order == (0, 1, 3)
    assert grown.plan.ancestors(3) == (1,)
    assert grown.plan.ancestors(0) == (2,)
