"""What a model would predict if it ended early: logit lens and tuned lens, and what follows from them.

The residual stream that enters layer l goes through norm and head as if it were the last: p_l. There are L + 1 of them, the last of which is
what the model predicts (arXiv 2505.13898, section 3.4; 2602.16490, section 4). The tuned lens (arXiv 2303.08112) puts an affine map before the
norm, one for each place.

* KL(p_l || p_L) and the overlap of the five likeliest tokens: how far the last layers still change the prediction;
* loss and accuracy of p_l where there is a target, and how often its likeliest token is the model's: early exits;
* deep-thinking ratio (arXiv 2602.13517): the share of tokens whose prediction settles late. D_l is the Jensen-Shannon divergence of p_l and p_L (in nats); a
  token settles at the first l by which D has been at most 0.5, and is deep if that is at least ceil(0.85 L).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaloop.analysis.prompts import PromptBatch
from megaloop.analysis.trace import Trace
from megaloop.model import Decoder

__all__ = [
    "AT_TARGETS",
    "AT_TOKENS",
    "DEEP_FROM",
    "SETTLED",
    "LensSums",
    "Translate",
    "lens",
    "log_distribution",
    "settling_layers",
]

AT_TOKENS = ("kl", "overlap", "agreement", "divergence")
"""Means over tokens: KL in nats, shares of 0 to 1, Jensen-Shannon divergence in nats."""
AT_TARGETS = ("loss", "accuracy")
"""Means over targets: nats, a share of 0 to 1."""
SETTLED, DEEP_FROM = 0.5, 0.85
_TOP = 5
_ROWS = 256
"""Positions whose distributions are in memory at once."""
Translate = Callable[[int, Tensor], Tensor]
"""What goes before the norm: the place, and the residual stream there [M, D]."""


@dataclass(frozen=True)
class LensSums:
    """Sums over each prompt of a batch.

    Attributes:
        tokens_BLK: of :data:`AT_TOKENS`, over tokens, fp64 [B, L + 1, 4].
        targets_BLK: of :data:`AT_TARGETS`, over targets, fp64 [B, L + 1, 2].
        deep_B: tokens that settle late.
        token_count_B, target_count_B: how many there are.
    """

    tokens_BLK: Tensor
    targets_BLK: Tensor
    deep_B: Tensor
    token_count_B: Tensor
    target_count_B: Tensor


@torch.no_grad()
def lens(
    model: Decoder, traced: Trace, batch: PromptBatch, vocab_size: int | None = None, translate: Translate | None = None
) -> LensSums:
    """What each residual stream of a trace predicts.

    Args:
        vocab_size: the tokenizer's tokens; others are never among the likeliest. Distributions are over all rows of the head, as training's loss is.
        translate: the tuned lens; the last residual stream goes without.
    """
    row_M, position_M = batch.valid_BS.nonzero(as_tuple=True)
    states = [layer.h_BSD for layer in traced.layers] + [traced.final_BSD]
    rows, places = len(batch.numbers), len(states)
    tokens_BLK = torch.zeros(rows, places, len(AT_TOKENS), dtype=torch.float64)
    targets_BLK = torch.zeros(rows, places, len(AT_TARGETS), dtype=torch.float64)
    deep_B = torch.zeros(rows, dtype=torch.float64)
    for row, position in zip(row_M.split(_ROWS), position_M.split(_ROWS), strict=True):
        target_M = batch.targets_BS[row, position]
        end = _Predicted.of(log_distribution(model, states[-1][row, position]), vocab_size)
        divergences = []
        for place, state in enumerate(states):
            found = end
            if place < len(states) - 1:
                h_MD = state[row, position]
                read_MD = h_MD if translate is None else translate(place, h_MD)
                found = _Predicted.of(log_distribution(model, read_MD), vocab_size)
            at_tokens, loss_M, right_M = _compared(found, end, target_M)
            divergences.append(at_tokens[-1])
            tokens_BLK[:, place].index_add_(0, row.cpu(), torch.stack(at_tokens, 1).double().cpu())
            at_targets = torch.stack([loss_M, right_M], 1).double().cpu()
            targets_BLK[:, place].index_add_(0, row.cpu(), at_targets)
        settled_M = settling_layers(torch.stack(divergences[1:]))
        deep_M = settled_M >= math.ceil(DEEP_FROM * (places - 1))
        deep_B.index_add_(0, row.cpu(), deep_M.double().cpu())
    counts = batch.valid_BS.sum(1).double().cpu(), (batch.targets_BS >= 0).sum(1).double().cpu()
    return LensSums(tokens_BLK, targets_BLK, deep_B, *counts)


def settling_layers(divergences_LM: Tensor, threshold: float = SETTLED) -> Tensor:
    """Of each token, the first layer (from 1 on) by which the divergence from the end has been at most ``threshold``. [M]"""
    lowest_LM = divergences_LM.cummin(0).values
    return (lowest_LM > threshold).sum(0) + 1


def log_distribution(model: Decoder, hidden_MD: Tensor) -> Tensor:
    """Logarithms of the probabilities that norm and head give to the next token, fp32 [M, V]; see :func:`lens`."""
    return model.logits(hidden_MD.unsqueeze(0))[0].float().log_softmax(-1)


@dataclass(frozen=True)
class _Predicted:
    """What some tokens predict: probabilities and their logarithms, and the five likeliest."""

    log_MV: Tensor
    p_MV: Tensor
    top_M5: Tensor

    @classmethod
    def of(cls, log_MV: Tensor, vocab_size: int | None) -> _Predicted:
        return cls(log_MV, log_MV.exp(), log_MV[:, :vocab_size].topk(_TOP, 1).indices)


def _compared(found: _Predicted, end: _Predicted, target_M: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """In the order of :data:`AT_TOKENS`, each [M]; the loss and whether the likeliest is right, 0 where there is no target."""
    middle_MV = torch.logaddexp(found.log_MV, end.log_MV) - math.log(2)
    halves = [(one.p_MV * (one.log_MV - middle_MV)).sum(1) for one in (found, end)]
    at_tokens = [
        (found.p_MV * (found.log_MV - end.log_MV)).sum(1),
        (found.top_M5.unsqueeze(2) == end.top_M5.unsqueeze(1)).any(2).float().mean(1),
        (found.top_M5[:, 0] == end.top_M5[:, 0]).float(),
        (halves[0] + halves[1]) / 2,
    ]
    has_target_M = target_M >= 0
    loss_M = -found.log_MV.gather(1, target_M.clamp(min=0).unsqueeze(1)).squeeze(1)
    return at_tokens, loss_M * has_target_M, (found.top_M5[:, 0] == target_M).float()
