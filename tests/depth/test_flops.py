from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megaloop.config import GateConfig, ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, LoopStyle, reorder
from megaloop.depth.flops import Flops, flops_per_token, head_flops, layer_flops, parameters
from megaloop.depth.plan import GateTraining
from megaloop.model import gate_loss
from megaloop.model.decoder import Decoder, Recompute


@dataclass(frozen=True)
class Shape:
    hidden_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_size: int = 160
    vocab_size: int | None = 256
    tied_embeddings: bool = True
    head_dim: int = 16

    @property
    def head_size(self) -> int:
        return self.head_dim


def llama(shape: Shape, layers: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_heads,
            head_dim=shape.head_dim,
            num_key_value_heads=shape.num_kv_heads,
            intermediate_size=shape.ffn_size,
            vocab_size=shape.vocab_size,
            num_hidden_layers=layers,
            tie_word_embeddings=shape.tied_embeddings,
            attn_implementation="eager",
        )
    )


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(num_kv_heads=4, tied_embeddings=False),
        Shape(num_kv_heads=1, ffn_size=96, vocab_size=512),
        Shape(head_dim=24),
    ],
)
@pytest.mark.parametrize("length", [16, 96])
def test_flops_equal_what_torch_counts_on_a_llama(shape: Shape, length: int) -> None:
    batch, layers = 2, 3
    model = llama(shape, layers)
    tokens_BS = torch.randint(shape.vocab_size or 0, (batch, length))
    with FlopCounterMode(display=False) as forward:
        logits_BSV = model(tokens_BS).logits
    with FlopCounterMode(display=False) as backward:
        logits_BSV.sum().backward()
    ours = flops_per_token(DepthPlan.plain(layers), shape, length)
    assert ours.forward * batch * length == pytest.approx(forward.get_total_flops(), rel=0.005)
    assert ours.backward * batch * length == pytest.approx(backward.get_total_flops(), rel=0.005)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize(("depth", "head_dim"), [("3", 16), ("1-2x3-1", 16), ("3", 10)])
def test_flops_equal_what_torch_counts_on_our_decoder(depth: str, head_dim: int, recompute: Recompute) -> None:
    shape, plan, batch, length = ModelConfig(**asdict(Shape(head_dim=head_dim))), DepthPlan.parse(depth), 2, 48
    decoder = Decoder(shape, 256, plan, recompute=recompute)
    decoder.initialise(0)
    tokens_BS = torch.randint(256, (batch, length))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits_BSV = decoder(tokens_BS)
        with FlopCounterMode(display=False) as backward:
            logits_BSV.sum().backward()
    ours = flops_per_token(plan, shape, length, recompute=recompute)
    assert ours.forward * batch * length == forward.get_total_flops()
    assert (ours.backward + ours.recompute) * batch * length == backward.get_total_flops()
    assert parameters(plan, shape) == sum(parameter.numel() for parameter in decoder.parameters())


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("train", ["frozen", "joint"])
def test_flops_of_training_a_gate_equal_what_torch_counts(train: GateTraining, recompute: Recompute) -> None:
    shape, length = ModelConfig(**asdict(Shape())), 48
    plan = reorder(DepthPlan.plain(5), DepthSpec.parse("1-2x3-2"), LoopStyle("concat", gate=True))
    decoder = Decoder(shape, 256, plan, recompute=recompute)
    decoder.initialise(0)
    tokens_BS = torch.randint(256, (2, length))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = gate_loss(decoder, tokens_BS, plan.calls(), tokens_BS, GateConfig(train=train))
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    ours = flops_per_token(plan, shape, length, recompute=recompute, gate=train)
    assert ours.forward * 2 * length == forward.get_total_flops()
    assert (ours.backward + ours.recompute) * 2 * length == backward.get_total_flops()
    assert parameters(plan, shape) == sum(parameter.numel() for parameter in decoder.parameters())


@pytest.mark.parametrize("shape", [Shape(), Shape(num_kv_heads=4, tied_embeddings=False), Shape(head_dim=24)])
def test_parameters_equal_those_of_a_llama(shape: Shape) -> None:
    assert parameters(DepthPlan.plain(3), shape) == sum(p.numel() for p in llama(shape, 3).parameters())


def test_smollm_shapes_have_their_known_sizes() -> None:
    small = ModelConfig(hidden_size=960, num_heads=15, num_kv_heads=5, ffn_size=2560)
    large = ModelConfig(hidden_size=2048, num_heads=32, num_kv_heads=32, ffn_size=8192, vocab_size=49152)
    assert parameters(DepthPlan.plain(32), small, vocab_size=49152) == 361_821_120
    assert parameters(DepthPlan.plain(24), large) == 1_711_376_384


def test_the_total_follows_the_formula_of_palm() -> None:
    shape, layers, length = Shape(), 5, 128
    norms = (2 * layers + 1) * shape.hidden_size
    matrices = parameters(DepthPlan.plain(layers), shape) - norms  # tied: the one table is the head's
    expected = 6 * matrices + 12 * layers * shape.hidden_size * length
    assert flops_per_token(DepthPlan.plain(layers), shape, length).total == expected


@given(st.integers(0, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 4))
def test_a_looped_layer_costs_each_time_it_runs_and_is_stored_once(
    before: int, block: int, iterations: int, after: int
) -> None:
    looped = DepthPlan.parse(f"{before}-{block}x{iterations}-{after}")
    assert flops_per_token(looped, Shape(), 32) == flops_per_token(DepthPlan.plain(looped.depth), Shape(), 32)
    assert parameters(looped, Shape()) == parameters(DepthPlan.plain(looped.layers), Shape())


def test_recomputation_counts_apart_from_the_model() -> None:
    plan, shape = DepthPlan.plain(4), Shape()
    plain = flops_per_token(plan, shape, 64)
    full = flops_per_token(plan, shape, 64, recompute="full")
    assert plain.recompute == 0
    assert plain.hardware == plain.total == plain.forward + plain.backward
    assert full == Flops(plain.forward, plain.backward, full.recompute)
    assert 0 < full.recompute < 4 * layer_flops(shape, 64)
    assert full.hardware == full.total + full.recompute
    assert flops_per_token(plan, shape, 64, recompute="selective") == plain


def test_layers_and_head_make_up_the_forward_pass() -> None:
    shape = Shape()
    forward = flops_per_token(DepthPlan.plain(7), shape, 64).forward
    assert forward == 7 * layer_flops(shape, 64) + head_flops(shape, 256)


def test_the_vocabulary_must_be_known() -> None:
    unresolved = replace(Shape(), vocab_size=None)
    with pytest.raises(ValueError, match="vocab_size"):
        flops_per_token(DepthPlan.plain(1), unresolved, 8)
    assert flops_per_token(DepthPlan.plain(1), unresolved, 8, vocab_size=256) == flops_per_token(
        DepthPlan.plain(1), Shape(), 8
    )
