"""LN-scaling: a factor for each layer's two norms, which follows from the plan alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, grow, loop, unloop, untie, with_inference_loop
from megaloop.model import Decoder, norm_factors, vocab_parallel_cross_entropy
from tests.norm_scaling import counted, scale_outputs

VOCAB = 96
SHAPE = ModelConfig(hidden_size=48, num_heads=6, num_kv_heads=2, ffn_size=80)
SCALED = SHAPE.model_copy(update={"norm_scaling": True})
TOKENS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
PLANS = {
    "plain": (DepthPlan.plain(4), [0, 1, 2, 3]),
    "looped": (DepthPlan.parse("1-2x3-1"), [0, 1, 2, 3]),
    "grown": (grow(DepthPlan.plain(4), "lidas", 6, 2).plan, [0, 1, 2, 4, 5, 3]),
    "grown and looped": (loop(grow(DepthPlan.plain(4), "lidas", 6, 2).plan, 2, 5, 2), [0, 1, 2, 4, 5, 3]),
    "untied": (untie(DepthPlan.parse("1-2x2-1")).plan, [0, 1, 2, 4, 5, 3]),
}
"""Each with its layers by their places, written out."""


def _model(config: ModelConfig, plan: DepthPlan, dtype: torch.dtype = torch.float32) -> Decoder:
    """Initial values, with gains that are not all ones."""
    model = Decoder(config, VOCAB, plan)
    model.initialise(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def _gradients(model: Decoder, logits: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(vocab_parallel_cross_entropy(logits, TOKENS, model.tp), list(model.parameters()))


@pytest.mark.parametrize("name", PLANS)
def test_logits_and_gradients_are_those_of_outputs_times_the_factor(name: str) -> None:
    plan, places = PLANS[name]
    ours, theirs = _model(SCALED, plan, torch.float64), _model(SHAPE, plan, torch.float64)
    unscaled = theirs(TOKENS)
    scale_outputs(theirs, counted(places))
    found, expected = ours(TOKENS), theirs(TOKENS)
    assert torch.allclose(found, expected, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(found, unscaled, atol=1e-2)
    for one, other in zip(_gradients(ours, found), _gradients(theirs, expected), strict=True):
        assert torch.allclose(one, other, atol=1e-12, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("name", "depth"), [("plain", "1-2x3-1"), ("looped", "4"), ("grown", "2-3x2-1")])
def test_a_loop_at_inference_changes_nobodys_factor(name: str, depth: str) -> None:
    plan, places = PLANS[name]
    calls = with_inference_loop(plan, DepthSpec.parse(depth)).calls
    ours, theirs = _model(SCALED, plan), _model(SHAPE, plan)
    scale_outputs(theirs, counted(places))
    assert torch.allclose(ours(TOKENS, calls=calls), theirs(TOKENS, calls=calls), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["grown", "looped"])
def test_a_cache_gives_the_logits_of_the_whole_text(name: str) -> None:
    model = _model(SCALED, PLANS[name][0])
    caches = model.new_caches(2, 24)
    parts = [model(piece, caches=caches) for piece in TOKENS.split([7, 3, *[1] * 14], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(TOKENS), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputation_gives_the_same_bits(dtype: torch.dtype) -> None:
    model = _model(SCALED, PLANS["looped"][0], dtype)
    kept = _gradients(model, model(TOKENS))
    model.recompute = "full"
    assert all(torch.equal(one, other) for one, other in zip(kept, _gradients(model, model(TOKENS)), strict=True))
    model.recompute = "selective"
    assert all(torch.equal(one, other) for one, other in zip(kept, _gradients(model, model(TOKENS)), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is none")
def test_layers_of_all_factors_share_the_compiled_code() -> None:
    """One more than without: the first layer's factor is 1. Code for each factor would end at torch's limit of eight."""
    torch._dynamo.reset()
    model = _model(SCALED, DepthPlan.plain(12))
    logits = model(TOKENS)
    expected = _gradients(model, logits)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.compile_layers()
    found = model(TOKENS)
    assert torch.allclose(found, logits, atol=1e-5)
    for one, other in zip(_gradients(model, found), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2


@st.composite
def plans(draw: st.DrawFn) -> DepthPlan:
    """Grown, looped, untied or moved back, in any number."""
    plan = DepthPlan.plain(draw(st.integers(1, 8)))
    for _ in range(draw(st.integers(0, 4))):
        change = draw(st.sampled_from(["grow", "loop", "unloop", "untie"]))
        if change == "untie" and plan.is_looped:
            plan = untie(plan).plan
        elif change == "unloop":
            plan = unloop(plan)
        elif not plan.is_looped:
            start = draw(st.integers(0, plan.layers - 1))
            stop = draw(st.integers(start + 1, plan.layers))
            if change == "loop":
                plan = loop(plan, start, stop, draw(st.integers(1, 3)))
            elif change == "grow":
                plan = grow(plan, draw(st.sampled_from(["lidas", "last", "random"])), plan.layers + 1, 1).plan
    return plan


@given(plans())
def test_factors_follow_from_places_alone(plan: DepthPlan) -> None:
    factors = norm_factors(SCALED, plan)
    assert list(factors.values()) == pytest.approx([place**-0.5 for place in range(1, plan.layers + 1)])
    assert list(factors) == list(plan.ids)
    assert factors == norm_factors(SCALED, unloop(plan)), "a loop that comes or goes leaves them as they are"
    assert set(norm_factors(SHAPE, plan).values()) == {1.0}
    if plan.is_looped:
        untied = norm_factors(SCALED, untie(plan).plan)
        assert len(untied) == plan.depth
        assert list(untied.values())[: len(factors)] == list(factors.values()), "by place: an untied copy takes its own"
