"""Orders of execution are visited so that no beginning runs twice, and each gets the pass that it would have alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaloop.analysis.interventions import sweep
from megaloop.depth import DepthPlan, LayerCall, LoopStyle
from megaloop.inference.caches import LoopCaches
from megaloop.inference.orders import Trail, visits
from tests.analysis.models import decoder
from tests.loop_styles import STYLES

ORDERS = st.lists(st.lists(st.integers(0, 3).map(LayerCall), max_size=6), min_size=1, max_size=12)


@given(ORDERS)
def test_each_beginning_runs_once(orders: list[list[LayerCall]]) -> None:
    """As many executions as the orders have different beginnings, and every order is visited."""
    turns = visits(orders)
    assert sorted(visit.number for visit in turns) == list(range(len(orders)))
    beginnings = {tuple(order[:stop]) for order in orders for stop in range(1, len(order) + 1)}
    assert sum(len(visit.own) for visit in turns) == len(beginnings)
    run: list[LayerCall] = []
    for visit in turns:
        run = [*run[: visit.shared], *visit.own]
        assert run == orders[visit.number]
        assert visit.kept <= len(run)


def test_a_sweep_runs_what_follows_each_intervention_alone() -> None:
    """Every block of 4 of 30 layers 1 to 4 times more: the 30 once, each block 4 times, and what follows it after each of them."""
    calls = DepthPlan.parse("30").calls()
    orders = [calls, *(one.calls(calls) for one in sweep("repeat", 30, 4))]
    ran = sum(len(visit.own) for visit in visits(orders))
    assert ran == 30 + 27 * 4 * 4 + 4 * sum(30 - 4 - start for start in range(27))
    assert sum(len(order) for order in orders) == 4350 > 2.3 * ran


@pytest.mark.parametrize("style", STYLES, ids=str)
@torch.no_grad()
def test_a_trail_leaves_what_the_whole_pass_leaves(style: LoopStyle) -> None:
    """To the bit, wherever the loop is left and entered."""
    model = decoder("1-2x2-1", style)
    calls, tokens_BS = model.plan.calls(), torch.arange(24).view(2, 12)
    orders = [one.calls(calls) for kind in ("skip", "repeat", "exit") for one in sweep(kind, 6, 2)]
    trail = Trail(model, tokens_BS, model.attention_context(12, 0, None, tokens_BS.device))
    for visit in visits(orders):
        whole = model.run(tokens_BS, orders[visit.number], first=True, last=False)
        assert torch.equal(trail.follow(visit), whole), orders[visit.number]


def test_caches_of_generation_refuse_half_a_loop() -> None:
    """Two executions would share what they keep, and the second would see what the first left of other tokens."""
    model = decoder("1-2x2-1")
    calls = model.plan.calls()
    for broken in (calls[:2] + calls[3:], calls[:3] + calls[2:]):
        with pytest.raises(ValueError, match=r"^every layer of the loop must run once in each iteration"):
            LoopCaches(model, broken, 1, 8)
