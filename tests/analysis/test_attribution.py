"""Residual erasure and integrated gradients, against whole forward passes of a model with hooks on its layers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megaloop.analysis.attribution import Answer, Baseline, erasure_effects, integrated_gradients
from megaloop.analysis.prompts import Prompt
from megaloop.depth import LoopStyle
from megaloop.errors import MegaloopError
from megaloop.model import Decoder
from tests.analysis.tiny import STYLES, tiny_model, tiny_prompt

PLANS = [("3", STYLES[0]), ("1-1x2-1", STYLES[1]), ("1-1x2-1", STYLES[2])]
LENGTH = 6


def entering(model: Decoder, place: int, put: Callable[[Tensor], Tensor], tokens_BS: Tensor) -> Tensor:
    """Distributions [B, S, V] of a whole pass in which one use of a layer finds something else before it."""
    uses = [number for number, one in enumerate(model.plan.order[: place + 1]) if one == model.plan.order[place]]
    seen = 0

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal seen
        seen += 1
        return (put(arguments[0]), *arguments[1:]) if seen == len(uses) else None

    handle = model.layers[str(model.plan.order[place])].register_forward_pre_hook(hook)
    try:
        return model(tokens_BS).softmax(-1)
    finally:
        handle.remove()


def stream(model: Decoder, place: int, tokens_BS: Tensor) -> Tensor:
    """h_l of one prompt, [S, D]."""
    found: list[Tensor] = []
    with torch.no_grad():
        entering(model, place, lambda h: found.append(h) or h, tokens_BS)  # type: ignore[func-returns-value]
    return found[0][0]


def erased(answer: Answer, means_LD: list[Tensor]) -> Tensor:
    """Effects of all layers, [L, S]."""
    return torch.stack([erasure_effects(answer, place, mean_D) for place, mean_D in enumerate(means_LD)])


@torch.no_grad()
@pytest.mark.parametrize(("depth", "style"), PLANS)
def test_erasure_is_how_far_the_distribution_moves_when_a_token_is_replaced_by_the_mean(
    depth: str, style: LoopStyle
) -> None:
    model, prompt, other = tiny_model(depth, style), tiny_prompt(LENGTH), tiny_prompt(9, seed=5)
    tokens_BS, other_BS = (torch.from_numpy(one.tokens)[None] for one in (prompt, other))
    means_LD = [stream(model, place, other_BS).mean(0) for place in range(model.plan.depth)]
    found_LS = erased(Answer(model, prompt, [2, 4]), means_LD)
    untouched_SV = model(tokens_BS).softmax(-1)[0]
    for place, mean_D in enumerate(means_LD):
        for token in range(LENGTH):
            is_erased = (torch.arange(LENGTH) == token)[None, :, None]
            changed = entering(model, place, lambda h, on=is_erased, mean=mean_D: torch.where(on, mean, h), tokens_BS)  # type: ignore[misc]
            distance_A = (untouched_SV - changed[0]).norm(dim=1)[[2, 4]]
            # measured: 2.3e-8
            assert abs(found_LS[place, token] - distance_A.max()) < 4.6e-8
    assert (found_LS[:, :5] > 1e-4).any(1).all()
    assert (found_LS[:, 5] == 0).all(), "a token after the answer is read by nothing that predicts it"


@torch.no_grad()
def test_erasure_takes_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(tiny_model("2"), tiny_prompt(LENGTH))
    means_LD = [layer.h_BSD[0].mean(0) for layer in answer.traced.layers]
    expected = erased(answer, means_LD)
    assert not torch.allclose(erased(answer, [mean_D + 1 for mean_D in means_LD]), expected)
    monkeypatch.setattr("megaloop.analysis.attribution._TOKENS", 2 * LENGTH)
    assert torch.allclose(erased(answer, means_LD), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("baseline", ["zero", "mean"])
@pytest.mark.parametrize(("depth", "style"), PLANS)
def test_integrated_gradients_are_the_mean_gradient_on_the_line_times_the_difference(
    depth: str, style: LoopStyle, baseline: Baseline
) -> None:
    model, prompt, steps = tiny_model(depth, style), tiny_prompt(LENGTH), 8
    answer = Answer(model, prompt)
    exact = deepcopy(model).double()
    tokens_BS = torch.from_numpy(prompt.tokens)[None]
    for place in range(model.plan.depth):
        h_SD = stream(exact, place, tokens_BS)
        base_SD = torch.zeros_like(h_SD) if baseline == "zero" else h_SD.mean(0).expand_as(h_SD)
        total_SD = torch.zeros_like(h_SD)
        for step in range(steps):
            point = (base_SD + (step + 0.5) / steps * (h_SD - base_SD))[None].requires_grad_()
            probability = entering(exact, place, lambda _, new=point: new, tokens_BS)[0, -2, prompt.targets[-2]]  # type: ignore[misc]
            total_SD += torch.autograd.grad(probability, point)[0][0]
        expected_S = (total_SD / steps * (h_SD - base_SD)).sum(-1)
        found_S, missing = integrated_gradients(answer, place, baseline, steps)
        # measured: 2.4e-8
        assert torch.allclose(found_S, expected_S, atol=4.8e-8, rtol=0)
        assert expected_S.abs().max() > 5e-4
        with torch.no_grad():
            at_base, at_end = (
                entering(exact, place, lambda _, new=one: new, tokens_BS)[0, -2, prompt.targets[-2]]  # type: ignore[misc]
                for one in (base_SD[None], h_SD[None])
            )
        assert abs(missing + found_S.sum() - (at_end - at_base)) < 4.8e-8


def test_integrated_gradients_from_the_mean_add_up_to_the_change_of_the_probability() -> None:
    answer = Answer(tiny_model("2"), tiny_prompt(LENGTH))
    for place in range(2):
        scores_S, missing = integrated_gradients(answer, place)
        assert scores_S.abs().sum() > 5e-3
        # measured, with 256 steps: 9.4e-8
        assert abs(missing) < 1.9e-7


def test_attribution_leaves_the_model_as_it_was() -> None:
    model, prompt = tiny_model("2"), tiny_prompt(LENGTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answer = Answer(model, prompt)
    erasure_effects(answer, 1, torch.zeros(32)), integrated_gradients(answer, 1, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_an_answer_is_the_last_target_unless_said_otherwise() -> None:
    model = tiny_model("2")
    prompt = Prompt(np.arange(5), np.array([1, -1, 3, -1, -1]))
    with torch.no_grad():
        probabilities = model(torch.arange(5)[None]).softmax(-1)[0]
    assert Answer(model, prompt).positions == [2]
    assert Answer(model, prompt).probability == pytest.approx(float(probabilities[2, 3]), rel=1e-6)
    both = float(probabilities[2, 3] + probabilities[0, 1])
    assert Answer(model, prompt, [2, 0]).probability == pytest.approx(both, rel=1e-6)


def test_an_answer_without_targets_is_refused() -> None:
    model = tiny_model("2")
    with pytest.raises(MegaloopError, match="the prompt has no target"):
        Answer(model, Prompt(np.arange(3), np.full(3, -1)))
    with pytest.raises(MegaloopError, match="no target at position 4"):
        Answer(model, tiny_prompt(5), [4])
    with pytest.raises(MegaloopError, match="say at least one"):
        Answer(model, tiny_prompt(5), [])
