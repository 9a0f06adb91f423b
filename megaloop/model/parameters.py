"""Names, shapes and first values of a decoder's parameters, known without building it.

Initial values are a function of (seed, parameter name, global index), so that every topology starts from
the same weights: each rank computes just the box that it holds.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, Growth

__all__ = [
    "LOOP_ADAPTER",
    "LOOP_GATE",
    "LOOP_NORM",
    "ParameterSpec",
    "grown_from",
    "initial_values",
    "loop_ends",
    "norm_factors",
    "parameter_specs",
]

LOOP_ADAPTER, LOOP_NORM = "loop.adapter.weight", "loop.norm.weight"
LOOP_GATE = "loop.gate.weight", "loop.gate.bias"
"""What a loop may have besides its layers (:class:`megaloop.depth.LoopStyle`)."""


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the whole model.

    Attributes:
        shape: of the whole parameter.
        shard_dim: the dimension that tensor parallelism splits; None: every rank holds all of it.
        init_std: standard deviation of the initial values (0: zeros); None: ones (a norm's gain), or the identity.
        decay: AdamW's weight decay applies (matrices; not norms, not embeddings).
        identity: the initial values are ones where row and column are the same, zeros elsewhere.
    """

    shape: tuple[int, ...]
    shard_dim: int | None
    init_std: float | None
    decay: bool
    identity: bool = False


def parameter_specs(config: ModelConfig, plan: DepthPlan, vocab_size: int) -> dict[str, ParameterSpec]:
    """Every parameter by canonical name, in order of execution; a looped layer occurs once.

    The two matrices that write to the residual stream start as small as the others: SmolLM v1 scales none by depth.
    A loop's adapter begins by passing its state on as it is: a loop put into a trained model starts as plain composition.
    Weight decay would pull it from there towards nothing, so it has none. A gate begins undecided: zeros, a half everywhere.
    """
    hidden, ffn = config.hidden_size, config.ffn_size
    heads, kv_heads = config.num_heads * config.head_size, config.num_kv_heads * config.head_size

    def matrix(rows: int, columns: int, shard_dim: int) -> ParameterSpec:
        return ParameterSpec((rows, columns), shard_dim, config.init_std, decay=True)

    norm = ParameterSpec((hidden,), None, None, decay=False)
    layer = {
        "attention_norm.weight": norm,
        "attention.wq.weight": matrix(heads, hidden, 0),
        "attention.wk.weight": matrix(kv_heads, hidden, 0),
        "attention.wv.weight": matrix(kv_heads, hidden, 0),
        "attention.wo.weight": matrix(hidden, heads, 1),
        "mlp_norm.weight": norm,
        "mlp.w_gate.weight": matrix(ffn, hidden, 0),
        "mlp.w_up.weight": matrix(ffn, hidden, 0),
        "mlp.w_down.weight": matrix(hidden, ffn, 1),
    }
    specs = {"embedding.weight": ParameterSpec((vocab_size, hidden), 0, config.init_std, decay=False)}
    for layer_id in plan.ids:
        specs |= {f"layers.{layer_id}.{name}": spec for name, spec in layer.items()}
    if plan.style.injection == "concat":
        specs[LOOP_ADAPTER] = ParameterSpec((hidden, 2 * hidden), None, None, decay=False, identity=True)
    if plan.style.norm:
        specs[LOOP_NORM] = norm
    if plan.style.gate:
        specs |= {
            name: ParameterSpec(shape, None, 0.0, False)
            for name, shape in zip(LOOP_GATE, ((1, hidden), (1,)), strict=True)
        }
    specs["norm.weight"] = norm
    if not config.tied_embeddings:
        specs["head.weight"] = matrix(vocab_size, hidden, 0)
    return specs


def norm_factors(config: ModelConfig, plan: DepthPlan) -> dict[int, float]:
    """By layer id, what the outputs of a layer's two norms are multiplied by: LN-scaling (arXiv 2502.05795, section 4).

    1/sqrt(l) of the l-th unique layer of the plan, counted from 1; a looped layer has one factor in all its iterations. A
    function of the plan alone: after a growth each layer has that of its new place, wherever the growth happened.
    """
    if not config.norm_scaling:
        return dict.fromkeys(plan.ids, 1.0)
    return {layer_id: 1.0 / math.sqrt(place) for place, layer_id in enumerate(plan.ids, start=1)}


def loop_ends(plan: DepthPlan) -> tuple[int | None, int | None]:
    """Ids of the first and the last looped layer, which a loop's adapter, and its norm and gate, go along with; None without a loop."""
    if plan.loop is None:
        return None, None
    return plan.order[plan.loop.start], plan.order[plan.loop.start + plan.loop.block - 1]


def grown_from(name: str, growth: Growth) -> str | None:
    """The parameter of the plan before whose state a parameter takes in a growth; None: fresh values."""
    section, _, rest = name.partition(".")
    if (section == "loop" and growth.new_loop) or (name in LOOP_GATE and growth.new_gate):
        return None
    if section != "layers":
        return name
    layer_id, _, rest = rest.partition(".")
    source = growth.source(int(layer_id))
    return None if source is None else f"layers.{source}.{rest}"


def initial_values(
    name: str, spec: ParameterSpec, seed: int, offset: tuple[int, ...], shape: tuple[int, ...]
) -> Tensor:
    """First values of a box of a parameter, fp32 on the CPU.

    Element i (row-major, of the whole parameter) is a normal number made from the i-th 64-bit word of a
    Philox stream (Salmon et al., SC 2011) keyed by seed and name: any box can be computed alone.

    Args:
        offset, shape: the box.
    """
    if spec.identity:
        return torch.eye(*spec.shape)[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]
    if not spec.init_std:
        return torch.ones(shape) if spec.init_std is None else torch.zeros(shape)
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    columns = spec.shape[-1]
    rows = range(offset[0], offset[0] + shape[0]) if len(shape) == 2 else range(1)
    first, last = rows.start * columns, rows.stop * columns
    stream = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64))
    skip = first % 4  # Philox counts in blocks of four words
    stream.advance(first // 4)
    words = stream.random_raw(last - first + skip)[skip:].reshape(len(rows), columns)
    words = words[:, offset[-1] : offset[-1] + shape[-1]]
    uniform = torch.from_numpy((words >> np.uint64(11)).astype(np.float64)).add_(0.5).mul_(2.0**-53)
    normal = torch.erfinv(uniform.mul_(2).sub_(1)).mul_(math.sqrt(2) * spec.init_std)
    return normal.float().reshape(shape)
