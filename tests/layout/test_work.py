"""The work of all ranks of a pipeline, executed symbolically: every message meets its receive, every gradient its state."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace

import pytest

from megaloop.depth import DepthPlan, LoopStyle
from megaloop.layout.partition import LayerCosts, StageMap, slice_rounds
from megaloop.layout.rounds import Action
from megaloop.layout.work import RankSchedule

COSTS = LayerCosts(0.0, 1.0, 2.0)
DEPTHS = ["8-8x1-8", "1-2x3-1", "0-4x4-0", "2-3x2-1", "4-4x4-4", "0-8x3-8", "7-1x5-0", "3-2x6-9"]


def execute(ranks: list[RankSchedule], capacity: int | None = None) -> None:
    """Run all ranks, each in its order, and check what arrives, and what was done in the end.

    A receive blocks until its message is there; a send while ``capacity`` messages wait to be received. Default: those that
    the schedule has on their way; receives that are posted ahead come on top of them.
    """
    capacity = ranks[0].rounds.window if capacity is None else capacity
    programs = [deque((action, part) for action in work.passes() for part in ("receive", "send")) for work in ranks]
    channels: dict[tuple[int, bool], deque[tuple[Action, int]]] = defaultdict(deque)
    done: list[list[Action]] = [[] for _ in ranks]
    moved = True
    while any(programs):
        assert moved, f"ranks wait for each other: {[program[0] if program else None for program in programs]}"
        moved = False
        for rank, work in enumerate(ranks):
            while programs[rank]:
                action, part = programs[rank][0]
                if part == "receive" and work.receives(action):
                    source = (rank + (1 if action.backward else -1)) % len(ranks)
                    if not channels[source, action.backward]:
                        break
                    (sent, position) = channels[source, action.backward].popleft()
                    assert sent.micro_batch == action.micro_batch
                    assert position == work.slices[action.round][1 if action.backward else 0], (
                        "the state at another place"
                    )
                if part == "send" and work.sends(action):
                    channel = channels[rank, action.backward]
                    if len(channel) >= capacity:
                        break
                    channel.append((action, work.slices[action.round][0 if action.backward else 1]))
                if part == "receive" and action.backward:
                    forward = Action(False, action.round, action.micro_batch)
                    assert forward in done[rank], "forward before backward"
                if part == "send":
                    done[rank].append(action)
                programs[rank].popleft()
                moved = True
    assert not any(channels.values()), "something was sent that nobody received"
    _check_what_was_done(ranks, done)


def _check_what_was_done(ranks: list[RankSchedule], done: list[list[Action]]) -> None:
    calls, first = ranks[0].calls, ranks[0]
    for micro_batch in range(first.rounds.micro_batches):
        ran = [
            position
            for number in range(first.rounds.rounds)
            for work, passes in zip(ranks, done, strict=True)
            for action in passes
            if (action.backward, action.round, action.micro_batch) == (False, number, micro_batch)
            for position in range(*work.slices[number])
        ]
        assert ran == list(range(len(calls))), "every layer's every use once, in order"
        if first.rounds.forward_only:
            continue
        back = {
            position
            for work, passes in zip(ranks, done, strict=True)
            for action in passes
            if action.backward and action.micro_batch == micro_batch
            for position in range(*work.slices[action.round])
        }
        learning = {position for position, call in enumerate(calls) if not call.is_frozen(first.backprop)}
        assert learning <= back, "everything that learns has its backward pass"
        assert all(Action(True, 0, micro_batch) in done[rank] for rank in (0, len(ranks) - 1)[:1]), (
            "the embedding learns"
        )


def _ranks(plan: DepthPlan, slices: StageMap, micro_batches: int, **options: object) -> list[RankSchedule]:
    return [RankSchedule.of(plan, slices, rank, micro_batches, **options) for rank in range(len(slices[0]))]  # type: ignore[arg-type]


@pytest.mark.parametrize("pipeline", range(1, 9))
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_message_is_received_in_order_by_whom_it_is_for(depth: str, pipeline: int) -> None:
    plan = DepthPlan.parse(depth)
    if pipeline > plan.layers:
        return
    slices = slice_rounds(plan, pipeline, 1, 16, COSTS)
    for micro_batches in range(pipeline, 25):
        execute(_ranks(plan, slices, micro_batches))
    injecting = DepthPlan(plan.order, style=LoopStyle(injection="add")) if plan.loop else plan
    for iterations in (1, 2, 5) if plan.loop else ():
        for backprop in (1, 2, None):
            execute(_ranks(injecting, slices, pipeline + 3, iterations=iterations, backprop=backprop))
    for micro_batches in (1, pipeline, 2 * pipeline + 1):
        execute(_ranks(plan, slices, micro_batches, forward_only=True))


@pytest.mark.parametrize("pipeline", range(1, 9))
@pytest.mark.parametrize("rounds", range(1, 7))
def test_unlooped_models_in_rounds(pipeline: int, rounds: int) -> None:
    plan = DepthPlan.plain(50)
    slices = slice_rounds(plan, pipeline, rounds, 16, COSTS)
    for micro_batches in range(pipeline, 25):
        execute(_ranks(plan, slices, micro_batches))
    for micro_batches in (pipeline, 2 * pipeline - 1, 40):
        execute(_ranks(plan, slices, micro_batches, forward_only=True))


def test_times_that_do_not_learn_have_no_backward_pass_and_send_no_gradient() -> None:
    plan = DepthPlan(DepthPlan.parse("0-4x4-0").order, style=LoopStyle(injection="add"))
    slices = slice_rounds(plan, 2, 1, 4, COSTS)
    for backprop, backward in ((None, 4), (2, 3), (1, 2)):
        first, second = _ranks(plan, slices, 4, backprop=backprop)
        # the first rank goes back once more than the second: to what entered the loop, in the embedding's slice
        assert sum(action.backward for action in first.passes()) == 4 * backward
        assert sum(action.backward for action in second.passes()) == 4 * (backward if backprop is None else backprop)
        assert sum(first.receives(action) for action in first.passes() if action.backward) == 4 * (backprop or 4)


def test_what_entered_a_loop_is_kept_from_its_first_time_to_its_last() -> None:
    plan = DepthPlan(DepthPlan.parse("1-2x3-1").order, style=LoopStyle(injection="add"))
    for pipeline in (2, 4):
        ranks = _ranks(plan, slice_rounds(plan, pipeline, 1, 4, COSTS), 4, forward_only=True)
        for micro_batch in range(4):
            held = [
                (work.enters_loop(action), work.leaves_loop(action))
                for work in ranks
                for action in work.passes()
                if action.micro_batch == micro_batch and any(call.is_first for call in work.calls_of(action))
            ]
            assert held == [(True, False), (False, False), (False, True)]


def test_the_checker_finds_what_is_wrong() -> None:
    plan = DepthPlan.parse("0-4x4-0")
    ranks = _ranks(plan, slice_rounds(plan, 2, 1, 4, COSTS), 4)
    wrong = replace(ranks[1], slices=(ranks[1].slices[1], ranks[1].slices[0], *ranks[1].slices[2:]))
    with pytest.raises(AssertionError, match="another place"):
        execute([ranks[0], wrong])
    many = _ranks(DepthPlan.plain(50), slice_rounds(DepthPlan.plain(50), 8, 2, 16, COSTS), 23)
    with pytest.raises(AssertionError, match="wait for each other"):
        execute(many, capacity=4)
    with pytest.raises(AssertionError, match="wait for each other"):
        execute([ranks[0], replace(ranks[1], backprop=1)])
