"""The contenders of ``megaloop bench savings``: one configuration, run in thirteen ways.

All have the same data, seeds, batch and recipe, and the same learning rate unless a sweep (:mod:`megaloop.bench.lr_sweep`) gives each its
own; they differ in depth over time, one in its number of steps, and two have LN-scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

__all__ = [
    "CONTENDERS",
    "DEFAULTS",
    "GROWING_AND_LOOPING",
    "REASONING",
    "check_different",
    "contender",
    "counted_flops",
    "looped_depth",
    "looped_full_depth",
    "looped_parameters_depth",
    "total_flops",
]

_COUNTED_LENGTH = 64
"""Tokens of the sample on which FLOPs are counted."""
_LATE = 0.8
"""The fraction of the steps after which ``late-stack`` grows (arXiv 2511.04981: one expansion, at about 80% of a trapezoid)."""


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


def looped_full_depth(layers: int, block: int) -> DepthSpec:
    """One block and nothing else, looped until as many layers run as an unlooped model has: 8 layers of blocks of 2 become 0-2x4-0."""
    if layers % block or layers < 2 * block:
        raise MegaloopError(
            f"bench savings: {layers} layers are not two or more whole blocks of {block}, which looped-full and iso-params take; "
            "choose a growth.block that divides depth, or leave the two out of --contenders"
        )
    return DepthSpec.looped(0, block, layers // block, 0)


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


def _late_stack(values: dict[str, Any], config: Config, vocab_size: int) -> None:
    """The first stage's layers until 80% of the steps, then all of them repeated up to full depth at once (arXiv 2511.04981).

    There, copied layers beat random and zero ones, and the model that grows has one layer or none; ours has ``growth.start``.
    """
    growth, layers, steps = _growth(config), config.plan.layers, config.train.steps
    if layers % growth.start or layers == growth.start:
        raise MegaloopError(
            f"bench savings: late-stack repeats all {growth.start} layers (growth.start) at once, which never makes {layers}; "
            "choose a growth.start that divides depth, or leave late-stack out of --contenders"
        )
    early = round(_LATE * steps)
    values["growth"] = {
        **growth.model_dump(mode="json"),
        "operator": "stack",
        "schedule": [{"steps": early, "layers": growth.start}, {"steps": steps - early, "layers": layers}],
        "end": None,
    }


def _constant(depth: Callable[[int, int], DepthSpec]) -> Callable[[dict[str, Any], Config, int], None]:
    """No growth, and a depth that is made of the full number of layers and the size of a block."""

    def change(values: dict[str, Any], config: Config, vocab_size: int) -> None:
        values["growth"] = None
        values["depth"] = depth(config.plan.layers, _growth(config).block)

    return change


def _unlooped(depth: Callable[[int, int], DepthSpec]) -> Callable[[int, int], DepthSpec]:
    """As many layers as a looped depth has, each run once."""
    return lambda layers, block: DepthSpec.parse(depth(layers, block).layers)


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
    "late-stack": _late_stack,
    "looped": _constant(looped_depth),
    "looped-full": _constant(looped_full_depth),
    "looped-params": _constant(looped_parameters_depth),
    "iso-params": _constant(_unlooped(looped_full_depth)),
    "iso-params-middle": _constant(_unlooped(looped_depth)),
    "lidas+loop": _grown_then_looped,
    "lns": _scaled(_baseline),
    "lns+lidas": _scaled(_growing("lidas")),
}
"""What each changes of the values of the full-depth configuration."""

GROWING_AND_LOOPING = (
    "baseline", "baseline-matched", "midas", "lidas", "looped", "looped-params", "lidas+loop", "lns", "lns+lidas",
)  # fmt: skip
"""The contenders for text: what growing and looping give at the same FLOPs and at the same size."""

REASONING = (
    "baseline", "baseline-matched", "midas", "lidas", "late-stack", "looped", "looped-full", "iso-params", "iso-params-middle",
    "lidas+loop",
)  # fmt: skip
"""The contenders for tasks by difficulty: what loops add to parameters that an unlooped model has too, and growing late or gradually."""


DEFAULTS = {"cpu": GROWING_AND_LOOPING, "gpu": GROWING_AND_LOOPING, "reasoning": REASONING}
"""What each preset trains if nobody chooses; a configuration of one's own is as ``cpu``."""


def contender(
    config: Config,
    name: str,
    vocab_size: int,
    *,
    seed: int | None = None,
    lr: float | None = None,
    label: str | None = None,
    directory: Path | None = None,
) -> Config:
    """The configuration of a contender.

    Args:
        config: the full-depth model, without loops; its growth says how the grown ones get there.
        vocab_size: rows of the embedding.
        seed: of weights and sample order; default: the configuration's.
        lr: its peak learning rate; default: the configuration's.
        label: the run's name; default: the contender's, and the seed where one is given.
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
    values["name"] = label or (name if seed is None else f"{name}-seed{seed}")
    values["seed"] = config.seed if seed is None else seed
    if lr is not None:
        values["optimizer"]["lr"] = lr
    values["run_dir"] = None if directory is None else str(directory)
    made = Config.model_validate(values)
    made.check()
    return made


def check_different(contenders: Mapping[str, Config]) -> None:
    """Whether no two are one run under two names, as the loops are where the model is two blocks deep.

    A report would take their runs for those of one contender, with twice as many seeds.

    Raises:
        MegaloopError: two are.
    """
    seen: dict[str, str] = {}
    for name, config in contenders.items():
        other = seen.setdefault(config.model_copy(update={"name": ""}).model_dump_json(), name)
        if other != name:
            raise MegaloopError(
                f"bench savings: {other} and {name} are the same, of depth {config.depth}; leave one of them out of "
                "--contenders, or change depth or growth.block"
            )


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
