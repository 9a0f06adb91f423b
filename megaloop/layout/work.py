"""What each pass of a step is for one pipeline rank: layers, ends, messages and gradients, without torch.

:class:`megaloop.layout.rounds.Rounds` says in which order a rank works; this says what it does each time, for a plan cut
into slices: run layers, pass on what comes where it has none, send, receive, and leave out the backward passes of times of
a loop through which no gradient goes. :mod:`megaloop.parallel.rounds_engine` carries it out, and
``tests/layout/test_work.py`` executes it symbolically on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megaloop.depth import DepthPlan, LayerCall
from megaloop.layout.partition import StageMap, slices_for
from megaloop.layout.rounds import Action, Rounds

__all__ = ["RankSchedule"]


@dataclass(frozen=True)
class RankSchedule:
    """A rank's part in one step.

    Attributes:
        rank: of the pipeline.
        rounds: the order of work.
        calls: the executions of layers of the whole plan.
        slices: [start, stop) of them that this rank runs, by round.
        backprop: gradients pass only through the last N iterations of the loop; None: all.
        injects: the state that enters the loop is taken up again later.
    """

    rank: int
    rounds: Rounds
    calls: tuple[LayerCall, ...]
    slices: tuple[tuple[int, int], ...]
    backprop: int | None = None
    injects: bool = False

    @classmethod
    def of(
        cls,
        plan: DepthPlan,
        slices: StageMap,
        rank: int,
        micro_batches: int,
        *,
        iterations: int | None = None,
        backprop: int | None = None,
        forward_only: bool = False,
    ) -> RankSchedule:
        """A rank's part in a step of a plan.

        Args:
            slices: for as many times as the plan says.
            iterations: how often the loop runs in this step; default: as the plan says.
        """
        if iterations is not None:
            slices = slices_for(plan, slices, iterations)
        return cls(
            rank=rank,
            rounds=Rounds(len(slices[0]), micro_batches, len(slices), forward_only=forward_only),
            calls=plan.calls(iterations),
            slices=tuple(slice_[rank] for slice_ in slices),
            backprop=backprop,
            injects=plan.style.injection != "none",
        )

    def passes(self) -> Iterator[Action]:
        """What the rank does, in order."""
        for work in self.rounds.passes(self.rank):
            if not work.backward or self.has_backward(work):
                yield work

    def is_first(self, work: Action) -> bool:
        """The slice has the embedding."""
        return self.rank == 0 and work.round == 0

    def is_last(self, work: Action) -> bool:
        """The slice has norm, head and loss."""
        return self.rank == self.rounds.ranks - 1 and work.round == self.rounds.rounds - 1

    def calls_of(self, work: Action) -> tuple[LayerCall, ...]:
        """The layers that the slice runs."""
        return self.calls[slice(*self.slices[work.round])]

    def is_passthrough(self, work: Action) -> bool:
        """The rank has no layer in this round: what comes goes on."""
        return not self.calls_of(work) and not self.is_first(work) and not self.is_last(work)

    def enters_loop(self, work: Action) -> bool:
        """The slice begins a loop whose later times take up the state that enters it."""
        return self.injects and any(call.is_first and call.iteration == 0 for call in self.calls_of(work))

    def leaves_loop(self, work: Action) -> bool:
        """The slice begins the loop's last time, the last to take up the state that entered it."""
        return self.injects and any(
            call.is_first and call.iteration == (call.iterations or 1) - 1 for call in self.calls_of(work)
        )

    def has_backward(self, work: Action) -> bool:
        """The slice has a backward pass."""
        return self.is_last(work) or self._carries(self.slices[work.round][1]) or self.enters_loop(work)

    def receives(self, work: Action) -> bool:
        """The pass needs something from another rank: a state, or backward its gradient."""
        if work.backward:
            return not self.is_last(work) and self._carries(self.slices[work.round][1])
        return not self.is_first(work)

    def sends(self, work: Action) -> bool:
        """The pass makes something for another rank."""
        if work.backward:
            return not self.is_first(work) and self._carries(self.slices[work.round][0])
        return not self.is_last(work)

    def _carries(self, position: int) -> bool:
        """A gradient comes back to the state before this position: what made it is not frozen."""
        return position == 0 or not self.calls[position - 1].is_frozen(self.backprop)
