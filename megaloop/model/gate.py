"""What a loop's gate learns: where a token may stop (Ouro, arXiv 2510.25741, section 3).

After iteration t of T the gate gives lambda_t, the probability of stopping there for a token that has come so far. So the
token stops after t with p(t) = lambda_t prod_{j<t} (1 - lambda_j), and after T with what is left: T - 1 decisions.

Shape suffixes: T iterations of the loop, t all but the last; B batch, S sequence, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megaloop.config import GateConfig
from megaloop.depth import LayerCall
from megaloop.model.decoder import DecoderStage, LoopInput
from megaloop.model.tensor_parallel import Labels, token_losses, weighted_mean

__all__ = ["exit_log_probabilities", "gate_loss"]


def gate_loss(
    stage: DecoderStage,
    tokens_BS: Tensor,
    calls: Sequence[LayerCall],
    labels: Labels,
    gate: GateConfig,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """The loss of a gate's training: a mean over tokens, or a sum with the labels' weights, as cross-entropy is.

    Args:
        stage: the whole model, its loop with a gate.
        calls: the executions of its layers.
        gate: ``frozen`` gives :func:`_continuation_loss`, without gradients for anything but the gate; ``joint`` the
            expected loss, :func:`_expected_loss`.
    """
    targets_BS, weights_BS = labels if isinstance(labels, tuple) else (labels, None)
    if gate.train == "joint":
        read = _read_out(stage, tokens_BS, calls, targets_BS, documents_BS)
        return weighted_mean(_expected_loss(stage, read, gate.beta), weights_BS)
    with torch.no_grad():
        read = _read_out(stage, tokens_BS, calls, targets_BS, documents_BS)
    return weighted_mean(_continuation_loss(stage, read, gate.slope, gate.threshold), weights_BS)


def exit_log_probabilities(logits_tBS: Tensor) -> Tensor:
    """log p(t) of stopping after each iteration, [T, B, S], of the gate's logits after all but the last."""
    going_on_tBS = F.logsigmoid(-logits_tBS).cumsum(0)
    reached_TBS = torch.cat([torch.zeros_like(going_on_tBS[:1]), going_on_tBS])
    return torch.cat([reached_TBS[:-1] + F.logsigmoid(logits_tBS), reached_TBS[-1:]])


@dataclass(frozen=True)
class _Readouts:
    """What a model says after each iteration of its loop.

    Attributes:
        losses_TBS: each token's cross-entropy in nats, were the loop to end there: coda, norm and head follow.
        states: T residual streams [B, S, D], as the gate sees them.
    """

    losses_TBS: Tensor
    states: list[Tensor]


def _read_out(
    stage: DecoderStage,
    tokens_BS: Tensor,
    calls: Sequence[LayerCall],
    targets_BS: Tensor,
    documents_BS: Tensor | None,
) -> _Readouts:
    looped = [index for index, call in enumerate(calls) if call.iteration is not None]
    prelude, coda = calls[: looped[0]], calls[looped[-1] + 1 :]
    context = stage.attention_context(tokens_BS.shape[1], 0, documents_BS, tokens_BS.device)
    entry, losses, states = LoopInput(), list[Tensor](), list[Tensor]()
    x_BSD = stage.run(tokens_BS, prelude, first=True, last=False, entry=entry, context=context)
    begin = looped[0]
    for end in (index + 1 for index in looped if calls[index].is_last):
        x_BSD = stage.run(x_BSD, calls[begin:end], first=False, last=False, entry=entry, context=context)
        logits_BSV = stage.run(x_BSD, coda, first=False, last=True, entry=entry, context=context)
        losses.append(token_losses(logits_BSV, targets_BS, stage.tp))
        states.append(x_BSD)
        begin = end
    return _Readouts(torch.stack(losses), states)


def _continuation_loss(stage: DecoderStage, read: _Readouts, slope: float, threshold: float) -> Tensor:
    """Stage 2, the model frozen: binary cross-entropy [B, S] of going on, mean over the T - 1 decisions.

    What iteration t saves, I_t = max(0, loss_{t-1} - loss_t), is known when t has run, but the decision whether it runs is the
    one before: so 1 - lambda_{t-1} learns sigmoid(slope (I_t - threshold)), for t from 2 to T. (Matched with lambda_t instead, a
    gate would learn whether the iteration that it has already paid for was worth it, and lambda_1 would learn nothing.)
    """
    if len(read.states) == 1:
        return 0.0 * stage.gate_logits(
            read.states[0]
        )  # one iteration, drawn: nothing to decide, and a gradient of zeros
    logits_tBS = torch.stack([stage.gate_logits(state) for state in read.states[:-1]])
    saved_tBS = (read.losses_TBS[:-1] - read.losses_TBS[1:]).clamp(min=0)
    going_on_tBS = torch.sigmoid(slope * (saved_tBS - threshold))
    return F.binary_cross_entropy_with_logits(-logits_tBS, going_on_tBS, reduction="none").mean(0)


def _expected_loss(stage: DecoderStage, read: _Readouts, beta: float) -> Tensor:
    """Stage 1, gate and model together: sum_t p(t) loss_t - beta H(p), per token [B, S]; H is the entropy in nats.

    Without H the gate settles early on what is best at first, the last iteration or the first, and the others learn nothing.
    """
    if len(read.states) == 1:
        return read.losses_TBS[0]
    log_p_TBS = exit_log_probabilities(torch.stack([stage.gate_logits(state) for state in read.states[:-1]]))
    return (log_p_TBS.exp() * (read.losses_TBS + beta * log_p_TBS)).sum(0)
