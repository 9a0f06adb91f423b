"""A loop's gate: what it says and what it learns, against the formulas written out with nothing but torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaloop.config import GateConfig, ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, Growth, LoopStyle, reorder
from megaloop.model import Decoder, exit_log_probabilities, gate_loss, grown_from, parameter_specs
from megaloop.model.parameters import LOOP_GATE

VOCAB = 96
CONFIG = ModelConfig(hidden_size=48, num_heads=6, num_kv_heads=2, ffn_size=80)
FROZEN, JOINT = GateConfig(train="frozen"), GateConfig(train="joint", beta=0.3)
STYLES = [LoopStyle(gate=True), LoopStyle("add", gate=True), LoopStyle("concat", "1/k", norm=True, gate=True)]


def _tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(seed))


TOKENS, TARGETS = _tokens(0), _tokens(1)
WEIGHTS = torch.rand(2, 24, generator=torch.Generator().manual_seed(2))
DOCUMENTS = (torch.arange(24) // 10).expand(2, 24)


def decoder(style: LoopStyle = STYLES[0], depth: str = "1-2x3-1") -> Decoder:
    plan = reorder(DepthPlan.plain(DepthPlan.parse(depth).layers), DepthSpec.parse(depth), style)
    model = Decoder(
        CONFIG.model_copy(update={"init_std": 0.2}), VOCAB, plan
    )  # so that iterations differ in what they say
    model.initialise(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("loop."):
                scale = 0.03 if name in LOOP_GATE else 0.3  # by hand, a probability that rounds to 1 has no logarithm
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def readouts(model: Decoder, iterations: int, documents_BS: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Each token's loss, and lambda, were the loop to end after each of its iterations: a forward pass of its own for each."""
    losses, lambdas = [], []
    calls = model.plan.calls(iterations)
    gate: Any = model.loop["gate"]
    for last in range(iterations):
        prefix = [call for call in calls if call.iteration is not None and call.iteration <= last]
        begun = [calls[0], *prefix]
        logits_BSV = model(TOKENS, documents_BS, calls=[*begun, calls[-1]])
        losses.append(F.cross_entropy(logits_BSV.flatten(0, 1), TARGETS.flatten(), reduction="none").view(2, 24))
        h_BSD = model.run(TOKENS, begun, documents_BS, first=True, last=False)
        lambdas.append(torch.sigmoid((h_BSD * gate.weight[0]).sum(-1) + gate.bias))
    return losses, lambdas


def frozen_by_hand(losses: list[Tensor], lambdas: list[Tensor]) -> Tensor:
    """Nothing that it takes but lambda has a gradient."""
    total = torch.zeros(2, 24)
    for t in range(1, len(losses)):
        improvement = torch.clamp(losses[t - 1] - losses[t], min=0).detach()
        w = torch.sigmoid(50 * (improvement - 0.005))
        stop = lambdas[t - 1]  # asked after the iteration before: whether this one is to run
        total = total - (w * torch.log(1 - stop) + (1 - w) * torch.log(stop))
    return total / (len(losses) - 1)


def joint_by_hand(losses: list[Tensor], lambdas: list[Tensor], beta: float) -> Tensor:
    total, left = torch.zeros(2, 24), torch.ones(2, 24)
    for t, loss in enumerate(losses):
        p = left if t == len(losses) - 1 else left * lambdas[t]
        total = total + p * loss + beta * p * torch.log(p)
        left = left * (1 - lambdas[t])
    return total


@pytest.mark.parametrize("iterations", [2, 3, 5])
@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("gate", [FROZEN, JOINT], ids=lambda gate: gate.train)
def test_losses_and_gradients_are_those_of_the_formulas(gate: GateConfig, style: LoopStyle, iterations: int) -> None:
    model = decoder(style)
    found = gate_loss(model, TOKENS, model.plan.calls(iterations), TARGETS, gate)
    losses, lambdas = readouts(model, iterations)
    by_hand = frozen_by_hand(losses, lambdas) if gate is FROZEN else joint_by_hand(losses, lambdas, gate.beta)
    assert torch.allclose(found, by_hand.mean(), rtol=3e-7)
    learning = [p for name, p in model.named_parameters() if gate is JOINT or name in LOOP_GATE]
    pairs = zip(torch.autograd.grad(found, learning), torch.autograd.grad(by_hand.mean(), learning), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()
        assert ours.abs().max() > 0


@pytest.mark.parametrize("gate", [FROZEN, JOINT], ids=lambda gate: gate.train)
def test_weights_of_labels_and_documents_are_heeded(gate: GateConfig) -> None:
    model = decoder()
    found = gate_loss(model, TOKENS, model.plan.calls(), (TARGETS, WEIGHTS), gate, DOCUMENTS)
    losses, lambdas = readouts(model, 3, DOCUMENTS)
    by_hand = frozen_by_hand(losses, lambdas) if gate is FROZEN else joint_by_hand(losses, lambdas, gate.beta)
    assert torch.allclose(found, (by_hand * WEIGHTS).sum(), rtol=1e-5)


def test_a_frozen_model_gets_no_gradient_and_its_gate_does_whatever_the_count() -> None:
    model = decoder(STYLES[2])
    for iterations in (1, 3):
        model.zero_grad(set_to_none=True)
        gate_loss(model, TOKENS, model.plan.calls(iterations), TARGETS, FROZEN).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(LOOP_GATE)
        gradient = dict(model.named_parameters())["loop.gate.weight"].grad
        assert gradient is not None
        assert bool(gradient.any()) == (iterations > 1)


def test_one_iteration_has_the_ordinary_loss_where_gate_and_model_learn_together() -> None:
    model = decoder()
    calls = model.plan.calls(1)
    ordinary = F.cross_entropy(model(TOKENS, calls=calls).flatten(0, 1), TARGETS.flatten())
    assert torch.allclose(gate_loss(model, TOKENS, calls, TARGETS, JOINT), ordinary, rtol=1e-6)


def test_a_token_stops_somewhere_with_probability_one_even_where_the_gate_is_sure() -> None:
    logits_t11 = torch.tensor([-200.0, 3.0, 200.0, -1.0]).view(4, 1, 1)
    log_p = exit_log_probabilities(logits_t11).flatten()
    stop = torch.sigmoid(torch.tensor(3.0))
    assert torch.allclose(log_p.exp(), torch.tensor([0.0, stop, 1 - stop, 0.0, 0.0]), atol=1e-6)
    assert log_p.isfinite().all()


def test_a_gate_changes_no_bit_of_a_forward_pass() -> None:
    gated = decoder(LoopStyle("concat", norm=True, gate=True))
    plain = Decoder(
        gated.config, VOCAB, reorder(DepthPlan.plain(4), DepthSpec.parse("1-2x3-1"), LoopStyle("concat", norm=True))
    )
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if name not in LOOP_GATE})
    assert torch.equal(gated(TOKENS), plain(TOKENS))


def test_a_gate_begins_undecided_and_speaks_in_fp32() -> None:
    model = Decoder(CONFIG, VOCAB, decoder().plan).to(torch.bfloat16)
    model.initialise(seed=3)
    logits_BS = model.gate_logits(torch.randn(2, 5, 48, dtype=torch.bfloat16))
    assert (logits_BS.shape, logits_BS.dtype) == ((2, 5), torch.float32)
    assert torch.equal(logits_BS, torch.zeros(2, 5))
    shapes = {
        name: spec.shape for name, spec in parameter_specs(CONFIG, model.plan, VOCAB).items() if name in LOOP_GATE
    }
    assert shapes == {"loop.gate.weight": (1, 48), "loop.gate.bias": (1,)}


def test_a_new_gate_is_fresh_and_leaves_the_loops_other_parameters() -> None:
    before, after = (
        reorder(DepthPlan.plain(4), DepthSpec.parse("1-2x3-1"), LoopStyle("concat", norm=True, gate=gate))
        for gate in (False, True)
    )
    growth = Growth.reordered(before, after)
    assert [grown_from(name, growth) for name in LOOP_GATE] == [None, None]
    assert grown_from("loop.norm.weight", growth) == "loop.norm.weight"
    assert grown_from("loop.gate.bias", Growth.reordered(after, after)) == "loop.gate.bias"


def test_plans_without_a_gate_are_written_as_before_it_was_known() -> None:
    plan = reorder(DepthPlan.plain(4), DepthSpec.parse("1-2x3-1"), LoopStyle(norm=True))
    assert plan.to_json()["style"] == {"injection": "none", "residual_scale": "none", "norm": True}
    gated = decoder(STYLES[2]).plan
    assert [DepthPlan.from_json(item.to_json()) for item in (plan, gated)] == [plan, gated]
