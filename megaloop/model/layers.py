"""One layer of the Llama-family decoder of SmolLM v1, from top to bottom as the paper draws it.

Shape suffixes: B batch, S sequence, D model, N query heads, K key-value heads, H head size (h: half of it), T keys.
Inside a tensor-parallel rank N, K and the MLP's width are the rank's share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from spmd_types import rules
from torch import Tensor, nn

from megaloop.config import ModelConfig
from megaloop.model.kernels import Kernels
from megaloop.model.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel

__all__ = [
    "AttentionContext",
    "DecoderLayer",
    "KeyValueCache",
    "LoopAdapter",
    "LoopGate",
    "RMSNorm",
    "rotary_frequencies",
    "rotary_tables",
]


class KeyValueCache:
    """Keys and values of one layer execution for the tokens seen so far, with room for ``max_length``."""

    def __init__(
        self, batch: int, kv_heads: int, max_length: int, head_size: int, dtype: torch.dtype, device: torch.device
    ):
        self.k_BKTH = torch.empty(batch, kv_heads, max_length, head_size, dtype=dtype, device=device)
        self.v_BKTH = torch.empty_like(self.k_BKTH)
        self.length = 0

    def append(self, k_BKSH: Tensor, v_BKSH: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; returns all of them so far."""
        stop = self.length + k_BKSH.shape[2]
        self.k_BKTH[:, :, self.length : stop] = k_BKSH
        self.v_BKTH[:, :, self.length : stop] = v_BKSH
        self.length = stop
        return self.k_BKTH[:, :, :stop], self.v_BKTH[:, :, :stop]


@dataclass
class AttentionContext:
    """What attention needs besides the activations; made once per forward pass, the same for all layers.

    Attributes:
        cos_Sh, sin_Sh: rotary tables of the positions at hand; [B, 1, S, h] where samples differ in them.
        mask_BSS: True where a query may look at a key, for document masking; None: plain causal.
        document_ends: cumulative document lengths over the flattened batch (flash-attn's variable lengths).
        max_document: the longest of them.
    """

    cos_Sh: Tensor
    sin_Sh: Tensor
    mask_BSS: Tensor | None = None
    document_ends: Tensor | None = None
    max_document: int = 0


def rotary_tables(config: ModelConfig, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary position embedding (arXiv 2104.09864), fp32 [length, head_size / 2].

    Dimensions i and i + head_size/2 turn together, as in Hugging Face's Llama.
    """
    frequency_h = rotary_frequencies(config, device)
    angle_Sh = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency_h)
    return angle_Sh.cos(), angle_Sh.sin()


def rotary_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of dimensions, scaled as the configuration says; fp32 [head_size / 2].

    In the order of operations of transformers (``modeling_rope_utils``), so that the values are the same to the last bit.
    """
    exponent_h = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device) / config.head_size
    frequency_h = 1.0 / (config.rope_theta**exponent_h)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency_h
    divided_h = frequency_h / scaling.factor
    if scaling.kind == "linear":
        return divided_h
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length
    assert low is not None  # ModelConfig.check has seen to it
    assert high is not None
    assert original is not None
    wavelength_h = 2 * math.pi / frequency_h
    smooth_h = (original / wavelength_h - low) / (high - low)
    between_h = (1 - smooth_h) * frequency_h / scaling.factor + smooth_h * frequency_h
    slow_h, fast_h = wavelength_h > original / low, wavelength_h < original / high
    return torch.where(slow_h, divided_h, torch.where(fast_h, frequency_h, between_h))


class _Rotate(torch.autograd.Function):
    """Rotate pairs (i, i + H/2) of the last dimension; the gradient rotates back. Keeps nothing but the tables.

    Written out as products and sums autograd would make seven passes over memory and keep four of them.
    """

    @staticmethod
    def spmd_typecheck(*, x_BNSH: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> Any:
        rules.ignore(cos_Sh, sin_Sh)
        return rules.einsum("bnsh->bnsh", x_BNSH)

    @staticmethod
    def forward(ctx: Any, x_BNSH: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> Tensor:
        ctx.save_for_backward(cos_Sh, sin_Sh)
        return _rotated(x_BNSH, cos_Sh, sin_Sh, 1)

    @staticmethod
    def backward(ctx: Any, grad_BNSH: Tensor) -> tuple[Tensor, None, None]:
        cos_Sh, sin_Sh = ctx.saved_tensors
        return _rotated(grad_BNSH, cos_Sh, sin_Sh, -1), None, None


def _rotate(x_BNSH: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> Tensor:
    # without gradients autograd's function would cost as much as the rotation of a token; the compiler cannot ask for the mode
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return _rotated(x_BNSH, cos_Sh, sin_Sh, 1)
    out: Tensor = _Rotate.apply(x_BNSH, cos_Sh, sin_Sh)
    return out


def _rotated(x_BNSH: Tensor, cos_Sh: Tensor, sin_Sh: Tensor, direction: int) -> Tensor:
    first, second = x_BNSH.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # the compiler fuses this, and does not take writes into halves
        turned = second * cos_Sh + first * sin_Sh * direction
        return torch.cat([first * cos_Sh - second * sin_Sh * direction, turned], dim=-1)
    out = torch.empty_like(x_BNSH)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos_Sh, out=out_first).addcmul_(second, sin_Sh, value=-direction)
    torch.mul(second, cos_Sh, out=out_second).addcmul_(first, sin_Sh, value=direction)
    return out


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, with a gain that every rank holds."""

    def __init__(self, size: int, eps: float, tp: TensorParallel, kernels: Kernels):
        super().__init__()
        self.tp = tp
        self.eps = eps
        self.use_apex = kernels.norm == "apex"
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_BSD: Tensor, factor: float = 1.0) -> Tensor:
        """Norm of [B, S, D], times ``factor``.

        The gain takes the factor: D products instead of B x S x D, and the very values that an export holds. In bf16 the gain
        is rounded once more instead of every output.
        """
        weight_D = self.tp.replicated(self.weight)
        if factor != 1.0:
            weight_D = weight_D * factor
        if self.use_apex:
            from apex.normalization import fused_rms_norm_affine

            out: Tensor = fused_rms_norm_affine(x_BSD, weight_D, weight_D.shape, self.eps)
            return out
        return F.rms_norm(x_BSD, weight_D.shape, weight_D, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with rotary positions; heads split over ranks."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Kernels):
        super().__init__()
        self.tp = tp
        self.head_size = config.head_size
        self.use_flash = kernels.attention == "flash-attn"
        heads, kv_heads = config.num_heads * self.head_size, config.num_kv_heads * self.head_size
        tp.split(config.num_kv_heads, "key-value heads")
        self.wq = ColumnParallelLinear(config.hidden_size, heads, tp)
        self.wk = ColumnParallelLinear(config.hidden_size, kv_heads, tp)
        self.wv = ColumnParallelLinear(config.hidden_size, kv_heads, tp)
        self.wo = RowParallelLinear(heads, config.hidden_size, tp)

    def forward(self, x_BSD: Tensor, context: AttentionContext, cache: KeyValueCache | None = None) -> Tensor:
        x_BSD = self.tp.enter(x_BSD)
        q_BNSH, k_BKSH, v_BKSH = (self._heads(w(x_BSD)) for w in (self.wq, self.wk, self.wv))
        q_BNSH = _rotate(q_BNSH, context.cos_Sh, context.sin_Sh)
        k_BKSH = _rotate(k_BKSH, context.cos_Sh, context.sin_Sh)
        if cache is not None:
            k_BKSH, v_BKSH = cache.append(k_BKSH, v_BKSH)
        if self.use_flash and cache is None:
            out_BSD = _flash_attention(q_BNSH, k_BKSH, v_BKSH, context)
        else:
            out_BSD = _sdpa(q_BNSH, k_BKSH, v_BKSH, context).transpose(1, 2).flatten(2)
        return self.wo(out_BSD)

    def _heads(self, x_BSF: Tensor) -> Tensor:
        return x_BSF.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


def _sdpa(q_BNSH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, context: AttentionContext) -> Tensor:
    groups = q_BNSH.shape[1] // k_BKTH.shape[1]
    queries, keys = q_BNSH.shape[2], k_BKTH.shape[2]
    if groups > 1 and (queries == 1 or (queries <= _FEW and queries < keys and context.mask_BSS is not None)):
        return _sdpa_of_few(q_BNSH, k_BKTH, v_BKTH, context.mask_BSS, groups)
    if groups > 1 and q_BNSH.device.type == "cpu":
        # torch's CPU flash kernel has no grouped heads; without this it would fall back to the slow math path
        k_BKTH, v_BKTH = (x.repeat_interleave(groups, dim=1) for x in (k_BKTH, v_BKTH))
        groups = 1
    mask = context.mask_BSS.unsqueeze(1) if context.mask_BSS is not None else None
    if mask is None and 1 < queries < keys:
        # new tokens after cached ones: query i sits at position keys - queries + i
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BNSH.device).tril(keys - queries)
    return F.scaled_dot_product_attention(
        q_BNSH, k_BKTH, v_BKTH, attn_mask=mask, is_causal=mask is None and queries > 1, enable_gqa=groups > 1
    )


_FEW = 16
"""Up to so many new tokens, a mask for each query of a group costs less than keys and values for each."""


def _sdpa_of_few(q_BNSH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, mask_BST: Tensor | None, groups: int) -> Tensor:
    """Few new tokens: the queries of a group look at the same keys as so many tokens would, and no key is copied."""
    count = q_BNSH.shape[2]
    if mask_BST is not None and count > 1:
        mask_BST = mask_BST.repeat(1, groups, 1)
    q_BKRH = q_BNSH.unflatten(1, (-1, groups)).flatten(2, 3)
    mask = None if mask_BST is None else mask_BST.unsqueeze(1)
    out_BKRH = F.scaled_dot_product_attention(q_BKRH, k_BKTH, v_BKTH, attn_mask=mask)
    return out_BKRH.unflatten(2, (groups, count)).flatten(1, 2)


def _flash_attention(q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, context: AttentionContext) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = (x.transpose(1, 2) for x in (q_BNSH, k_BKSH, v_BKSH))
    if context.document_ends is None:
        out: Tensor = flash_attn_func(q, k, v, causal=True)
        return out.flatten(2)
    ends, longest = context.document_ends, context.max_document
    packed = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, longest, longest, causal=True)
    return packed.unflatten(0, q.shape[:2]).flatten(2)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``, width split over ranks."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.w_gate = ColumnParallelLinear(config.hidden_size, config.ffn_size, tp)
        self.w_up = ColumnParallelLinear(config.hidden_size, config.ffn_size, tp)
        self.w_down = RowParallelLinear(config.ffn_size, config.hidden_size, tp)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.tp.enter(x_BSD)
        return self.w_down(F.silu(self.w_gate(x_BSD)) * self.w_up(x_BSD))


class DecoderLayer(nn.Module):
    """Norm, attention, add; norm, MLP, add."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Kernels):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, tp, kernels)
        self.attention = Attention(config, tp, kernels)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, tp, kernels)
        self.mlp = MLP(config, tp)

    def forward(
        self,
        x_BSD: Tensor,
        context: AttentionContext,
        cache: KeyValueCache | None = None,
        scale: float = 1.0,
        norm_factor: float = 1.0,
    ) -> Tensor:
        """Residual stream in, residual stream out; [B, S, D], S split over ranks under sequence parallelism.

        Args:
            scale: factor of what attention and MLP add.
            norm_factor: factor of what the two norms give (:func:`megaloop.model.norm_factors`).
        """
        x_BSD = torch.add(x_BSD, self.attend(x_BSD, context, cache, norm_factor), alpha=scale)
        return torch.add(x_BSD, self.transform(x_BSD, norm_factor), alpha=scale)

    def attend(
        self, x_BSD: Tensor, context: AttentionContext, cache: KeyValueCache | None = None, norm_factor: float = 1.0
    ) -> Tensor:
        """What attention adds to the residual stream, before ``scale``."""
        out: Tensor = self.attention(self.attention_norm(x_BSD, norm_factor), context, cache)
        return out

    def transform(self, x_BSD: Tensor, norm_factor: float = 1.0) -> Tensor:
        """What the MLP adds to the residual stream, before ``scale``."""
        out: Tensor = self.mlp(self.mlp_norm(x_BSD, norm_factor))
        return out


class LoopAdapter(nn.Module):
    """``W [x; e]``: the state of a loop and the state that entered it, made one (arXiv 2502.05171, section 3.1).

    Every tensor-parallel rank holds all of W: the product is small beside a layer's.
    """

    def __init__(self, size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(size, 2 * size))

    def forward(self, x_BSD: Tensor, entered_BSD: Tensor) -> Tensor:
        return F.linear(torch.cat([x_BSD, entered_BSD], dim=-1), self.tp.replicated(self.weight))


class LoopGate(nn.Module):
    """``w . h + b``: how much a token wants to stop after an iteration of the loop (arXiv 2510.25741, section 3).

    Its sigmoid is lambda, the probability of stopping there if it has come so far. In fp32: a bf16 sum over D has too few
    steps between the probabilities that matter. Every tensor-parallel rank holds all of it.
    """

    def __init__(self, size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.zeros(1, size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, h_BSD: Tensor) -> Tensor:
        """Logits [B, S], fp32, of the state [B, S, D] at the end of an iteration."""
        weight_1D, bias_1 = (self.tp.replicated(parameter).float() for parameter in (self.weight, self.bias))
        return F.linear(h_BSD.float(), weight_1D, bias_1).squeeze(-1)
