"""Training with nothing but torch, for what megaloop's is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megaloop.config import Config
from megaloop.train.schedule import learning_rate

__all__ = ["plain_steps"]


def plain_steps(
    config: Config, model: nn.Module, decays: Callable[[str], bool], loss_of: Callable[[int], Tensor]
) -> list[float]:
    """The losses of a run whose step has the loss ``loss_of(step)``: AdamW, clipping and learning rate as configured.

    Args:
        decays: whether the parameter of a name has weight decay.
    """
    named, options = dict(model.named_parameters()), config.optimizer
    groups = [
        {"params": [named[name] for name in named if decays(name)], "weight_decay": options.weight_decay},
        {"params": [named[name] for name in named if not decays(name)], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(options.beta1, options.beta2), eps=options.eps)
    found = []
    for step in range(config.train.steps):
        loss = loss_of(step)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), options.clip)
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, options.lr, config.schedule)
        adam.step()
        found.append(float(loss.detach()))
    return found
