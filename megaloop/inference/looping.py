"""The tokens of a pass that are still in the loop, packed: those that have left cost nothing more.

B rows and S tokens of the pass; b rows and s tokens of those that loop on, M of them whose predictions are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaloop.inference.caches import Place

__all__ = ["Looping"]


@dataclass(frozen=True)
class Looping:
    """Tokens that run the next iteration.

    Attributes:
        index_bs: which token of the pass each is, row * S + column. A row with fewer tokens repeats its last: the repetition
            computes the same, and writes it to the same place.
        real_bs: no repetition.
        asked_bs: its prediction is asked for (and it is no repetition).
        entered_bsD: what entered the loop.
        place: where they stand.
        limits_bs: their thresholds; None: the criterion's own.
        count: tokens, without repetitions.
        is_dense: all are asked for, and none is a repetition.
    """

    index_bs: Tensor
    real_bs: Tensor
    asked_bs: Tensor
    entered_bsD: Tensor
    place: Place
    limits_bs: Tensor | None
    count: int
    is_dense: bool

    @classmethod
    def all(cls, entered_BSD: Tensor, place: Place, asked_BS: Tensor, limits_BS: Tensor | None) -> Looping:
        """All tokens of a pass."""
        index_BS = torch.arange(asked_BS.numel(), device=asked_BS.device).view_as(asked_BS)
        real_BS, dense = torch.ones_like(asked_BS), bool(asked_BS.all())
        return cls(index_BS, real_BS, asked_BS, entered_BSD, place, limits_BS, asked_BS.numel(), dense)

    def asked(self, values_bs: Tensor) -> Tensor:
        """[M, ...] of [b, s, ...]."""
        return values_bs.flatten(0, 1) if self.is_dense else values_bs[self.asked_bs]

    def spread(self, values_M: Tensor) -> Tensor:
        """Booleans [b, s] of [M]; false where none is asked for."""
        if self.is_dense:
            return values_M.view_as(self.asked_bs)
        values_bs = torch.zeros_like(self.asked_bs)
        values_bs[self.asked_bs] = values_M
        return values_bs

    def without(self, left_bs: Tensor, x_bsD: Tensor) -> tuple[Looping, Tensor]:
        """The tokens that have not left, at least one, and their states."""
        stay_bs = self.real_bs & ~left_bs
        counts_b = stay_bs.sum(1)
        rows_b = counts_b.nonzero().flatten()
        counts_b = counts_b[rows_b].unsqueeze(1)
        order_bs = (
            (~stay_bs[rows_b]).to(torch.int8).argsort(dim=1, stable=True)
        )  # those that stay first, in their order
        number_s = torch.arange(int(counts_b.max()), device=x_bsD.device)
        real_bs = number_s < counts_b
        columns_bs = order_bs.gather(1, number_s.expand(len(rows_b), -1).minimum(counts_b - 1))
        at = rows_b.unsqueeze(1), columns_bs
        asked_bs = self.asked_bs[at] & real_bs
        rest = Looping(
            self.index_bs[at],
            real_bs,
            asked_bs,
            self.entered_bsD[at],
            self.place.select(rows_b, columns_bs),
            None if self.limits_bs is None else self.limits_bs[at],
            int(counts_b.sum()),
            bool(asked_bs.all()),
        )
        return rest, x_bsD[at]
