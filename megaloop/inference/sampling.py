"""Which token comes next: the likeliest, or one drawn with a generator of the sequence's own.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling", "sequence_seed"]

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_k: from the k likeliest tokens; 0: all.
        top_p: from the likeliest tokens that together have this probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What is drawn from, fp32 [B, V]; greedy: all on the likeliest."""
        logits_BV = logits_BV.float()
        if self.temperature == 0:
            return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
        # the likeliest at 0: quotients by a temperature near 0 that are too large for fp32 are then all of the others
        logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(self.temperature, _SMALLEST)
        if self.top_k:
            least_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[-1])).values[..., -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
        if self.top_p < 1:
            sorted_BV, order_BV = logits_BV.softmax(-1).sort(dim=-1, descending=True)
            outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= self.top_p
            outside_BV[..., 0] = False
            logits_BV = logits_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), float("-inf"))
        return logits_BV.softmax(-1)

    def choose(self, logits_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """A token for each sequence; a draw depends on its own generator alone."""
        return self.pick(logits_BV if self.temperature == 0 else self.probabilities(logits_BV), generators)

    def pick(self, weights_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """A token for each sequence by weights, such as :meth:`probabilities`, that need not add up to 1."""
        if self.temperature == 0:
            chosen: list[int] = weights_BV.argmax(-1).tolist()
            return chosen
        return draw(weights_BV, generators)


def draw(probabilities_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """One of each row; as ``torch.multinomial`` does: the first of V exponential clocks that rings."""
    waits = [torch.empty_like(probabilities_BV[0]).exponential_(generator=generator) for generator in generators]
    chosen: list[int] = (probabilities_BV / torch.stack(waits)).argmax(-1).tolist()
    return chosen


def sequence_seed(seed: int, number: int) -> int:
    """The seed of a sequence among many: of the first, ``seed`` itself."""
    return (seed + number * 0x9E3779B97F4A7C15) % (1 << 63)
