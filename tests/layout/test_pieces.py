"""Boxes, ranges of boxes, and their values: against sets of elements."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaloop.layout.pieces import Box, Piece, StatePiece

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return Box(offset, tuple(draw(st.integers(1, size - begin)) for size, begin in zip(shape, offset, strict=True)))


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(prod(shape)).view(shape)


def inside(box: Box, shape: tuple[int, ...]) -> list[int]:
    return list(numbered(shape)[box.within(Box.whole(shape))].reshape(-1).tolist())


def all_boxes(shape: tuple[int, ...]) -> list[Box]:
    ranges = [[(low, high - low) for high in range(1, size + 1) for low in range(high)] for size in shape]
    return [
        Box(tuple(low for low, _ in topology), tuple(size for _, size in topology)) for topology in product(*ranges)
    ]


@pytest.mark.parametrize("shape", [(6,), (4, 3), (2, 3, 2)], ids=str)
def test_what_is_left_holds_for_every_pair_of_boxes(shape: tuple[int, ...]) -> None:
    covered = {box: inside(box, shape) for box in all_boxes(shape)}
    for one, other in product(covered, repeat=2):
        rest = [number for box in one.minus(other) for number in covered[box]]
        assert sorted(rest) == sorted(set(covered[one]) - set(covered[other])), f"{one} without {other}"


@settings(deadline=None)
@given(st.data(), SHAPES)
def test_what_is_left_of_a_box_is_what_the_other_does_not_cover(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    rest = [number for box in one.minus(other) for number in inside(box, shape)]
    assert sorted(rest) == sorted(set(inside(one, shape)) - set(inside(other, shape))), "each element once"
    common = one.intersect(other)
    assert set(inside(common, shape) if common else []) == set(inside(one, shape)) & set(inside(other, shape))
    assert one.minus(one) == []


@settings(deadline=None)
@given(st.data(), SHAPES)
def test_the_rectangles_of_a_range_are_the_range(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(boxes(shape))
    start = data.draw(st.integers(0, box.numel))
    stop = data.draw(st.integers(start, box.numel))
    piece = Piece("tensor", shape, box, (start, stop))
    order = inside(box, shape)
    covered = [number for part, at in piece.rectangles() for number in inside(part, shape)]
    assert sorted(covered) == sorted(order[start:stop])
    for part, at in piece.rectangles():
        assert inside(part, shape) == order[at : at + part.numel], "row-major, from where it says"
    assert len(list(piece.rectangles())) <= 2 * len(shape) + 1
    assert list(Piece("tensor", shape, box).rectangles()) == [(box, 0)], "a whole box is one rectangle"


def test_a_range_of_no_elements_has_no_rectangles() -> None:
    for start in range(7):
        assert list(Piece("tensor", (2, 3), Box.whole((2, 3)), (start, start)).rectangles()) == []


@settings(deadline=None)
@given(st.data(), SHAPES, st.booleans())
def test_regions_are_views_of_the_right_values(data: st.DataObject, shape: tuple[int, ...], whole: bool) -> None:
    box = data.draw(boxes(shape))
    values = numbered(shape)[box.within(Box.whole(shape))].clone()
    start = data.draw(st.integers(0, box.numel - 1))
    flat = None if whole else (start, data.draw(st.integers(start + 1, box.numel)))
    held = values if flat is None else values.reshape(-1)[slice(*flat)].clone()
    state = StatePiece("master", Piece("tensor", shape, box, flat), held)
    for part, region in state.regions():
        assert region.shape == part.shape
        assert region.reshape(-1).tolist() == inside(part, shape)
        region.fill_(-1)
    assert bool((held == -1).all()), "writing to the regions writes to the piece"
