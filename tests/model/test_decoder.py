"""The decoder: the same numbers with a cache, under recomputation, with documents, and as transformers."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.model import Decoder, TensorParallel, initial_values, parameter_specs, vocab_parallel_cross_entropy
from megaloop.model.decoder import Recompute

VOCAB = 96
SHAPE = {"hidden_size": 48, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 80}


def _decoder(depth: str = "3", **changes: object) -> Decoder:
    model = Decoder(ModelConfig.model_validate(SHAPE | changes), VOCAB, DepthPlan.parse(depth))
    model.initialise(seed=1)
    return model


def _tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth", ["3", "1-2x2-0"])
@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_text(depth: str) -> None:
    model, tokens = _decoder(depth), _tokens()
    caches = model.new_caches(2, 24)
    parts = [model(piece, caches=caches) for piece in tokens.split([7, 3, *[1] * 14], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(tokens), atol=1e-5)


@torch.no_grad()
def test_document_masking_isolates_documents() -> None:
    """Logits of the second document are those of its tokens alone, up to the positions' shift, which RoPE ignores."""
    model, tokens = _decoder(document_masking=True), _tokens(1)
    documents = torch.tensor([[0] * 10 + [1] * 14])
    masked = model(tokens, documents)
    assert torch.allclose(masked[:, :10], model(tokens[:, :10]), atol=1e-5)
    assert torch.allclose(masked[:, 10:], model(tokens[:, 10:]), atol=1e-5)
    assert not torch.allclose(masked[:, 10:], model(tokens)[:, 10:], atol=1e-3)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_gives_the_same_gradients(recompute: Recompute) -> None:
    gradients = []
    choices: tuple[Recompute, ...] = ("none", recompute)
    for choice in choices:
        model = _decoder()
        model.recompute = choice
        vocab_parallel_cross_entropy(model(_tokens()), _tokens(), model.tp).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_selective_recomputation_keeps_less_than_everything_and_more_than_nothing() -> None:
    kept = {}
    choices: tuple[Recompute, ...] = ("none", "selective", "full")
    for choice in choices:
        model = _decoder()
        model.recompute = choice
        saved: list[int] = []

        def save(tensor: torch.Tensor, sizes: list[int] = saved) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            model(_tokens(4, 64))
        kept[choice] = sum(saved)
    assert kept["full"] < kept["none"]
    assert kept["selective"] < kept["none"]


@settings(deadline=None)
@given(data=st.data())
def test_any_box_of_the_initial_values_is_that_box_of_the_whole(data: st.DataObject) -> None:
    specs = parameter_specs(ModelConfig.model_validate(SHAPE), DepthPlan.plain(1), VOCAB)
    name = data.draw(st.sampled_from(sorted(specs)))
    spec = specs[name]
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in spec.shape)
    shape = tuple(data.draw(st.integers(1, size - first)) for size, first in zip(spec.shape, offset, strict=True))
    whole = initial_values(name, spec, 7, (0,) * len(spec.shape), spec.shape)
    index = tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))
    assert torch.equal(initial_values(name, spec, 7, offset, shape), whole[index])


def test_initial_values_are_normal_and_differ_by_name_and_seed() -> None:
    spec = parameter_specs(ModelConfig(), DepthPlan.plain(1), 4096)["embedding.weight"]
    shape = (512, 960)
    values = initial_values("embedding.weight", spec, 0, (0, 0), shape)
    assert abs(float(values.mean())) < 1e-4
    assert float(values.std()) == pytest.approx(0.02, rel=5e-3)
    assert float(((values / 0.02) ** 4).mean()) == pytest.approx(3.0, rel=2e-2)  # a normal's kurtosis
    for other in (
        initial_values("other", spec, 0, (0, 0), shape),
        initial_values("embedding.weight", spec, 1, (0, 0), shape),
    ):
        assert abs(float((values * other).mean()) / 0.02**2) < 1e-2


def test_a_looped_layer_has_one_set_of_weights() -> None:
    assert sum(p.numel() for p in _decoder("1-2x3-1").parameters()) == sum(
        p.numel() for p in _decoder("4").parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_torchs(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(3)).mul(4).to(dtype)
    targets = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(4))
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = vocab_parallel_cross_entropy(ours, targets, TensorParallel())
    expected = torch.nn.functional.cross_entropy(theirs.float().flatten(0, 1), targets.flatten())
    (3 * loss).backward()
    (3 * expected).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert ours.grad.dtype == dtype
    assert torch.allclose(
        ours.grad.float(), theirs.grad.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is none")
def test_compiled_layers_give_the_same_loss_and_gradients() -> None:
    results = []
    for compiled in (False, True):
        model = _decoder("1")
        if compiled:
            model.compile_layers()
        loss = vocab_parallel_cross_entropy(model(_tokens()), _tokens(), model.tp)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    (plain, expected), (fused, found) = results
    assert torch.allclose(plain, fused, rtol=1e-5)
    for a, b in zip(expected, found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)


class _Products(TorchDispatchMode):
    """Counts matrix products, also those of compiled code."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return op(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is none")
def test_compiled_or_not_selective_recomputation_computes_no_product_again() -> None:
    # seven products of a layer and the head's, each twice in the backward pass; to run a layer again takes some more
    once = 2 * (2 * 7 + 1)
    losses = []
    ways: list[tuple[Recompute, bool]] = [("none", False), ("selective", False), ("selective", True), ("full", False)]
    for recompute, compiled in ways:
        model = _decoder("2")
        model.recompute = recompute
        if compiled:
            model.compile_layers()
        loss = vocab_parallel_cross_entropy(model(_tokens()), _tokens(), model.tp)
        with _Products() as counted:
            loss.backward()
        assert counted.count > once if recompute == "full" else counted.count == once, (recompute, compiled)
        losses.append(float(loss.detach()))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
