"""Rounds: in which order each pipeline rank works on which micro-batch, as a value that can be checked and drawn.

Micro-batches go round the ring of pipeline ranks ``rounds`` times, through one slice of layers per rank and round
(interleaved 1F1B: Narayanan et al., arXiv 2104.04473, section 2.2). One round is plain 1F1B, the order in which
DeepSpeed's engine works. More rounds shrink the bubble: a rank waits (P-1) / (m v + P-1) of a step.

Megatron's schedule takes micro-batches in groups of P and so needs m to be a multiple of P. Groups may be larger than P,
and of different sizes, without a stall: the first micro-batch of a group is back at the first rank P passes after it
left, and the rank has at least that many others to work on meanwhile. So any m of at least P works, cut into groups of
P or more.

Nothing here knows of torch or of ranks that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megaloop.errors import MegaloopError

__all__ = ["Action", "Rounds", "Span"]


@dataclass(frozen=True)
class Action:
    """A micro-batch's way through one rank's slice of one round, forward or backward."""

    backward: bool
    round: int
    micro_batch: int


@dataclass(frozen=True)
class Span:
    """A pass with the time from which and until which it runs."""

    work: Action
    start: float
    stop: float


@dataclass(frozen=True)
class Rounds:
    """The work of one optimizer step on a pipeline.

    Attributes:
        ranks: pipeline ranks, P.
        micro_batches: per step, m; at least P where there are several rounds.
        rounds: times that each micro-batch goes round, v.
        forward_only: no backward passes (then any m will do).

    Raises:
        MegaloopError: too few micro-batches.
    """

    ranks: int
    micro_batches: int
    rounds: int = 1
    forward_only: bool = False

    def __post_init__(self) -> None:
        if self.rounds > 1 and self.micro_batches < self.ranks and not self.forward_only:
            raise MegaloopError(
                f"pipeline: {self.rounds} rounds over {self.ranks} ranks need {self.ranks} micro-batches or more per step "
                f"and replica; there are {self.micro_batches}: raise train.global_batch, or lower train.micro_batch or pp"
            )

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """How many micro-batches go round together: sizes of at least P, as equal as can be."""
        count = max(self.micro_batches // self.ranks, 1)
        size, larger = divmod(self.micro_batches, count)
        return tuple(size + (index < larger) for index in range(count))

    @cached_property
    def window(self) -> int:
        """Messages of a direction that a rank holds until they have arrived: before another it waits for the oldest.

        Few where there is one round. Where micro-batches go round the ring, a rank sends a whole group before it takes up what
        comes back of it: with fewer, ranks may wait for each other in a circle (tests/layout/test_work.py executes it).
        """
        return 2 if self.rounds == 1 else max(self.groups)

    def beginning(self, passes: int = 40_000) -> Rounds:
        """The same schedule with fewer micro-batches, so that all ranks together do about ``passes`` passes.

        It begins with the same work in the same order, fills the pipeline, works steadily for a while and ends: as many slices
        are in flight at a time. Itself, where it is no longer than that, or where groups of other sizes would come of it.
        """
        count = max(self.micro_batches // self.ranks, 1)
        size, larger = divmod(self.micro_batches, count)
        fewer = max(passes // (2 * self.ranks * self.rounds * size), 3)
        if fewer >= count:
            return self
        short = replace(self, micro_batches=fewer * size + (larger > 0))
        return short if short.groups[0] == size + (larger > 0) else self

    def passes(self, rank: int) -> tuple[Action, ...]:
        """What a rank does, in order: forward passes to warm up, then one forward and one backward in turn, then the rest."""
        forward, backward = tuple(self._sorted(False)), tuple(self._sorted(True))
        if self.forward_only:
            return forward
        warm_up = self.ranks - rank - 1
        if self.rounds > 1:
            warm_up = 2 * warm_up + (self.rounds - 1) * self.groups[0]
        warm_up = min(warm_up, len(forward))
        steady = len(forward) - warm_up
        turns = [action for pair in zip(forward[warm_up:], backward[:steady], strict=True) for action in pair]
        return (*forward[:warm_up], *turns, *backward[steady:])

    def _sorted(self, backward: bool) -> Iterator[Action]:
        """All passes of one direction in the order in which every rank does them: by group, round, micro-batch."""
        first = 0
        for size in self.groups:
            for number in range(self.rounds):
                for micro_batch in range(first, first + size):
                    yield Action(backward, self.rounds - 1 - number if backward else number, micro_batch)
            first += size

    def needs(self, rank: int, work: Action) -> tuple[int, Action] | None:
        """Whose result a pass needs: (rank, pass), or None for the first of all."""
        last = self.ranks - 1
        if not work.backward:
            if rank > 0:
                return rank - 1, work
            return None if work.round == 0 else (last, Action(False, work.round - 1, work.micro_batch))
        if rank < last:
            return rank + 1, work
        if work.round == self.rounds - 1:
            return last, Action(False, work.round, work.micro_batch)
        return 0, Action(True, work.round + 1, work.micro_batch)

    @property
    def bubble(self) -> float:
        """Fraction of a step that a rank waits, where all slices take equally long."""
        return (self.ranks - 1) / (self.micro_batches * self.rounds + self.ranks - 1)

    def timeline(self, seconds: Callable[[int, Action], float]) -> tuple[tuple[Span, ...], ...]:
        """When each rank does what, if messages take no time.

        Args:
            seconds: of a pass on a rank.

        Returns:
            Spans by rank, in order.
        """
        orders = [self.passes(rank) for rank in range(self.ranks)]
        spans: list[list[Span]] = [[] for _ in orders]
        done: dict[tuple[int, Action], float] = {}
        waiting = list(range(self.ranks))
        while waiting:
            moved = False
            for rank in list(waiting):
                while len(spans[rank]) < len(orders[rank]):
                    work = orders[rank][len(spans[rank])]
                    source = self.needs(rank, work)
                    if source is not None and source not in done:
                        break
                    free = spans[rank][-1].stop if spans[rank] else 0.0
                    start = max(free, done[source] if source is not None else 0.0)
                    spans[rank].append(Span(work, start, start + seconds(rank, work)))
                    done[rank, work] = spans[rank][-1].stop
                    moved = True
                else:
                    waiting.remove(rank)
                    moved = True
            if not moved:
                raise RuntimeError(f"ranks {waiting} wait for each other")
        return tuple(map(tuple, spans))
