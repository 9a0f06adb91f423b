"""From a checkpoint's plan to that of the stage in which a run goes on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaloop.config import Config
from megaloop.depth import DepthPlan, Operator, before_growth, grow, growth_stages
from megaloop.errors import MegaloopError
from megaloop.train.start import growth_since, stages_from

FOUR = DepthPlan.plain(4)


def config(depth: int, stages: list[tuple[int, int]], operator: str = "lidas", **growth: Any) -> Config:
    """Stages of (steps, layers)."""
    schedule = [{"steps": steps, "layers": layers} for steps, layers in stages]
    return Config.model_validate(
        {
            "depth": depth,
            "data": {"sources": [{"path": "none"}]},
            "train": {"steps": sum(steps for steps, _ in stages)},
            "growth": {"operator": operator, "start": stages[0][1], "schedule": schedule, **growth},
        }
    )


@given(
    st.sampled_from(["lidas", "midas", "stack", "last", "random"]),
    st.sampled_from([2, 4]),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
def test_a_grown_plan_remembers_every_stage_before(operator: Operator, block: int, more: list[int]) -> None:
    layers = [4]
    for blocks in more:
        layers.append(layers[-1] * (blocks + 1) if operator == "stack" else layers[-1] + 4 * blocks)
    stages = growth_stages(layers, [1] * len(layers), operator, block)
    for later in stages:
        for earlier in stages[: stages.index(later) + 1]:
            assert before_growth(later.plan, earlier.plan.layers) == earlier.plan


@pytest.mark.parametrize("operator", ["lidas", "midas", "stack", "last", "random"])
def test_every_earlier_stage_catches_up_with_every_later_one(operator: Operator) -> None:
    run = config(16, [(10, 4), (10, 8), (10, 16)], operator)
    for index, earlier in enumerate(run.stages):
        for later in run.stages[index:]:
            stages = stages_from(run, earlier.plan)
            assert stages == run.stages
            growth = growth_since(run, stages, earlier.plan, later.first_step)
            assert growth.plan == later.plan
            assert set(growth.lineage) == set(later.plan.ids) - set(earlier.plan.ids)
            parents = [parent for parent in growth.lineage.values() if parent is not None]
            assert set(parents) <= set(earlier.plan.ids)


def test_a_depth_that_the_schedule_jumps_over_catches_up() -> None:
    run = config(12, [(10, 4), (10, 12)])
    between = grow(FOUR, "lidas", 8, 4).plan
    assert between not in [stage.plan for stage in run.stages]
    assert growth_since(run, stages_from(run, between), between, 15).plan == run.stages[1].plan


def test_a_checkpoint_shallower_than_the_first_stage_is_grown_into_it() -> None:
    run = config(12, [(10, 8), (10, 12)])
    stages = stages_from(run, FOUR)
    assert stages[0].plan == grow(FOUR, "lidas", 8, 4).plan
    assert growth_since(run, stages, FOUR, 0).plan == stages[0].plan
    assert growth_since(run, stages, FOUR, 10).plan == stages[1].plan == grow(FOUR, "lidas", 12, 4).plan


def test_a_model_that_was_grown_before_is_grown_on_from_its_own_layers() -> None:
    run = config(12, [(10, 8), (10, 12)])
    grown = grow(FOUR, "midas", 8, 4).plan
    stages = stages_from(run, grown)
    assert stages[0].plan == grown != run.stages[0].plan
    assert growth_since(run, stages, grown, 12).plan == grow(grown, "lidas", 12, 4).plan


def test_without_growth_any_plan_of_that_depth_goes_on() -> None:
    run = config(8, [(10, 4), (10, 8)]).model_copy(update={"growth": None})
    grown = grow(FOUR, "lidas", 8, 4).plan
    (stage,) = stages_from(run, grown)
    assert (stage.plan, stage.steps) == (grown, 20)
    assert stages_from(run, FOUR)[0].plan == DepthPlan.plain(8), "another depth is left to the check of shapes"


@pytest.mark.parametrize(
    ("saved", "step", "message"),
    [
        (grow(FOUR, "lidas", 8, 4).plan, 5, "it has 8 layers, but at step 5 the growth schedule is at 4; growth never"),
        (grow(FOUR, "last", 8, 2).plan, 15, r"8 layers is that of last \(block 2\), but growth.operator is lidas"),
        (
            grow(FOUR, "lidas", 8, 2, insert_at="middle").plan,
            15,
            r"that of lidas \(block 2, insert_at middle\), but growth.operator is lidas \(block 4, insert_at after\)",
        ),
        (DepthPlan.plain(8), 15, r"8 layers is that of fresh layers \(growth.start=8 would begin with them\), but"),
        (DepthPlan((0, 1, 2, 3, 4, 5, 6, 7), {7: 0}), 15, "8 layers is that of another growth, but growth.operator is"),
        (
            DepthPlan((0, 1, 2, 3, 3, 2)),
            15,
            "its plan .* is looped, but at step 15 the run has 8 layers without a loop",
        ),
    ],
    ids=["shrinking", "operator", "insert_at", "fresh", "by hand", "looped"],
)
def test_what_the_run_cannot_have_made_is_refused(saved: DepthPlan, step: int, message: str) -> None:
    run = config(12, [(10, 4), (10, 8), (10, 12)])
    with pytest.raises(MegaloopError, match=message):
        growth_since(run, stages_from(run, saved), saved, step)
