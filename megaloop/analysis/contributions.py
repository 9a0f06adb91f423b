"""What each execution of a layer adds to the residual stream (arXiv 2505.13898, section 3).

h_l is the residual stream that enters layer l, a_l and m_l what attention and MLP add:

* size: |a| / |h|, |m| / |h + a|, |a + m| / |h|;
* direction: cos(a, h), cos(m, h + a), cos(a + m, h): below zero a part takes away from what is there, above zero it adds to it;
* |h|.

Each is a mean over tokens. Denominators are at least 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megaloop.analysis.prompts import PromptBatch
from megaloop.analysis.trace import Trace

__all__ = ["SMALLEST", "STATISTICS", "contributions", "cosine", "relative_change"]

SMALLEST = 1e-6
STATISTICS = (
    "attention_size",
    "mlp_size",
    "layer_size",
    "attention_cosine",
    "mlp_cosine",
    "layer_cosine",
    "residual_norm",
)


def contributions(traced: Trace, batch: PromptBatch) -> Tensor:
    """Sums over the tokens of each prompt of every statistic at every place, fp64 [B, L, 7]; see :data:`STATISTICS`."""
    valid_BS = batch.valid_BS
    found = [
        torch.stack([(value.double() * valid_BS).sum(1) for value in _of_layer(layer.h_BSD, layer.attention_BSD, layer.mlp_BSD)], 1)
        for layer in traced.layers
    ]  # fmt: skip
    return torch.stack(found, 1)


def _of_layer(h: Tensor, attention: Tensor, mlp: Tensor) -> Iterator[Tensor]:
    """In the order of :data:`STATISTICS`, each [B, S]."""
    h, attention, mlp = map(_wide, (h, attention, mlp))
    middle, added = h + attention, attention + mlp
    parts = (attention, h), (mlp, middle), (added, h)
    yield from (_norm(part) / _norm(whole) for part, whole in parts)
    yield from (cosine(part, whole) for part, whole in parts)
    yield h.norm(dim=-1)


def _wide(x: Tensor) -> Tensor:
    """At least fp32: of bf16 a norm or a difference would have three digits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1).clamp(min=SMALLEST)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of the angle between both, over the last dimension."""
    x, y = _wide(x), _wide(y)
    return (x * y).sum(-1) / (_norm(x) * _norm(y))


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """|before - after| / |before| over the last dimension."""
    before, after = _wide(before), _wide(after)
    return (before - after).norm(dim=-1) / _norm(before)
