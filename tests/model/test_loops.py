"""What each option of a loop computes, against the same written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, LoopStyle, reorder, untie
from megaloop.model import Decoder, vocab_parallel_cross_entropy
from tests.loop_styles import STYLES

VOCAB = 96
CONFIG = ModelConfig(hidden_size=48, num_heads=6, num_kv_heads=2, ffn_size=80)
TOKENS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def decoder(depth: str = "1-2x3-1", style: LoopStyle = LoopStyle(), *, disturbed: bool = True) -> Decoder:
    layers = DepthPlan.parse(depth).layers
    model = Decoder(CONFIG, VOCAB, reorder(DepthPlan.plain(layers), DepthSpec.parse(depth), style))
    model.initialise(seed=1)
    if disturbed:  # an adapter that is the identity, and a norm of ones, would hide what they do
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("loop."):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(model: Decoder, style: LoopStyle, iterations: int, *, learning: int | None = None) -> Tensor:
    """Logits of a 1-2xk-1 model."""
    context = model.attention_context(TOKENS.shape[1], 0, None, TOKENS.device)
    layers: list[Any] = [model.layers[str(number)] for number in range(4)]
    first, *middle, last = layers
    loop: Any = getattr(model, "loop", None)
    entered = x = first(model.embedding(TOKENS), context)
    scale = 1 / iterations if style.residual_scale == "1/k" else 1.0
    for iteration in range(iterations):
        if learning is not None and iteration == iterations - learning:
            x = x.detach()
        if style.injection == "add" and iteration > 0:
            x = x + entered
        elif style.injection == "concat":
            x = torch.cat([x, entered], -1) @ loop["adapter"].weight.T
        for layer in middle:
            x = x + scale * layer.attention(layer.attention_norm(x), context)
            x = x + scale * layer.mlp(layer.mlp_norm(x))
        if style.norm:
            x = x * (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).rsqrt() * loop["norm"].weight
    return model.embedding.logits(model.norm(last(x, context)))


@pytest.mark.parametrize("iterations", [None, 1, 2, 5])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_every_option_computes_what_it_says(style: LoopStyle, iterations: int | None) -> None:
    model = decoder(style=style)
    found = model(TOKENS, calls=model.plan.calls(iterations))
    assert torch.allclose(found, by_hand(model, style, iterations or 3), atol=1e-5)


@pytest.mark.parametrize("style", [STYLES[1], STYLES[2], STYLES[5]], ids=str)
def test_gradients_pass_through_the_last_times_only(style: LoopStyle) -> None:
    model = decoder(style=style)
    model.backprop = 2
    found = _gradients(model, model(TOKENS))
    assert _close(found, _gradients(model, by_hand(model, style, 3, learning=2)))
    assert all(gradient.abs().max() > 0 for gradient in found), (
        "what comes before the loop learns through the injection"
    )
    model.backprop = 3
    assert _close(_gradients(model, model(TOKENS)), _gradients(model, by_hand(model, style, 3)))


def _gradients(model: Decoder, logits: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(vocab_parallel_cross_entropy(logits, TOKENS, model.tp), list(model.parameters()))


def _close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_a_new_adapter_begins_as_plain_composition() -> None:
    adapted = decoder(style=LoopStyle(injection="concat"), disturbed=False)
    assert torch.allclose(adapted(TOKENS), decoder()(TOKENS), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("style", [STYLES[0], STYLES[5]], ids=str)
def test_a_cache_gives_the_logits_of_the_whole_text(style: LoopStyle) -> None:
    model = decoder(style=style)
    calls = model.plan.calls(4)
    caches = model.new_caches(2, 24, calls)
    parts = [model(piece, caches=caches, calls=calls) for piece in TOKENS.split([7, 3, *[1] * 14], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(TOKENS, calls=calls), atol=1e-5)


@torch.no_grad()
def test_untying_computes_the_same() -> None:
    looped = decoder()
    growth = untie(looped.plan)
    untied = Decoder(CONFIG, VOCAB, growth.plan)
    values = dict(looped.named_parameters())

    def source(name: str) -> str:
        section, _, rest = name.partition(".")
        layer_id, _, rest = rest.partition(".")
        return f"layers.{growth.source(int(layer_id))}.{rest}" if section == "layers" else name

    untied.fill(lambda name, spec: values[source(name)])
    assert torch.equal(untied(TOKENS), looped(TOKENS))
