"""Loops as algebra: the same layers in another order, and back; repetitions as layers; counts as a function of the step."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaloop.config import ModelConfig
from megaloop.depth import (
    DepthPlan,
    DepthSpec,
    Execution,
    LoopCounts,
    LoopStyle,
    grow,
    growth_stages,
    loop,
    reorder,
    unloop,
    untie,
    with_inference_loop,
)
from megaloop.depth.counts import CountKind
from megaloop.depth.flops import flops_per_token, layer_flops, parameters
from megaloop.depth.loops import loop_layers
from megaloop.depth.schedule import DepthEvent, loop_stages, run_flops, with_events
from megaloop.errors import MegaloopError

SHAPE = ModelConfig(hidden_size=64, num_heads=4, num_kv_heads=2, ffn_size=96, vocab_size=256)
PLAIN = LoopStyle()
CONCAT = LoopStyle(injection="concat", norm=True)


@st.composite
def loops(draw: st.DrawFn) -> tuple[DepthPlan, int, int, int]:
    """A grown plan of several ids, and a loop in it."""
    layers = draw(st.integers(1, 4)) * 2
    plan = grow(DepthPlan.plain(2), "lidas", layers, 2).plan
    start = draw(st.integers(0, layers - 1))
    return plan, start, draw(st.integers(start + 1, layers)), draw(st.integers(1, 5))


@given(loops())
def test_looping_and_unlooping_are_inverse(item: tuple[DepthPlan, int, int, int]) -> None:
    plan, start, stop, iterations = item
    looped = loop(plan, start, stop, iterations)
    assert unloop(looped) == plan
    assert looped.lineage == plan.lineage
    assert looped.depth == plan.depth + (stop - start) * (iterations - 1)
    assert reorder(plan, DepthSpec.parse(looped.notation)) == looped
    assert reorder(looped, DepthSpec.parse(plan.layers)) == plan
    if iterations > 1:
        assert looped.loop is not None
        assert (looped.loop.start, looped.loop.block, looped.loop.iterations) == (start, stop - start, iterations)


@given(loops())
def test_untying_makes_copies_that_stand_where_the_repetitions_were(item: tuple[DepthPlan, int, int, int]) -> None:
    plan, start, stop, iterations = item
    looped = loop(plan, start, stop, iterations)
    if iterations == 1:
        with pytest.raises(MegaloopError, match="repeats no layer"):
            untie(looped)
        return
    untied = untie(looped)
    assert not untied.plan.is_looped
    assert [untied.source(layer_id) for layer_id in untied.plan.order] == list(looped.order)
    assert not set(untied.lineage) & set(looped.ids)
    assert set(untied.plan.ids) >= set(looped.ids)
    assert all(untied.plan.root(layer_id) == looped.root(untied.lineage[layer_id]) for layer_id in untied.lineage)  # type: ignore[arg-type]


def test_untying_a_stack_is_growing_by_stack() -> None:
    """Looping and growing are one algebra: a stack run twice, untied, is what G_stack grows."""
    assert untie(DepthPlan.parse("0-4x2-0")).plan == grow(DepthPlan.plain(4), "stack", 8).plan


@given(loops())
def test_uses_say_where_each_time_begins_and_ends(item: tuple[DepthPlan, int, int, int]) -> None:
    plan, start, stop, iterations = item
    looped = loop(plan, start, stop, 2)
    for count in (iterations, None):
        calls = looped.calls(count)
        real = 2 if count is None else count
        assert [call.layer_id for call in calls] == [
            *plan.order[:start],
            *plan.order[start:stop] * real,
            *plan.order[stop:],
        ]
        assert (
            [call.iteration for call in calls if call.is_first]
            == list(range(real))
            == [call.iteration for call in calls if call.is_last]
        )
        assert all(call.layer_id == plan.order[start] for call in calls if call.is_first)
        assert all(call.layer_id == plan.order[stop - 1] for call in calls if call.is_last)
        assert {call.iterations for call in calls} - {None} == {real}
        assert all((call.iteration is None) == (call.iterations is None) for call in calls)
        assert sum(call.is_frozen(1) for call in calls) == (real - 1) * (stop - start)


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (
            "10-4x2-9",
            "depth 10-4x2-9 has 23 layers of its own, and there are 24: 1 would be dropped, and loops leave the",
        ),
        ("10-4x2-11", "and there are 24: loops add none, growth does; of 24 layers for example 11-1x2-12"),
        ("10-0x2-14", "loops 0 layers 2 times"),
        ("ten", "cannot read 'ten'"),
    ],
)
def test_a_loop_keeps_all_layers_and_adds_none(depth: str, message: str) -> None:
    with pytest.raises(MegaloopError) as caught:
        reorder(DepthPlan.plain(24), DepthSpec.parse(depth))
    assert message in str(caught.value)


def test_a_loop_of_layers_that_are_not_there() -> None:
    for start, stop, iterations in ((2, 2, 2), (3, 5, 2), (-1, 2, 2), (0, 2, 0)):
        with pytest.raises(MegaloopError, match="there are no such layers"):
            loop(DepthPlan.plain(4), start, stop, iterations)
    with pytest.raises(MegaloopError, match="is looped already"):
        loop(DepthPlan.parse("1-2x2-1"), 0, 1, 2)


def test_a_style_belongs_to_one_loop() -> None:
    with pytest.raises(MegaloopError, match="must contain exactly one loop"):
        DepthPlan((0, 1), style=CONCAT)
    with pytest.raises(MegaloopError, match="'twice' is none of none, add, concat"):
        LoopStyle(injection="twice")  # type: ignore[arg-type]
    plan = reorder(DepthPlan.plain(4), DepthSpec.parse("1-2x2-1"), CONCAT)
    assert plan != reorder(DepthPlan.plain(4), DepthSpec.parse("1-2x2-1"))
    assert DepthPlan.from_json(plan.to_json()) == plan
    assert "style" not in DepthPlan.parse("1-2x2-1").to_json()
    with pytest.raises(MegaloopError, match="only loops of plain composition can be untied"):
        untie(plan)


def test_a_trained_model_runs_at_other_depths() -> None:
    plain, styled = DepthPlan.parse("1-2x2-1"), reorder(DepthPlan.plain(4), DepthSpec.parse("1-2x2-1"), CONCAT)
    for way, depth, calls in (
        (with_inference_loop(plain, DepthSpec.parse("0-4x3-0")), "0-4x3-0", DepthPlan.parse("0-4x3-0").calls()),
        (with_inference_loop(plain, DepthSpec.parse("4")), "4", DepthPlan.plain(4).calls()),
        (with_inference_loop(plain, DepthSpec.parse("1-2x1-1")), "4", DepthPlan.plain(4).calls()),
        (with_inference_loop(styled, DepthSpec.parse("1-2x5-1")), "1-2x5-1", styled.calls(5)),
        (
            with_inference_loop(styled, DepthSpec.parse("1-2x1-1")),
            "1-2x1-1",
            styled.calls(1),
        ),  # its loop keeps what it has
        (Execution.as_trained(styled), "1-2x2-1", styled.calls()),
    ):
        assert (str(way.depth), way.calls) == (depth, calls)
    for depth in ("4", "0-2x2-2", "1-2x0-1"):
        with pytest.raises(MegaloopError):
            with_inference_loop(styled, DepthSpec.parse(depth))


# --- in a run ---


def test_a_looped_model_grows_inside_its_loop() -> None:
    stages = loop_stages(growth_stages([4, 8, 12], [10, 10, 10], "lidas"), DepthSpec.parse("4-4x4-4"), CONCAT)
    assert [stage.plan.notation for stage in stages] == ["4", "4-2x4-2", "4-4x4-4"]
    assert [stage.growth.new_loop for stage in stages] == [False, True, False]
    assert [stage.plan.style for stage in stages] == [PLAIN, CONCAT, CONCAT]
    assert [unloop(stage.plan) for stage in stages] == [
        stage.plan for stage in growth_stages([4, 8, 12], [10, 10, 10], "lidas")
    ]


def test_events_cut_the_last_stage() -> None:
    stages = growth_stages([4, 8], [10, 30], "lidas")
    made = with_events(stages, [DepthEvent(20, DepthSpec.parse("2-4x2-2")), DepthEvent(30, None)], PLAIN)
    assert [(stage.first_step, stage.steps, stage.plan.notation, stage.event) for stage in made] == [
        (0, 10, "4", False), (10, 10, "8", False), (20, 10, "2-4x2-2", True), (30, 10, "12", True),
    ]  # fmt: skip
    assert made[3].growth.lineage == {8: 2, 9: 3, 10: 4, 11: 5}
    for step in (10, 5, 40):
        with pytest.raises(MegaloopError, match="all after the last growth: after step 10 and before 40"):
            with_events(stages, [DepthEvent(step, DepthSpec.parse("2-4x2-2"))], PLAIN)


@pytest.mark.parametrize("kind", ["uniform", "poisson", "lognormal-poisson"])
def test_counts_have_their_mean_their_bounds_and_depend_on_the_step_alone(kind: CountKind) -> None:
    counts = LoopCounts(6, kind, most=10**6, seed=3)
    drawn = [counts.at(step) for step in range(20_000)]
    assert fmean(drawn) == pytest.approx(6, rel=0.02)
    assert min(drawn) == 1
    assert drawn[:50] == [LoopCounts(6, kind, most=10**6, seed=3).at(step) for step in range(50)]
    assert drawn[:50] != [LoopCounts(6, kind, most=10**6, seed=4).at(step) for step in range(50)]
    spread = math.sqrt(fmean([(count - 6) ** 2 for count in drawn]))
    # of Poisson 5; of a log-normal mean besides; of 1 to 11
    variance = {"poisson": 5, "lognormal-poisson": 5 + 25 * (math.exp(0.25) - 1), "uniform": (11**2 - 1) / 12}[kind]
    assert spread == pytest.approx(math.sqrt(variance), rel=0.04)
    few = LoopCounts(6, kind, least=3, most=8, seed=3)
    assert {few.at(step) for step in range(2000)} == set(range(3, 9))
    assert few.largest == 8


def test_the_ramp_rises_from_the_first_looped_step() -> None:
    fixed = LoopCounts(5, first_step=10, ramp_steps=8)
    assert [fixed.at(step) for step in range(10, 20)] == [1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    drawn = LoopCounts(9, "uniform", ramp_steps=40_000, seed=1)
    for first in (0, 10_000, 30_000):
        mean = fmean(drawn.at(step) for step in range(first, first + 5000))
        assert mean == pytest.approx(1 + 8 * (first + 2500) / 40_000, rel=0.03)
    assert LoopCounts(5).largest == 5
    assert LoopCounts(5, "poisson").largest == 20
    assert LoopCounts(5, "uniform").largest == 9


def test_flops_follow_the_count_and_what_learns() -> None:
    plan = reorder(DepthPlan.plain(4), DepthSpec.parse("1-2x3-1"))
    layer = layer_flops(SHAPE, 64)
    base = flops_per_token(plan, SHAPE, 64)
    more = flops_per_token(plan, SHAPE, 64, iterations=5)
    assert more.forward - base.forward == 4 * layer
    assert more.total - base.total == 12 * layer
    cut = flops_per_token(plan, SHAPE, 64, iterations=5, backprop=2)
    assert cut.forward == more.forward
    assert more.backward - cut.backward == 2 * 3 * 2 * layer
    adapted = flops_per_token(reorder(DepthPlan.plain(4), DepthSpec.parse("1-2x3-1"), CONCAT), SHAPE, 64)
    assert adapted.forward - base.forward == 3 * 4 * SHAPE.hidden_size**2
    assert parameters(reorder(DepthPlan.plain(4), DepthSpec.parse("1-2x3-1"), CONCAT), SHAPE) - parameters(
        plan, SHAPE
    ) == (2 * SHAPE.hidden_size**2 + SHAPE.hidden_size)


def test_the_flops_of_a_run_are_those_of_its_counts() -> None:
    stages = loop_stages(growth_stages([4], [30], "lidas"), DepthSpec.parse("1-2x3-1"), PLAIN)
    counts = LoopCounts(3, "uniform", seed=5)
    costs = run_flops(stages, SHAPE, 64, 100, counts=counts, backprop=2)
    each = [
        flops_per_token(stages[0].plan, SHAPE, 64, iterations=counts.at(step), backprop=2).total * 100
        for step in range(30)
    ]
    assert costs.total == sum(each)


def test_layers_that_loop_may_be_few_of_those_named() -> None:
    assert loop_layers(DepthPlan.plain(4), [2, 9, 3], 2) == DepthPlan.parse("2-2x2-0")
    assert loop_layers(DepthPlan.plain(4), [8], 2) == DepthPlan.plain(4)
