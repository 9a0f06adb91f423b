"""A Llama with a loop, for transformers: some of its layers run ``num_loops`` times with the same weights.

``megaloop export --keep-loop`` puts this file beside the weights; ``AutoModelForCausalLM.from_pretrained(DIR,
trust_remote_code=True)`` loads both, and ``from_pretrained(DIR, num_loops=3, trust_remote_code=True)`` loops as often as that.
It stands alone: torch and transformers are all that it imports.

The layers are prelude, recurrent block and coda; the block is what runs several times. A *call* is one execution of a layer. The
key-value cache has an entry for each call, so a looped layer has as many as there are loops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaPreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.versions import require_version

__all__ = ["MegaloopConfig", "MegaloopForCausalLM", "MegaloopModel"]

# what a Llama's parts are given changes between versions: transformers 5 calls the cache by another name
require_version(
    "transformers>=4.57,<5", "Install such a version to run this model: pip install 'transformers>=4.57,<5'"
)


class MegaloopConfig(LlamaConfig):
    """Settings of a Llama, and those of its loop.

    Args:
        num_loops: how often the recurrent block runs; may be changed at any time.
        num_prelude_layers, num_recurrent_layers, num_coda_layers: layers before, in and after the loop.
        loop_injection: what becomes of the state that entered the loop. ``none``; ``add``: it is added at the beginning of each
            iteration but the first (arXiv 2409.15647); ``concat``: at the beginning of each iteration a linear adapter makes it
            and the current state into one (arXiv 2502.05171).
        loop_residual_scale: ``none``; ``1/k``: what looped layers add to the residual stream is divided by ``num_loops``
            (arXiv 2606.18524).
        loop_norm: an RMSNorm at the end of each iteration (arXiv 2502.05171).

    Attributes:
        num_hidden_layers: calls of layers, which is how many entries a cache needs. It follows from the others.
    """

    model_type = "megaloop"

    def __init__(
        self,
        num_loops: int = 2,
        num_prelude_layers: int = 1,
        num_recurrent_layers: int = 2,
        num_coda_layers: int = 1,
        loop_injection: str = "none",
        loop_residual_scale: str = "none",
        loop_norm: bool = False,
        **settings: Any,
    ):
        super().__init__(**settings)
        self.num_prelude_layers = num_prelude_layers
        self.num_recurrent_layers = num_recurrent_layers
        self.num_coda_layers = num_coda_layers
        self.loop_injection = _one_of(loop_injection, "loop_injection", ("none", "add", "concat"))
        self.loop_residual_scale = _one_of(loop_residual_scale, "loop_residual_scale", ("none", "1/k"))
        self.loop_norm = loop_norm
        self.num_loops = num_loops

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "num_loops":
            if type(value) is not int or value < 1:
                raise ValueError(f"num_loops is {value!r}; expected a whole number from 1 on")
            outside = self.num_prelude_layers + self.num_coda_layers
            self.num_hidden_layers = outside + self.num_recurrent_layers * value
        super().__setattr__(name, value)


def _one_of(value: str, name: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    return value


class _CallCache:
    """The entry of one call in a cache, for an attention that would look for that of its layer."""

    def __init__(self, cache: Cache, call: int):
        self.cache, self.call = cache, call

    def update(self, keys: torch.Tensor, values: torch.Tensor, _layer: int, *options: Any, **named: Any) -> Any:
        return self.cache.update(keys, values, self.call, *options, **named)


class MegaloopDecoderLayer(GradientCheckpointingLayer):
    """Norm, attention, add; norm, MLP, add."""

    def __init__(self, config: MegaloopConfig, place: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, place)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        scale: float,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any,
        past_key_values: _CallCache | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Residual stream [batch, tokens, hidden] in and out; ``scale``: factor of what attention and MLP add."""
        # in order, not by name: transformers has called the cache of an attention by two names
        added, _ = self.self_attn(
            self.input_layernorm(x), position_embeddings, attention_mask, past_key_values, **options
        )
        x = torch.add(x, added, alpha=scale)
        return torch.add(x, self.mlp(self.post_attention_layernorm(x)), alpha=scale)


class MegaloopPreTrainedModel(LlamaPreTrainedModel):
    config_class = MegaloopConfig
    _no_split_modules = ["MegaloopDecoderLayer"]  # noqa: RUF012 - as transformers has it


class MegaloopModel(MegaloopPreTrainedModel):
    """Embedding, layers and norm; each layer's weights are there once."""

    def __init__(self, config: MegaloopConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = config.num_prelude_layers + config.num_recurrent_layers + config.num_coda_layers
        self.layers = nn.ModuleList(MegaloopDecoderLayer(config, place) for place in range(layers))
        if config.loop_injection == "concat":
            self.loop_adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        if config.loop_norm:
            self.loop_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_position: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """As that of ``LlamaModel``; with ``output_hidden_states`` what entered each call, and what the norm gave."""
        if options.get("output_attentions"):
            raise ValueError("output_attentions: a looped model does not return the weights of its attention")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if cache_position is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(seen, seen + x.shape[1], device=x.device)
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        mask = create_causal_mask(
            config=self.config, input_embeds=x, attention_mask=attention_mask, cache_position=cache_position,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        context = {
            "position_embeddings": self.rotary_emb(x, position_ids),
            "attention_mask": mask,
            "position_ids": position_ids,
            "cache_position": cache_position,
            **options,
        }
        states: list[torch.Tensor] | None = [] if output_hidden_states else None
        x = self.norm(self._run(x, past_key_values, context, states))
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=None if states is None else (*states, x),
        )

    def _run(
        self, x: torch.Tensor, cache: Cache | None, context: dict[str, Any], states: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """The calls of all layers in order; ``states`` is given what enters each."""
        config = self.config
        first, stop = config.num_prelude_layers, config.num_prelude_layers + config.num_recurrent_layers
        scale = 1.0 / config.num_loops if config.loop_residual_scale == "1/k" else 1.0
        order = [*range(first), *[*range(first, stop)] * config.num_loops, *range(stop, len(self.layers))]
        entered = x
        for call, place in enumerate(order):
            if call == first:
                entered = x
            if place == first:
                x = self._inject(x, entered, call == first)
            if states is not None:
                states.append(x)
            own = None if cache is None else _CallCache(cache, call)
            x = self.layers[place](x, scale if first <= place < stop else 1.0, past_key_values=own, **context)
            if place == stop - 1 and config.loop_norm:
                x = self.loop_norm(x)
        return x

    def _inject(self, x: torch.Tensor, entered: torch.Tensor, is_first: bool) -> torch.Tensor:
        """The state with which an iteration begins, of the current one and that with which the loop was entered."""
        if self.config.loop_injection == "concat":
            return self.loop_adapter(torch.cat([x, entered], dim=-1))
        return x + entered if self.config.loop_injection == "add" and not is_first else x


class MegaloopForCausalLM(LlamaForCausalLM):
    """:class:`MegaloopModel` and the head: ``generate``, losses and the rest are those of ``LlamaForCausalLM``."""

    config_class = MegaloopConfig
    _no_split_modules = MegaloopPreTrainedModel._no_split_modules

    def __init__(self, config: MegaloopConfig):
        super(LlamaForCausalLM, self).__init__(config)  # not its own, which would build a Llama
        self.model = MegaloopModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
