"""The decoder: all of it on one process, or one pipeline stage of it.

A stage is a run of layer ids, with the embedding before the first and norm and head after the last. The
unpipelined decoder is the stage that holds everything, so both execute the same code and share names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.model.kernels import Kernels
from megaloop.model.layers import AttentionContext, DecoderLayer, KeyValueCache, RMSNorm, rotary_tables
from megaloop.model.parameters import initial_values, parameter_specs
from megaloop.model.tensor_parallel import ColumnParallelLinear, TensorParallel, VocabParallelEmbedding

__all__ = ["Decoder", "DecoderStage", "Recompute"]

Recompute = Literal["none", "full", "selective"]


class DecoderStage(nn.Module):
    """A run of layers, with the decoder's ends where they belong.

    Parameters carry canonical names: ``embedding.weight``, ``layers.<id>.…``, ``norm.weight``, ``head.weight``.

    Args:
        config: shape of the model.
        vocab_size: rows of the embedding.
        order: the layer ids that this stage executes, in order; an id may occur again (a loop).
        first: the stage begins with the embedding and takes token ids.
        last: the stage ends with norm and head and gives logits (this rank's part of the vocabulary).
        tp: the tensor-parallel ranks.
        kernels: which kernels to use.
        recompute: activation checkpointing per layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        order: Sequence[int],
        *,
        first: bool = True,
        last: bool = True,
        tp: TensorParallel | None = None,
        kernels: Kernels | None = None,
        recompute: Recompute = "none",
    ):
        super().__init__()
        self.config = config
        self.order = tuple(order)
        self.first, self.last = first, last
        self.tp = tp or TensorParallel()
        self.recompute = recompute
        kernels = kernels or Kernels()
        self.use_flash = kernels.attention == "flash-attn"
        if first or (last and config.tied_embeddings):
            self.embedding = VocabParallelEmbedding(vocab_size, config.hidden_size, self.tp)
        self.layers = nn.ModuleDict(
            {str(layer_id): DecoderLayer(config, self.tp, kernels) for layer_id in dict.fromkeys(self.order)}
        )
        if last:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, self.tp, kernels)
            if not config.tied_embeddings:
                self.head = ColumnParallelLinear(config.hidden_size, vocab_size, self.tp)
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        x: Tensor,
        documents_BS: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Token ids [B, S] (first stage) or activations [B, S, D] to activations or logits [B, S, V].

        Args:
            documents_BS: index of each token's document within its sample; attention stays inside documents.
            caches: one per executed layer, for generation; x then holds the tokens after the cached ones.
        """
        length = x.shape[1] if self.first or not self.tp.sequence_parallel else x.shape[1] * self.tp.size
        context = self._context(length, caches[0].length if caches else 0, documents_BS, x.device)
        if self.first:
            x = self.embedding(x)
        for position, layer_id in enumerate(self.order):
            layer = self.layers[str(layer_id)]
            if self.recompute != "none" and torch.is_grad_enabled():
                x = self._checkpointed(layer, x, context)
            else:
                x = layer(x, context, caches[position] if caches else None)
        return self._logits(self.norm(x)) if self.last else x

    def _logits(self, x_BSD: Tensor) -> Tensor:
        if self.config.tied_embeddings:
            return self.embedding.logits(x_BSD)
        logits: Tensor = self.head(self.tp.enter(x_BSD))
        return logits

    def _checkpointed(self, layer: nn.Module, x: Tensor, context: AttentionContext) -> Tensor:
        options: dict[str, Any] = {}
        if self.recompute == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        out: Tensor = checkpoint(layer, x, context, use_reentrant=False, **options)
        return out

    def _context(self, length: int, start: int, documents_BS: Tensor | None, device: torch.device) -> AttentionContext:
        dtype = next(self.parameters()).dtype
        key = (length, start, device, dtype)
        if key not in self._tables:
            if start:  # generation asks for another start each time
                self._tables.clear()
            tables = rotary_tables(start + length, self.config.head_size, self.config.rope_theta, device)
            cos_Sh, sin_Sh = (table[start:].to(dtype) for table in tables)
            self._tables[key] = (cos_Sh, sin_Sh)
        context = AttentionContext(*self._tables[key])
        if documents_BS is not None:
            _add_documents(context, documents_BS, self.use_flash)
        return context

    def compile_layers(self) -> None:
        """``torch.compile`` every layer in place; equal layers share the compiled code."""
        for layer in self.layers.values():
            layer.compile()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Decoder(DecoderStage):
    """The whole decoder on one process: the plain reference, and what generates, evaluates and exports."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        plan: DepthPlan,
        *,
        tp: TensorParallel | None = None,
        kernels: Kernels | None = None,
        recompute: Recompute = "none",
    ):
        super().__init__(config, vocab_size, plan.order, tp=tp, kernels=kernels, recompute=recompute)
        self.plan = plan
        self.vocab_size = vocab_size

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill all parameters with the initial values of ``seed`` (see :mod:`megaloop.model.parameters`)."""
        self.fill(lambda name, spec: initial_values(name, spec, seed, (0,) * len(spec.shape), spec.shape))

    @torch.no_grad()
    def fill(self, read: Callable[[str, Any], Tensor]) -> None:
        """Set every parameter to ``read(name, spec)``."""
        specs = parameter_specs(self.config, self.plan, self.vocab_size)
        for name, parameter in self.named_parameters():
            parameter.copy_(read(name, specs[name]))

    def new_caches(self, batch: int, max_length: int) -> list[KeyValueCache]:
        """Empty key-value caches, one per executed layer."""
        parameter = next(self.parameters())
        kv_heads, head_size = self.config.num_kv_heads // self.tp.size, self.config.head_size
        return [
            KeyValueCache(batch, kv_heads, max_length, head_size, parameter.dtype, parameter.device)
            for _ in self.plan.order
        ]


def _add_documents(context: AttentionContext, documents_BS: Tensor, use_flash: bool) -> None:
    """Put the document boundaries into the form that the attention kernel takes."""
    if use_flash:
        batch, length = documents_BS.shape
        first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
        first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
        starts = first_BS.flatten().nonzero().flatten().to(torch.int32)
        context.document_ends = torch.cat([starts, starts.new_tensor([batch * length])])
        context.max_document = int(context.document_ends.diff().max())
        return
    length = documents_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=documents_BS.device).tril()
    context.mask_BSS = causal_SS & (documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1))


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective activation checkpointing: keep what is expensive to compute, recompute the elementwise rest."""
    aten = torch.ops.aten
    expensive = {
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
    return CheckpointPolicy.MUST_SAVE if op in expensive else CheckpointPolicy.PREFER_RECOMPUTE
