"""What a plan costs: parameters and FLOPs of a Llama-family decoder. Pure arithmetic, no torch.

The convention, one for the whole project: a multiply-add counts as 2 FLOPs; only matrix products count
(projections, attention, head), the rest is below 1%; attention counts all S x S scores, causal or not,
and within or across documents; the backward pass is twice the forward. It is the convention of PaLM,
appendix B (arXiv 2204.02311): 6 N + 12 L H Q T, with N the parameters of matrices that multiply
(the head too, the embedding's look-up not). What it gives equals what ``torch.utils.flop_counter`` counts
on the decoder with attention written out as products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from megaloop.depth.plan import DepthPlan, GateTraining

__all__ = ["DecoderShape", "Flops", "flops_per_token", "head_flops", "layer_flops", "layer_parameters", "parameters"]


class DecoderShape(Protocol):
    """The widths of a decoder; ``megaloop.config.ModelConfig`` is one."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def tied_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class Flops:
    """FLOPs of training on one token.

    Attributes:
        forward: the forward pass.
        backward: the backward pass without recomputation.
        recompute: what activation checkpointing computes a second time.
    """

    forward: int
    backward: int
    recompute: int = 0

    @property
    def total(self) -> int:
        """Model FLOPs: forward and backward. The ``flops``, ``tflops`` and ``mfu`` of a run count these."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What the machine really computes: the total and the recomputation."""
        return self.total + self.recompute


def flops_per_token(
    plan: DepthPlan,
    shape: DecoderShape,
    sequence_length: int,
    *,
    vocab_size: int | None = None,
    recompute: Literal["none", "full", "selective"] = "none",
    iterations: int | None = None,
    backprop: int | None = None,
    gate: GateTraining | None = None,
) -> Flops:
    """FLOPs of training on one token of a sequence; a looped layer counts each time it runs.

    Args:
        sequence_length: tokens that attention sees, S.
        vocab_size: rows of the head; default: the shape's.
        recompute: activation checkpointing. ``full`` runs every layer's forward pass once more, up to the MLP's
            last product, whose result no gradient needs (``torch.utils.checkpoint`` stops early there);
            ``selective`` keeps all matrix products and so recomputes nothing that counts.
        iterations: how often the loop runs; default: as the plan says.
        backprop: only the last N iterations of the loop have a backward pass; default: all.
        gate: the loop's gate is trained, so that coda and head run after each iteration. ``frozen``: only the gate has a
            backward pass, half a one, as nothing before it takes a gradient.
    """
    layer = layer_flops(shape, sequence_length)
    head = head_flops(shape, _vocabulary(shape, vocab_size))
    loop = plan.loop
    if loop is None:
        forward, live = plan.depth * layer + head, plan.depth
        return Flops(forward, 2 * forward, _recomputed(live, layer, shape, recompute))
    count = loop.iterations if iterations is None else iterations
    frozen = 0 if backprop is None else max(count - backprop, 0)
    adapter = 4 * shape.hidden_size**2 if plan.style.injection == "concat" else 0
    outside = plan.depth - loop.block * loop.iterations
    once = loop.block * layer + adapter
    if gate is not None:
        coda = plan.depth - loop.stop
        gates = (count - 1) * 2 * shape.hidden_size
        forward = loop.start * layer + count * (once + coda * layer + head) + gates
        if gate == "frozen":
            return Flops(forward, gates)
        live = loop.start + count * (loop.block + coda)
        return Flops(forward, 2 * forward, _recomputed(live, layer, shape, recompute))
    forward, skipped = outside * layer + count * once + head, frozen * once
    live = outside + loop.block * (count - frozen)
    return Flops(forward, 2 * (forward - skipped), _recomputed(live, layer, shape, recompute))


def _recomputed(layers: int, layer: int, shape: DecoderShape, recompute: str) -> int:
    return layers * (layer - 2 * shape.ffn_size * shape.hidden_size) if recompute == "full" else 0


def layer_flops(shape: DecoderShape, sequence_length: int) -> int:
    """FLOPs per token of one layer's forward pass: projections, and scores and values of attention."""
    attention = 2 * 2 * shape.num_heads * shape.head_size * sequence_length
    return 2 * _matrix_parameters(shape) + attention


def head_flops(shape: DecoderShape, vocab_size: int) -> int:
    """FLOPs per token of the head's forward pass."""
    return 2 * shape.hidden_size * vocab_size


def layer_parameters(shape: DecoderShape) -> int:
    """Parameters of one layer: four attention and three MLP matrices, two norms."""
    return _matrix_parameters(shape) + 2 * shape.hidden_size


def parameters(plan: DepthPlan, shape: DecoderShape, *, vocab_size: int | None = None) -> int:
    """Parameters of the decoder: every unique layer once, a tied embedding once, a loop's own adapter, norm and gate."""
    table = _vocabulary(shape, vocab_size) * shape.hidden_size
    ends = table if shape.tied_embeddings else 2 * table
    adapter = 2 * shape.hidden_size**2 if plan.style.injection == "concat" else 0
    norm = shape.hidden_size if plan.style.norm else 0
    gate = shape.hidden_size + 1 if plan.style.gate else 0
    return plan.layers * layer_parameters(shape) + ends + shape.hidden_size + adapter + norm + gate


def _matrix_parameters(shape: DecoderShape) -> int:
    queries_and_output = 2 * shape.num_heads * shape.head_size
    keys_and_values = 2 * shape.num_kv_heads * shape.head_size
    return shape.hidden_size * (queries_and_output + keys_and_values + 3 * shape.ffn_size)


def _vocabulary(shape: DecoderShape, vocab_size: int | None) -> int:
    size = shape.vocab_size if vocab_size is None else vocab_size
    if size is None:
        raise ValueError("the vocabulary's size is not known yet: pass vocab_size")
    return size
