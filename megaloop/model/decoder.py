"""The decoder: all of it on one process, or one pipeline stage of it.

A stage holds some layers of a plan, with the embedding before the first and norm and head after the last. The
unpipelined decoder is the stage that holds everything, so both execute the same code and share names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, LayerCall
from megaloop.model.kernels import Kernels
from megaloop.model.layers import (
    AttentionContext,
    DecoderLayer,
    KeyValueCache,
    LoopAdapter,
    LoopGate,
    RMSNorm,
    rotary_tables,
)
from megaloop.model.parameters import initial_values, loop_ends, norm_factors, parameter_specs
from megaloop.model.tensor_parallel import ColumnParallelLinear, TensorParallel, VocabParallelEmbedding

__all__ = ["Decoder", "DecoderStage", "LayerFunction", "LoopInput", "Recompute"]

Recompute = Literal["none", "full", "selective"]
LayerFunction = Callable[[LayerCall, DecoderLayer, Tensor, AttentionContext, float, float], Tensor]
"""What stands in for an execution of a layer: the call, its layer, what enters it [B, S, D], positions and mask, and the factors of
:class:`megaloop.model.layers.DecoderLayer` (scale, norm_factor), to what leaves it [B, S, D]."""


@dataclass
class LoopInput:
    """The state with which a micro-batch entered the loop, kept for the times that inject it.

    Attributes:
        state: [B, S, D]; None before the loop, or where nothing is injected.
    """

    state: Tensor | None = None


class DecoderStage(nn.Module):
    """Some layers of a plan, with the decoder's ends where they belong.

    Parameters carry canonical names: ``embedding.weight``, ``layers.<id>.…``, ``norm.weight``, ``head.weight``, and of a
    loop that has them ``loop.adapter.weight`` (with its first layer), ``loop.norm.weight`` and ``loop.gate.…`` (with its last).

    Args:
        config: shape of the model.
        vocab_size: rows of the embedding.
        plan: the whole model's order of layers.
        owned: ids of the layers that the stage holds; default: all.
        first: the stage begins with the embedding and takes token ids.
        last: the stage ends with norm and head and gives logits (this rank's part of the vocabulary).
        tp: the tensor-parallel ranks.
        kernels: which kernels to use.
        recompute: activation checkpointing per layer.

    Attributes:
        backprop: gradients pass only through the last N iterations of the loop; None: through all.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        plan: DepthPlan,
        *,
        owned: Sequence[int] | None = None,
        first: bool = True,
        last: bool = True,
        tp: TensorParallel | None = None,
        kernels: Kernels | None = None,
        recompute: Recompute = "none",
    ):
        super().__init__()
        self.config, self.plan = config, plan
        self.first, self.last = first, last
        self.tp = tp or TensorParallel()
        self.recompute = recompute
        self.backprop: int | None = None
        kernels = kernels or Kernels()
        self.use_flash = kernels.attention == "flash-attn"
        if first or (last and config.tied_embeddings):
            self.embedding = VocabParallelEmbedding(vocab_size, config.hidden_size, self.tp)
        self.layers = nn.ModuleDict(
            {
                str(layer_id): DecoderLayer(config, self.tp, kernels)
                for layer_id in dict.fromkeys(plan.ids if owned is None else owned)
            }
        )
        self._build_loop(kernels)
        if last:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, self.tp, kernels)
            if not config.tied_embeddings:
                self.head = ColumnParallelLinear(config.hidden_size, vocab_size, self.tp)
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self._run_layer: Callable[..., Tensor] = _run_layer

    def _build_loop(self, kernels: Kernels) -> None:
        """What the loop has besides its layers, as far as this stage holds the layer that it belongs to."""
        parts: dict[str, nn.Module] = {}
        first, last = loop_ends(self.plan)
        if self.plan.style.injection == "concat" and str(first) in self.layers:
            parts["adapter"] = LoopAdapter(self.config.hidden_size, self.tp)
        if self.plan.style.norm and str(last) in self.layers:
            parts["norm"] = RMSNorm(self.config.hidden_size, self.config.norm_eps, self.tp, kernels)
        if self.plan.style.gate and str(last) in self.layers:
            parts["gate"] = LoopGate(self.config.hidden_size, self.tp)
        if parts:
            self.loop = nn.ModuleDict(parts)

    def forward(
        self,
        x: Tensor,
        documents_BS: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        calls: Sequence[LayerCall] | None = None,
    ) -> Tensor:
        """Token ids [B, S] (first stage) or activations [B, S, D] to activations or logits [B, S, V].

        Args:
            documents_BS: index of each token's document within its sample; attention stays inside documents.
            caches: one per executed layer, for generation; x then holds the tokens after the cached ones.
            calls: the whole model's executions of layers; default: those of the plan, its loop ``iterations`` times.
        """
        calls = self.plan.calls() if calls is None else calls
        own = [call for call in calls if str(call.layer_id) in self.layers]
        return self.run(x, own, documents_BS, caches, first=self.first, last=self.last)

    def run(
        self,
        x: Tensor,
        calls: Sequence[LayerCall],
        documents_BS: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        *,
        first: bool,
        last: bool,
        entry: LoopInput | None = None,
        context: AttentionContext | None = None,
        execute: LayerFunction | None = None,
    ) -> Tensor:
        """Some uses of the stage's layers, after the embedding if ``first``, before norm and head if ``last``.

        Args:
            entry: what the loop was entered with, where that was in an earlier call; where it is in this one, it is kept there.
            context: positions and mask of the tokens, where they are not simply the next ones.
            execute: stands in for each layer, without caches: what analysis sees and changes of a forward pass.
        """
        if context is None:
            length = x.shape[1] if first or not self.tp.sequence_parallel else x.shape[1] * self.tp.size
            context = self.attention_context(length, caches[0].length if caches else 0, documents_BS, x.device)
        if first:
            x = self.embedding(x)
        entry = entry or LoopInput()
        scaled = self.plan.style.residual_scale != "none"
        factors = norm_factors(self.config, self.plan)
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        for index, call in enumerate(calls):
            if call.is_first and call.iteration == 0 and self.plan.style.injection != "none":
                entry.state = x
            with torch.no_grad() if call.is_frozen(self.backprop) else nullcontext():
                if call.is_first:
                    x = self._inject(x, call, entry)
                layer, cache = self.layers[str(call.layer_id)], caches[index] if caches else None
                scale = 1.0 / call.iterations if scaled and call.iterations is not None else 1.0
                if execute is None:
                    x = self._run_layer(layer, x, context, cache, scale, factors[call.layer_id], recompute)
                else:
                    x = execute(call, cast(DecoderLayer, layer), x, context, scale, factors[call.layer_id])
                if call.is_last and self.plan.style.norm:
                    x = self.loop["norm"](x)
        return self.logits(x) if last else x

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Norm and head of the last stage: what a residual stream [B, S, D] predicts, [B, S, V]."""
        return self._logits(self.norm(x_BSD))

    def gate_logits(self, x_BSD: Tensor) -> Tensor:
        """What the loop's gate says, fp32 [B, S], of the state [B, S, D] after an iteration of the loop (and its norm, if it has one)."""
        logits_BS: Tensor = self.loop["gate"](x_BSD)
        return logits_BS

    def _inject(self, x: Tensor, call: LayerCall, entry: LoopInput) -> Tensor:
        """The state with which an iteration of the loop begins."""
        injection = self.plan.style.injection
        if injection == "none" or (injection == "add" and call.iteration == 0):
            return x
        assert entry.state is not None
        if injection == "add":
            return x + entry.state
        out: Tensor = self.loop["adapter"](x, entry.state)
        return out

    def _logits(self, x_BSD: Tensor) -> Tensor:
        if self.config.tied_embeddings:
            return self.embedding.logits(x_BSD)
        logits: Tensor = self.head(self.tp.enter(x_BSD))
        return logits

    def attention_context(
        self, length: int, start: int, documents_BS: Tensor | None, device: torch.device
    ) -> AttentionContext:
        """Positions ``start`` to ``start + length``, and which of them see which."""
        dtype = next(self.parameters()).dtype
        key = (length, start, device, dtype)
        if key not in self._tables:
            if start:  # generation asks for another start each time
                self._tables.clear()
            tables = rotary_tables(self.config, start + length, device)
            cos_Sh, sin_Sh = (table[start:].to(dtype) for table in tables)
            self._tables[key] = (cos_Sh, sin_Sh)
        context = AttentionContext(*self._tables[key])
        if documents_BS is not None:
            _add_documents(context, documents_BS, self.use_flash)
        return context

    def compile_layers(self) -> None:
        """``torch.compile`` the layers, from now on; equal layers share the compiled code.

        Activation checkpointing is inside of what is compiled: the compiler then divides forward and backward pass by the
        policy's choice. Around it, the policy would not know the products that it is to keep: the compiler renames them.
        """
        self._run_layer = torch.compile(_run_layer)

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
        super().__init__(config, vocab_size, plan, tp=tp, kernels=kernels, recompute=recompute)
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

    def new_caches(self, batch: int, max_length: int, calls: Sequence[LayerCall] | None = None) -> list[KeyValueCache]:
        """Empty key-value caches, one per executed layer; ``calls`` as :meth:`forward`."""
        parameter = next(self.parameters())
        kv_heads, head_size = self.config.num_kv_heads // self.tp.size, self.config.head_size
        return [
            KeyValueCache(batch, kv_heads, max_length, head_size, parameter.dtype, parameter.device)
            for _ in (self.plan.calls() if calls is None else calls)
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


def _run_layer(
    layer: nn.Module,
    x: Tensor,
    context: AttentionContext,
    cache: KeyValueCache | None,
    scale: float,
    norm_factor: float,
    recompute: Recompute,
) -> Tensor:
    """A layer, with activation checkpointing; see :class:`megaloop.model.layers.DecoderLayer` for the arguments."""
    if recompute == "none":
        out: Tensor = layer(x, context, cache, scale, norm_factor)
        return out
    options: dict[str, Any] = {}
    if recompute == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    # nothing in a layer draws random numbers
    arguments = (x, context, cache, scale, norm_factor)
    out = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
    return out


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
