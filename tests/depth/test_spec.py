"""A depth that someone asks for, as a value."""

from __future__ import annotations

import copy
import pickle

import pytest

from megaloop.depth import DepthPlan, DepthSpec, Loop, LoopStyle, grow, reorder
from megaloop.errors import MegaloopError


@pytest.mark.parametrize(
    ("text", "layers", "depth", "loop"),
    [
        ("24", 24, 24, None),
        (24, 24, 24, None),
        ("4-4x4-4", 12, 24, Loop(4, 4, 4)),
        ("4-4x1-4", 12, 12, Loop(4, 4, 1)),
        (" 0-2x3-0 ", 2, 6, Loop(0, 2, 3)),
        ("(0)(1,2)x2(3)", 4, 6, Loop(1, 2, 2)),
        ("(0,1)x2(2,3)x2", 4, 8, None),
    ],
)
def test_what_a_text_says(text: str | int, layers: int, depth: int, loop: Loop | None) -> None:
    spec = DepthSpec.parse(text)
    assert str(spec) == spec.text == str(text)
    assert (spec.layers, spec.plan.depth, spec.loop) == (layers, depth, loop)
    assert spec.is_looped == (layers != depth)
    assert spec.plan == DepthPlan.parse(text)


def test_equal_texts_are_equal_and_travel() -> None:
    spec = DepthSpec.parse("4-4x4-4")
    assert spec == DepthSpec.parse("4-4x4-4") != DepthSpec.parse("4-4x3-4")
    assert hash(spec) == hash(DepthSpec.parse("4-4x4-4"))
    for other in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert (other, other.plan, other.loop) == (spec, spec.plan, spec.loop)


def test_the_depth_of_a_plan_is_by_places() -> None:
    grown = grow(DepthPlan.plain(4), "lidas", 6, 2).plan
    assert grown.order != tuple(range(6))
    assert DepthSpec.of(grown) == DepthSpec.parse("6")
    looped = reorder(grown, DepthSpec.parse("2-2x3-2"), LoopStyle(norm=True))
    spec = DepthSpec.of(looped)
    assert (spec, spec.plan, spec.loop) == (DepthSpec.parse("2-2x3-2"), DepthPlan.parse("2-2x3-2"), Loop(2, 2, 3))
    assert reorder(grown, spec, LoopStyle(norm=True)) == looped


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_a_loop_by_its_numbers_is_the_one_by_its_text(iterations: int) -> None:
    made, read = DepthSpec.looped(4, 2, iterations, 3), DepthSpec.parse(f"4-2x{iterations}-3")
    assert (made, made.plan, made.loop) == (read, read.plan, read.loop)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((1, 0, 2, 1), "loops 0 layers 2 times"), ((1, 2, 0, 1), "loops 2 layers 0 times"), ((0, 2, 10**9, 0), "deeper")],
)
def test_a_loop_that_cannot_be(numbers: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(MegaloopError, match=message):
        DepthSpec.looped(*numbers)
