"""The order of work on a pipeline, executed symbolically for every size: proved, not sampled."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from megaloop.errors import MegaloopError
from megaloop.layout.rounds import Action, Rounds

SIZES = [(ranks, rounds) for ranks in range(1, 9) for rounds in range(1, 7)]


def _unit(rank: int, work: Action) -> float:
    return 2.0 if work.backward else 1.0


@pytest.mark.parametrize(("ranks", "rounds"), SIZES)
def test_every_pass_happens_once_in_a_possible_order_with_the_least_bubble(ranks: int, rounds: int) -> None:
    for micro_batches in range(ranks, 25):
        schedule = Rounds(ranks, micro_batches, rounds)
        spans = schedule.timeline(_unit)  # raises where ranks wait for each other
        ended = {(rank, span.work): span.stop for rank, item in enumerate(spans) for span in item}
        for rank, item in enumerate(spans):
            work = [span.work for span in item]
            everything = {Action(b, r, m) for b in (False, True) for r in range(rounds) for m in range(micro_batches)}
            assert Counter(work) == Counter(everything), "each pass once"
            assert all(a.stop <= b.start for a, b in pairwise(item)), "one at a time"
            for span in item:
                if (source := schedule.needs(rank, span.work)) is not None:
                    assert ended[source] <= span.start, "what a pass needs is there"
                if span.work.backward:
                    forward = Action(False, span.work.round, span.work.micro_batch)
                    assert ended[rank, forward] <= span.start, "forward before backward"
        total = max(item[-1].stop for item in spans)
        assert total == 3 * (micro_batches * rounds + ranks - 1), "no rank waits longer than it has to"
        assert schedule.bubble == pytest.approx(1 - 3 * micro_batches * rounds / total)


@pytest.mark.parametrize(("ranks", "rounds"), SIZES)
def test_messages_between_two_ranks_are_received_in_the_order_in_which_they_are_sent(ranks: int, rounds: int) -> None:
    for micro_batches in range(ranks, 25):
        schedule = Rounds(ranks, micro_batches, rounds)
        orders = [schedule.passes(rank) for rank in range(ranks)]
        for sender in range(ranks):
            for backward in (False, True):
                receiver = (sender + (-1 if backward else 1)) % ranks
                if receiver == sender:
                    continue
                wanted = [schedule.needs(receiver, work) for work in orders[receiver] if work.backward == backward]
                received = [source[1] for source in wanted if source is not None and source[0] == sender]
                sent = [work for work in orders[sender] if work.backward == backward and work in set(received)]
                assert sent == received


def test_micro_batches_in_flight_are_bounded() -> None:
    """A rank never holds activations of more slices than its warm-up and one."""
    for ranks, rounds in SIZES:
        for micro_batches in range(ranks, 25):
            schedule = Rounds(ranks, micro_batches, rounds)
            for rank in range(ranks):
                held = most = 0
                for work in schedule.passes(rank):
                    held += -1 if work.backward else 1
                    most = max(most, held)
                limit = ranks - rank if rounds == 1 else 2 * (ranks - rank - 1) + (rounds - 1) * schedule.groups[0] + 1
                assert most == min(limit, micro_batches * rounds)
                assert held == 0


def test_one_round_is_the_order_in_which_deepspeed_works() -> None:
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

    for ranks in range(1, 9):
        for micro_batches in range(1, 25):
            for rank in range(ranks):
                theirs: list[bool] = []
                steps: Any = TrainSchedule(micro_batches, ranks, rank)
                for step in steps:
                    theirs += [
                        isinstance(item, BackwardPass) for item in step if isinstance(item, (BackwardPass, ForwardPass))
                    ]
                ours = [work.backward for work in Rounds(ranks, micro_batches).passes(rank)]
                assert ours == theirs


def test_groups_are_no_smaller_than_the_ring() -> None:
    assert Rounds(4, 9, 2).groups == (5, 4)
    assert Rounds(4, 7, 2).groups == (7,)
    assert Rounds(4, 16, 2).groups == (4, 4, 4, 4)


def test_too_few_micro_batches_for_several_rounds_are_refused() -> None:
    with pytest.raises(
        MegaloopError, match="2 rounds over 4 ranks need 4 micro-batches or more per step and replica; there are 3"
    ):
        Rounds(4, 3, 2)
    assert Rounds(4, 3).bubble == pytest.approx(3 / 6), "one round takes any number"
