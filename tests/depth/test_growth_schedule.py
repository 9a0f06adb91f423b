"""The stages of a run, and what they save: the table of the literature, and the arithmetic around it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaloop.depth import DepthPlan, grow, growth_stages, run_flops, stage_at
from megaloop.depth.flops import flops_per_token
from megaloop.depth.schedule import explicit_steps, proportional_steps
from megaloop.errors import MegaloopError


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int | None = 49152
    tied_embeddings: bool = True

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


SHAPES = {"1.7B": (24, Shape(2048, 32, 32, 8192)), "360M": (32, Shape(960, 15, 5, 2560))}


@pytest.mark.parametrize(
    ("model", "schedule", "end", "fraction"),
    [
        ("1.7B", "prop-1", 0.85, 0.777), ("1.7B", "prop-1", 1.0, 0.738),
        ("1.7B", "prop-2", 0.85, 0.846), ("1.7B", "prop-2", 1.0, 0.818),
        ("360M", "prop-1", 0.85, 0.780), ("360M", "prop-1", 1.0, 0.741),
        ("360M", "prop-2", 0.85, 0.844), ("360M", "prop-2", 1.0, 0.817),
    ],
)  # fmt: skip
def test_smollm_costs_what_is_known(model: str, schedule: str, end: float, fraction: float) -> None:
    layers, shape = SHAPES[model]
    counts = list(range(4, layers + 1, 4))
    steps = proportional_steps(schedule, len(counts), 190_735, end)
    flops = run_flops(growth_stages(counts, steps, "lidas"), shape, 2048, 1_000_000)
    assert flops.fraction == pytest.approx(fraction, abs=0.005)


@given(
    st.sampled_from([0, 1, 2, 0.5]), st.integers(1, 9), st.integers(1000, 100_000), st.sampled_from([0.5, 0.85, 1.0])
)
def test_stage_i_lasts_in_proportion_to_i_to_the_a(exponent: float, stages: int, total: int, end: float) -> None:
    steps = proportional_steps(f"prop-{exponent}", stages, total, end)
    assert len(steps) == stages
    assert sum(steps) == total
    weights = [index**exponent for index in range(1, stages + 1)]
    for found, weight in zip(steps[:-1], weights, strict=False):
        assert abs(found - total * end * weight / sum(weights)) <= 1, "rounded to whole steps"
    rest = total - total * end  # the cooldown belongs to the last stage
    assert abs(steps[-1] - rest - total * end * weights[-1] / sum(weights)) <= 1


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), min_size=1, max_size=5))
def test_stages_follow_one_another_and_cost_what_their_steps_cost(parts: list[tuple[int, int]]) -> None:
    layers = [2 * sum(more for more, _ in parts[: index + 1]) for index in range(len(parts))]
    steps = [length for _, length in parts]
    stages = growth_stages(layers, steps, "last", 2)
    assert [stage.first_step for stage in stages] == [sum(steps[:index]) for index in range(len(parts))]
    for step in range(sum(steps)):
        stage = stage_at(stages, step)
        assert stage.first_step <= step < stage.stop
    assert stage_at(stages, sum(steps) + 5) is stages[-1]
    for before, after in pairwise(stages):
        assert after.growth.plan == after.plan == grow(before.plan, "last", after.plan.layers, 2).plan

    _, shape = SHAPES["360M"]
    flops = run_flops(stages, shape, 128, 1000)
    each_step = [flops_per_token(stage_at(stages, step).plan, shape, 128).total * 1000 for step in range(sum(steps))]
    assert flops.total == sum(each_step) == sum(flops.stages)
    assert flops.full_depth == each_step[-1] * len(each_step)
    assert flops.matched_steps == round(Fraction(flops.total, each_step[-1]))


def test_a_run_may_begin_with_layers_that_were_grown_before() -> None:
    first = grow(DepthPlan.plain(4), "midas", 8, 4).plan
    stages = growth_stages([8, 12], [10, 10], "lidas", first=first)
    assert stages[0].plan == first
    assert stages[1].plan == grow(first, "lidas", 12, 4).plan


def test_where_new_layers_go_holds_for_every_stage() -> None:
    stages = growth_stages([4, 8, 12], [10, 10, 10], "lidas", 2, insert_at="middle")
    assert stages[-1].plan == grow(DepthPlan.plain(4), "lidas", 12, 2, insert_at="middle").plan
    assert stages[-1].plan != grow(DepthPlan.plain(4), "lidas", 12, 2, insert_at="after").plan


def test_a_vocabulary_that_only_the_tokenizer_knows_counts_the_same() -> None:
    stages = growth_stages([4, 8], [10, 10], "lidas")
    _, shape = SHAPES["360M"]
    open_shape = replace(shape, vocab_size=None)
    assert run_flops(stages, open_shape, 128, 1000, vocab_size=49152) == run_flops(stages, shape, 128, 1000)


def test_an_explicit_schedule_adds_up() -> None:
    assert explicit_steps([10, 20, 70], 100) == [10, 20, 70]
    for last in (60, 80):
        with pytest.raises(MegaloopError) as caught:
            explicit_steps([10, 20, last], 100)
        assert f"add up to {30 + last}, but train.steps is 100; make them equal" in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        ("prop", 100, "cannot read 'prop'; expected prop-1, prop-2 and so on, or a list"),
        ("prop-x", 100, "cannot read 'prop-x'"),
        ("prop-1x", 100, "cannot read 'prop-1x'"),
        ("prop--1", 100, "cannot read"),
        ("linear", 100, "cannot read"),
        ("prop-1", 5, "5 steps are too few for 6 stages under prop-1"),
        ("prop-5", 100, "100 steps are too few for 6 stages under prop-5: they would last 0, "),
    ],
)
def test_schedules_that_make_no_sense(schedule: str, steps: int, message: str) -> None:
    with pytest.raises(MegaloopError) as caught:
        proportional_steps(schedule, 6, steps, 0.85)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_stages_of_the_same_depth_are_one() -> None:
    with pytest.raises(MegaloopError, match="two stages of 8 layers follow each other; make them one"):
        growth_stages([4, 8, 8], [1, 1, 1], "lidas")
