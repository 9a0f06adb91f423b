"""How a loop's state changes from one iteration to the next (what arXiv 2502.05171 watches in training and at inference).

x_0 is the state that enters the loop, x_r what the r-th iteration leaves, after the loop's own norm where it has one:

* |x_r|;
* |x_r - x_{r-1}|, and its share |x_r - x_{r-1}| / |x_r|: towards 0 where the loop finds a fixed point;
* cos(x_r, x_{r-1});
* of each token, the mean cosine of its x_r and those of the prompt's other tokens: towards 1 where tokens become the same.

Each is a mean over tokens. Denominators are at least 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megaloop.analysis.contributions import SMALLEST, cosine, relative_change
from megaloop.analysis.prompts import PromptBatch
from megaloop.depth import DepthPlan, LayerCall
from megaloop.errors import MegaloopError
from megaloop.model import Decoder, LoopInput

__all__ = ["MONITORS", "loop_calls", "loop_monitors", "loop_states"]

MONITORS = ("state_norm", "change", "relative_change", "cosine", "token_cosine")


@torch.no_grad()
def loop_monitors(model: Decoder, batch: PromptBatch, iterations: int | None = None) -> Tensor:
    """Sums over the tokens of each prompt of every monitor after every iteration, fp64 [B, R, 5]; see :data:`MONITORS`.

    Args:
        iterations: how often the loop runs; default: as often as the plan says.

    Raises:
        MegaloopError: as :func:`loop_states`.
    """
    states = (x_BSD.double() for x_BSD in loop_states(model, batch, iterations))
    before_BSD, found = next(states), []
    for x_BSD in states:
        values = _of_iteration(before_BSD, x_BSD, batch.valid_BS)
        found.append(torch.stack([(value_BS * batch.valid_BS).sum(1) for value_BS in values], 1))
        before_BSD = x_BSD
    return torch.stack(found, 1)


def _of_iteration(before: Tensor, x: Tensor, valid_BS: Tensor) -> Iterator[Tensor]:
    """In the order of :data:`MONITORS`, each [B, S]."""
    yield x.norm(dim=-1)
    yield (x - before).norm(dim=-1)
    yield relative_change(x, before)
    yield cosine(x, before)
    yield _token_cosine(x, valid_BS)


def _token_cosine(x_BSD: Tensor, valid_BS: Tensor) -> Tensor:
    """The mean cosine with the prompt's other tokens; 0 where there is none. [B, S]"""
    unit_BSD = F.normalize(x_BSD, dim=-1, eps=SMALLEST) * valid_BS.unsqueeze(2)
    others_BSD = unit_BSD.sum(1, keepdim=True) - unit_BSD
    return (unit_BSD * others_BSD).sum(-1) / (valid_BS.sum(1, keepdim=True) - 1).clamp(min=1)


@torch.no_grad()
def loop_states(model: Decoder, batch: PromptBatch, iterations: int | None = None) -> Iterator[Tensor]:
    """x_0, x_1 and so on to the last iteration's, each [B, S, D]; what comes after the loop does not run.

    Raises:
        MegaloopError: the model has not exactly one loop, or is to run it less than once.
    """
    tokens_BS = batch.tokens_BS
    prelude, times = loop_calls(model.plan, iterations)
    context = model.attention_context(tokens_BS.shape[1], 0, batch.documents_BS, tokens_BS.device)
    entry = LoopInput()
    x_BSD = model.run(tokens_BS, prelude, first=True, last=False, context=context)
    yield x_BSD
    for time in times:
        x_BSD = model.run(x_BSD, time, first=False, last=False, entry=entry, context=context)
        yield x_BSD


def loop_calls(plan: DepthPlan, iterations: int | None) -> tuple[list[LayerCall], list[list[LayerCall]]]:
    """What runs before the loop, and in each iteration of it.

    Raises:
        MegaloopError: as :func:`loop_states`.
    """
    loop = plan.loop
    if loop is None:
        raise MegaloopError(
            f"loop monitors: a model of depth {plan} has no loop (or several); "
            "give it one: megaloop loop CKPT --out CKPT2 --depth PRELUDE-BLOCKxITERATIONS-CODA"
        )
    calls = plan.calls(iterations)
    times = [
        list(calls[start : start + loop.block])
        for start in range(loop.start, loop.start + loop.block * (calls[loop.start].iterations or 1), loop.block)
    ]
    return list(calls[: loop.start]), times
