"""Many orders of execution over the same tokens: what several of them begin with runs once.

    0 1 2 3 4
    0 1 2 1 2 3 4      after 0 1 2, which the first has run
    0 2 3 4            after 0

Orders are visited sorted, so that each shares with the one before it as much as with any other; of a pass the states are kept
up to where the next one leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from torch import Tensor

from megaloop.depth import LayerCall
from megaloop.model import AttentionContext, Decoder, LoopInput
from megaloop.model.layers import KeyValueCache

__all__ = ["Trail", "Visit", "visits"]


@dataclass(frozen=True)
class Visit:
    """An order's turn.

    Attributes:
        number: of the order, among those that were given.
        shared: so many executions at its beginning are those of the order before it.
        kept: so many are those of the next one.
    """

    number: int
    calls: Sequence[LayerCall]
    shared: int
    kept: int

    @property
    def own(self) -> Sequence[LayerCall]:
        """What has to run."""
        return self.calls[self.shared :]


def visits(orders: Sequence[Sequence[LayerCall]]) -> list[Visit]:
    """All orders, in a sequence in which no beginning runs twice."""
    kinds: dict[LayerCall, int] = {}
    keys = [[kinds.setdefault(call, len(kinds)) for call in calls] for calls in orders]
    turns = sorted(range(len(orders)), key=keys.__getitem__)
    shared = [0, *(_shared(keys[one], keys[other]) for one, other in pairwise(turns)), 0]
    return [Visit(number, orders[number], *shared[turn : turn + 2]) for turn, number in enumerate(turns)]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Trail:
    """Some tokens on their way through one order after another.

    Args:
        tokens_BS: token ids.
        context: positions and mask of the tokens.
    """

    def __init__(self, model: Decoder, tokens_BS: Tensor, context: AttentionContext):
        self._model, self._context = model, context
        x_BSD = model.run(tokens_BS, (), first=True, last=False, context=context)
        self._states = [(x_BSD, LoopInput())]

    def follow(self, visit: Visit, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """The residual stream [B, S, D] that an order leaves, before the last norm; orders come as :func:`visits` has them.

        Args:
            caches: of what the visit itself runs.
        """
        del self._states[visit.shared + 1 :]
        x_BSD, entry = self._states[-1]
        for index, call in enumerate(visit.own):
            entry, cache = LoopInput(entry.state), caches[index : index + 1] if caches is not None else None
            x_BSD = self._model.run(
                x_BSD, [call], caches=cache, first=False, last=False, entry=entry, context=self._context
            )
            if visit.shared + index < visit.kept:
                self._states.append((x_BSD, entry))
        return x_BSD
