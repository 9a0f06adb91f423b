"""Interventions that are scored: layers skipped, exchanged, reversed, repeated, or an early end, each at every place.

An intervention is another order of execution. Prompts with targets are scored here, questions (reasoning primitives, k-shot) by
:mod:`megaloop.evaluation.scoring`; in both, what several orders of a sweep begin with runs once (:mod:`megaloop.inference.orders`).

Sweeps as in arXiv 2505.13898 and 2602.16490: blocks of 1, 2, 4 and 8 neighbours skipped and exchanged, 4 reversed, every block repeated 1 to 4 times more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megaloop.analysis.edits import Calls, exit_after, repeat, reverse, skip, swap
from megaloop.analysis.prompts import PromptBatch
from megaloop.depth import LayerCall
from megaloop.inference.orders import Trail, visits
from megaloop.model import Decoder

__all__ = ["KINDS", "Intervention", "Kind", "score_targets", "sweep"]

Kind = Literal["skip", "swap", "reverse", "exit", "repeat"]
KINDS: tuple[Kind, ...] = ("skip", "swap", "reverse", "exit", "repeat")
_BLOCKS = (1, 2, 4, 8)
_REVERSED = 4
_MOST_REPEATS = 4
_HEAD_ROWS = 512
"""Positions whose distributions are in memory at once."""


@dataclass(frozen=True)
class Intervention:
    """One change of the order of execution.

    Attributes:
        start: the first place that is concerned; of an exit the number of layers that still run.
        count: layers of the block.
        more: of repeat: how many times more.
    """

    kind: Kind
    start: int
    count: int = 1
    more: int = 0

    @property
    def curve(self) -> str:
        """What it is over all places: "swap 2", "repeat 2 +1", "exit"."""
        if self.kind == "exit":
            return "exit"
        return f"{self.kind} {self.count}" + (f" +{self.more}" if self.kind == "repeat" else "")

    def calls(self, calls: Sequence[LayerCall]) -> Calls:
        """The order of execution with it.

        Raises:
            MegaloopError: there are no such places.
        """
        if self.kind == "exit":
            return exit_after(calls, self.start)
        if self.kind == "repeat":
            return repeat(calls, self.start, self.count, self.more)
        change = {"skip": skip, "swap": swap, "reverse": reverse}[self.kind]
        return change(calls, self.start, self.count)


def sweep(kind: Kind, depth: int, block: int = _REVERSED) -> list[Intervention]:
    """One kind at every place of a model that executes so many layers.

    Args:
        block: layers of a block that is repeated: that of growth or of the loop.
    """
    if kind == "exit":
        return [Intervention("exit", layers) for layers in range(1, depth)]
    if kind == "reverse":
        count = min(_REVERSED, depth)
        return [Intervention("reverse", start, count) for start in range(depth - count + 1)]
    if kind == "repeat":
        return [
            Intervention("repeat", start, block, more)
            for more in range(1, _MOST_REPEATS + 1)
            for start in range(depth - block + 1)
        ]
    span = 2 if kind == "swap" else 1
    return [
        Intervention(kind, start, count)
        for count in _BLOCKS
        for start in range(depth - span * count + 1)
        if span * count < depth or kind == "swap"
    ]


@torch.no_grad()
def score_targets(model: Decoder, batch: PromptBatch, orders: Sequence[Calls], vocab_size: int | None = None) -> Tensor:
    """Loss (nats) and correct predictions in each order of execution, summed over the targets of each prompt: fp64 [B, orders, 2]."""
    context = model.attention_context(batch.tokens_BS.shape[1], 0, batch.documents_BS, batch.tokens_BS.device)
    trail = Trail(model, batch.tokens_BS, context)
    found = {one.number: _score(model, trail.follow(one), batch, vocab_size) for one in visits(orders)}
    return torch.stack([found[number] for number in range(len(orders))], 1)


def _score(model: Decoder, final_BSD: Tensor, batch: PromptBatch, vocab_size: int | None) -> Tensor:
    row_M, position_M = (batch.targets_BS >= 0).nonzero(as_tuple=True)
    sums_B2 = torch.zeros(len(batch.numbers), 2, dtype=torch.float64)
    for row, position in zip(row_M.split(_HEAD_ROWS), position_M.split(_HEAD_ROWS), strict=True):
        target_M = batch.targets_BS[row, position]
        logits_MV = model.logits(final_BSD[row, position].unsqueeze(0))[0].float()
        loss_M = cross_entropy(logits_MV, target_M, reduction="none")
        right_M = logits_MV[:, :vocab_size].argmax(1) == target_M
        sums_B2.index_add_(0, row.cpu(), torch.stack([loss_M.double(), right_M.double()], 1).cpu())
    return sums_B2
