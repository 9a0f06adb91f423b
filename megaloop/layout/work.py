"""What each pass of a step is for one pipeline rank: layers, ends, messages and gradients, without torch.

:class:`megaloop.layout.rounds.Rounds` says in which order a rank works; this says what it does each time, for a plan cut
into slices: run layers, pass on what comes where it has none, send, receive, and leave out the backward passes of times of
a loop through which no gradient goes. :mod:`megaloop.parallel.rounds_engine` carries it out, and
``tests/layout/test_work.py`` executes it symbolically on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megaloop.depth import DepthPlan, Use
from megaloop.layout.partition import Slices, slices_for
from megaloop.layout.rounds import Pass, Rounds

__all__ = ["RankWork"]


@dataclass(frozen=True)
class RankWork:
    """A rank's part in one step.

    Attributes:
        rank: of the pipeline.
        rounds: the order of work.
        uses: the executions of layers of the whole plan.
        slices: [start, stop) of them that this rank runs, by round.
        backprop: gradients pass only through the last so many times of the loop; None: all.
        injects: the state that enters the loop is taken up again later.
    """

    rank: int
    rounds: Rounds
    uses: tuple[Use, ...]
    slices: tuple[tuple[int, int], ...]
    backprop: int | None = None
    injects: bool = False

    @classmethod
    def of(
        cls,
        plan: DepthPlan,
        slices: Slices,
        rank: int,
        micro_batches: int,
        *,
        times: int | None = None,
        backprop: int | None = None,
        forward_only: bool = False,
    ) -> RankWork:
        """A rank's part in a step of a plan.

        Args:
            slices: for as many times as the plan says.
            times: how often the loop runs in this step; default: as the plan says.
        """
        if times is not None:
            slices = slices_for(plan, slices, times)
        return cls(
            rank=rank,
            rounds=Rounds(len(slices[0]), micro_batches, len(slices), forward_only=forward_only),
            uses=plan.uses(times),
            slices=tuple(each[rank] for each in slices),
            backprop=backprop,
            injects=plan.style.injection != "none",
        )

    def passes(self) -> Iterator[Pass]:
        """What the rank does, in order."""
        for work in self.rounds.passes(self.rank):
            if not work.backward or self.learns(work):
                yield work

    def begins(self, work: Pass) -> bool:
        """The slice has the embedding."""
        return self.rank == 0 and work.round == 0

    def ends(self, work: Pass) -> bool:
        """The slice has norm, head and loss."""
        return self.rank == self.rounds.ranks - 1 and work.round == self.rounds.rounds - 1

    def uses_of(self, work: Pass) -> tuple[Use, ...]:
        """The layers that the slice runs."""
        return self.uses[slice(*self.slices[work.round])]

    def relays(self, work: Pass) -> bool:
        """The rank has no layer in this round: what comes goes on."""
        return not self.uses_of(work) and not self.begins(work) and not self.ends(work)

    def enters_loop(self, work: Pass) -> bool:
        """The slice begins a loop whose later times take up the state that enters it."""
        return self.injects and any(use.begins and use.time == 0 for use in self.uses_of(work))

    def leaves_loop(self, work: Pass) -> bool:
        """The slice begins the loop's last time, the last to take up the state that entered it."""
        return self.injects and any(use.begins and use.time == (use.times or 1) - 1 for use in self.uses_of(work))

    def learns(self, work: Pass) -> bool:
        """The slice has a backward pass."""
        return self.ends(work) or self._carries(self.slices[work.round][1]) or self.enters_loop(work)

    def receives(self, work: Pass) -> bool:
        """The pass needs something from another rank: a state, or backward its gradient."""
        if work.backward:
            return not self.ends(work) and self._carries(self.slices[work.round][1])
        return not self.begins(work)

    def sends(self, work: Pass) -> bool:
        """The pass makes something for another rank."""
        if work.backward:
            return not self.begins(work) and self._carries(self.slices[work.round][0])
        return not self.ends(work)

    def _carries(self, position: int) -> bool:
        """A gradient comes back to the state before this position: what made it is not frozen."""
        return position == 0 or not self.uses[position - 1].is_frozen(self.backprop)
