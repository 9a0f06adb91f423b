"""What the model keeps for its backward pass: bytes of saved tensors, known without building it.

The formulas follow :mod:`megaloop.model.layers` line by line, with the kernels of a GPU: flash attention, which saves
q, k, v, its output and one logsumexp per query and head, never the S x S scores; and a fused RMSNorm, which saves its
input and one number per token. ``tests/plan/test_activations.py`` counts the saved tensors of the real modules on a
CPU. They agree to the byte (within 1% under tensor parallelism), but for what is kept on a CPU besides: of each norm
the normalised input in fp32, and in bf16 the input in fp32 instead of bf16; of grouped heads, keys and values repeated
to all heads.

What is not in here:

- ``train.compile``: the compiler chooses what it keeps, as a rule less.
- fp32 with grouped-query heads on a GPU: no flash kernel takes that, and torch's own keeps S x S scores for every head.
- document masking in bf16 without the flash-attn package: every layer keeps an S x S mask per sample, as in fp32.
- ``selective`` with the flash-attn package, whose output is computed again instead of kept: D less per token and layer.

In the formulas: B samples of a micro-batch, S tokens each, D model, F width of the MLP, N heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaloop.config import Config
from megaloop.runtime.dtype import training_dtype

__all__ = [
    "Activations",
    "element_bytes",
    "head_activations",
    "layer_activations",
    "logits_bytes",
    "mask_bytes",
    "stream_bytes",
]

_FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes that one rank holds of a part of the model, for one micro-batch.

    Attributes:
        kept: from the part's forward pass to its backward pass.
        working: besides, while its backward pass runs. Of a layer: what activation checkpointing computes again, and
            gradients at their most, in the MLP. Of the head: what the loss holds.
    """

    kept: int
    working: int


def layer_activations(config: Config, tp: int) -> Activations:
    """What a layer holds, on one of ``tp`` tensor-parallel ranks.

    Its saved tensors are two inputs of norms (split along the sequence under sequence parallelism), two outputs of
    norms (gathered, always whole), q, k, v and attention's output (the rank's heads), four tensors of the MLP's width
    (gate, silu, up and their product), and in fp32 a number per norm and token and per head and token.
    Its backward pass needs most where the MLP's product is taken apart: three gradients of the MLP's width, when one
    tensor of that width has just been freed. Document masking costs nothing under flash attention; fp32 has no such
    kernel and keeps an S x S mask per sample.
    """
    shape, element = config.model, element_bytes(config)
    tokens = config.train.micro_batch * config.data.sequence_length
    stream = stream_bytes(config, tp)
    whole = tokens * element * shape.hidden_size
    heads = tokens * element * shape.num_heads * shape.head_size // tp
    keys = tokens * element * shape.num_kv_heads * shape.head_size // tp
    wide = tokens * element * shape.ffn_size // tp
    logsumexp = tokens * _FP32 * shape.num_heads // tp
    norms = 2 * tokens * _FP32 // (tp if config.parallel.sequence_parallel else 1)
    mask = mask_bytes(config)

    saved = 2 * stream + 2 * whole + (2 * heads + 2 * keys + logsumexp) + 4 * wide + norms + mask
    gradients = 2 * wide
    if config.train.recompute == "none":
        return Activations(saved, gradients)
    if config.train.recompute == "full":
        return Activations(stream, saved - stream + gradients)
    # the input, attention's output, and the results of all products: q, k, v, both writes to the stream, gate and up
    kept = stream + (2 * heads + 2 * keys + logsumexp) + 2 * whole + 2 * wide
    # once more: both norms, the stream between, rotated q and k, silu and its product with up
    again = norms + 2 * whole + stream + heads + keys + 2 * wide + mask
    return Activations(kept, again + gradients)


def head_activations(config: Config, tp: int, vocab_size: int) -> Activations:
    """What the last norm, the head and the loss hold, without the logits themselves.

    The loss keeps exponentials of all logits in fp32, 13 bytes per token besides, and, where the logits are bf16,
    returns their gradient as one tensor more.
    """
    element = element_bytes(config)
    tokens = config.train.micro_batch * config.data.sequence_length
    norm = tokens * _FP32 // (tp if config.parallel.sequence_parallel else 1)
    normed = tokens * element * config.model.hidden_size
    gradient = 0 if element == _FP32 else logits_bytes(config, tp, vocab_size)
    loss = tokens * (_FP32 * vocab_size // tp + 13)
    return Activations(stream_bytes(config, tp) + normed + norm, loss + gradient)


def stream_bytes(config: Config, tp: int) -> int:
    """The residual stream of a micro-batch between two layers, [B, S, D], or this rank's part of the sequence."""
    tokens = config.train.micro_batch * config.data.sequence_length
    whole = tokens * element_bytes(config) * config.model.hidden_size
    return whole // tp if config.parallel.sequence_parallel else whole


def logits_bytes(config: Config, tp: int, vocab_size: int) -> int:
    """A micro-batch's logits, [B, S, V], this rank's part of the vocabulary."""
    tokens = config.train.micro_batch * config.data.sequence_length
    return tokens * element_bytes(config) * vocab_size // tp


def mask_bytes(config: Config) -> int:
    """A layer's mask of document boundaries, [B, S, S]; none where flash attention takes the boundaries themselves."""
    if not config.model.document_masking or config.train.precision == "bf16":
        return 0
    return config.train.micro_batch * config.data.sequence_length**2 * element_bytes(config)


def element_bytes(config: Config) -> int:
    """Bytes of one element of weights and activations."""
    return training_dtype(config.train.precision).itemsize
