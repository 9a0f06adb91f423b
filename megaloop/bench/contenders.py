"""The contenders of ``megaloop bench savings``: one configuration, run in nine ways.

All have the same data, seeds, batch, learning rate and recipe; they differ in depth over time, one in its number of steps, and
two have LN-scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megaloop.config import Config, GrowthConfig
from megaloop.depth import DepthPlan, DepthSpec
from megaloop.depth.flops import flops_per_token
from megaloop.depth.schedule import RunFlops, run_flops
from megaloop.errors import MegaloopError
from megaloop.model import Decoder

__all__ = ["CONTENDERS", "contender", "counted_flops", "looped_depth", "looped_parameters_depth", "total_flops"]

_COUNTED_LENGTH = 64
"""Tokens of the sample on which FLOPs are counted."""


def looped_depth(layers: int, block: int) -> DepthSpec:
    """A loop that executes as many layers as an unlooped model has: 24 layers of blocks of 4 become 4-4x4-4.

    The shape of arXiv 2502.17416's middle loops: about two thirds of the executed layers are the looped block.
    """
    iterations = max(round(layers / (1.5 * block)), 2)
    while iterations > 2 and block * iterations > layers:
        iterations -= 1
    outside = layers - block * iterations
    if outside < 0:
        raise MegaloopError(f"bench savings: {layers} layers hold no block of {block} twice; use a deeper model")
    return DepthSpec.looped(outside // 2, block, iterations, outside - outside // 2)


def looped_parameters_depth(layers: int, block: int) -> DepthSpec:
    """A loop with as many parameters as an unlooped model: all its layers, the middle block twice."""
    first = (layers - block) // 2
    return DepthSpec.looped(first, block, 2, layers - block - first)


def _baseline(values: dict[str, Any], config: Config, vocab_size: int) -> None:
    values["growth"] = None


def _matched(values: dict[str, Any], config: Config, vocab_size: int) -> None:
    """Full depth for as many steps as cost what LIDAS costs."""
    steps = _flops(contender(config, "lidas", vocab_size), vocab_size).matched_steps
    values["growth"] = None
    values["train"]["steps"] = steps
    values["schedule"]["warmup_steps"] = min(config.schedule.warmup_steps, steps)


def _growing(operator: str) -> Callable[[dict[str, Any], Config, int], None]:
    def change(values: dict[str, Any], config: Config, vocab_size: int) -> None:
        values["growth"] = {**_growth(config).model_dump(mode="json"), "operator": operator}

    return change


def _looped(values: dict[str, Any], config: Config, vocab_size: int) -> None:
    values["growth"] = None
    values["depth"] = looped_depth(config.plan.layers, _growth(config).block)


def _looped_parameters(values: dict[str, Any], config: Config, vocab_size: int) -> None:
    values["growth"] = None
    values["depth"] = looped_parameters_depth(config.plan.layers, _growth(config).block)


def _grown_then_looped(values: dict[str, Any], config: Config, vocab_size: int) -> None:
    """LIDAS, with the middle block twice from the cooldown on (arXiv 2602.16490: grow first, loop later)."""
    _growing("lidas")(values, config, vocab_size)
    cooldown = config.schedule.cooldown_start(config.train.steps) / config.train.steps
    depth = looped_parameters_depth(config.plan.layers, _growth(config).block)
    values["depth_events"] = [{"at": cooldown, "depth": depth}]


def _scaled(
    change: Callable[[dict[str, Any], Config, int], None],
) -> Callable[[dict[str, Any], Config, int], None]:
    """With LN-scaling (arXiv 2502.05795; a contender of arXiv 2512.08819)."""

    def scaled(values: dict[str, Any], config: Config, vocab_size: int) -> None:
        if config.model.norm_scaling:
            raise MegaloopError(
                "bench savings: model.norm_scaling is set, so that all contenders have it, and lns and lns+lidas would be two of "
                "the others; leave them out of --contenders, or set it to false"
            )
        change(values, config, vocab_size)
        values["model"]["norm_scaling"] = True

    return scaled


def _growth(config: Config) -> GrowthConfig:
    return config.growth or GrowthConfig()


CONTENDERS: dict[str, Callable[[dict[str, Any], Config, int], None]] = {
    "baseline": _baseline,
    "baseline-matched": _matched,
    "midas": _growing("midas"),
    "lidas": _growing("lidas"),
    "looped": _looped,
    "looped-params": _looped_parameters,
    "lidas+loop": _grown_then_looped,
    "lns": _scaled(_baseline),
    "lns+lidas": _scaled(_growing("lidas")),
}
"""What each changes of the values of the full-depth configuration."""


def contender(
    config: Config, name: str, vocab_size: int, *, seed: int | None = None, directory: Path | None = None
) -> Config:
    """The configuration of a contender.

    Args:
        config: the full-depth model, without loops; its growth says how the grown ones get there.
        vocab_size: rows of the embedding.
        seed: of weights and sample order; default: the configuration's.
        directory: of the run.

    Raises:
        MegaloopError: an unknown name, or a configuration that a contender does not fit.
    """
    if name not in CONTENDERS:
        raise MegaloopError(f"bench savings: unknown contender {name!r}; choose from {', '.join(CONTENDERS)}")
    if config.plan.is_looped or config.depth_events:
        raise MegaloopError(
            f"bench savings: depth {config.depth} loops already; give the full-depth model, the contenders loop it"
        )
    values = config.model_dump(mode="json")
    CONTENDERS[name](values, config, vocab_size)
    values["name"] = name if seed is None else f"{name}-seed{seed}"
    values["seed"] = config.seed if seed is None else seed
    values["run_dir"] = None if directory is None else str(directory)
    made = Config.model_validate(values)
    made.check()
    return made


def _flops(config: Config, vocab_size: int) -> RunFlops:
    tokens = config.train.global_batch * config.data.sequence_length
    return run_flops(config.stages, config.model, config.data.sequence_length, tokens, vocab_size=vocab_size)


def total_flops(config: Config, vocab_size: int) -> int:
    """Training FLOPs of a contender."""
    return _flops(config, vocab_size).total


def counted_flops(config: Config, vocab_size: int) -> tuple[int, int]:
    """FLOPs of training on one sample at the run's last depth: as the accountant says, and as torch counts them.

    ``torch.utils.flop_counter`` watches a forward and backward pass with attention written out as products.
    """
    plan: DepthPlan = config.stages[-1].plan
    model = Decoder(config.model, vocab_size, plan)
    model.initialise(0)
    tokens_BS = torch.zeros(1, _COUNTED_LENGTH, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens_BS).sum().backward()
    ours = flops_per_token(plan, config.model, _COUNTED_LENGTH, vocab_size=vocab_size).total * _COUNTED_LENGTH
    return ours, counter.get_total_flops()
