"""A trace holds what the layers computed, a pass goes on from any place of it, and the model stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaloop.analysis.contributions import contributions
from megaloop.analysis.edits import swap
from megaloop.analysis.effects import local_effects, skip_effects
from megaloop.analysis.lens import lens
from megaloop.analysis.trace import LayerTrace, resume, trace
from megaloop.depth import LoopStyle
from megaloop.model import Decoder
from tests.analysis.models import CONFIG, decoder, random_prompts, whole_batch
from tests.loop_styles import STYLES

SCALED = CONFIG.model_copy(update={"norm_scaling": True})
BATCH = whole_batch(random_prompts())
DOCUMENTS = torch.arange(BATCH.tokens_BS.shape[1], dtype=torch.int32).expand_as(BATCH.tokens_BS) // 7
ALL = torch.arange(len(BATCH.tokens_BS))


@pytest.fixture(params=[*STYLES, "LN-scaling"], ids=str)
def model(request: pytest.FixtureRequest) -> Decoder:
    if request.param == "LN-scaling":
        return decoder("2-2x3-1", config=SCALED)
    style: LoopStyle = request.param
    return decoder("2-2x3-1", style)


@torch.no_grad()
@pytest.mark.parametrize("documents_BS", [None, DOCUMENTS], ids=["one document", "several documents"])
def test_a_trace_ends_where_the_pass_does_and_goes_on_from_every_place(
    model: Decoder, documents_BS: Tensor | None
) -> None:
    traced = trace(model, BATCH.tokens_BS, documents_BS)
    assert traced.calls == model.plan.calls()
    assert torch.equal(model.logits(traced.final_BSD), model(BATCH.tokens_BS, documents_BS))
    for place, layer in enumerate(traced.layers):
        read: list[Tensor] = []
        added: dict[int, Tensor] = {}

        def unchanged(x: Tensor, layer: LayerTrace, read: list[Tensor] = read) -> Tensor:
            read.append(x)
            return layer.after_BSD

        assert torch.equal(resume(model, traced, place, ALL, unchanged, added.__setitem__), traced.final_BSD)
        assert torch.equal(read[0], layer.h_BSD)
        assert list(added) == list(range(place + 1, len(traced.layers)))
        assert all(torch.equal(found, traced.layers[later].delta_BSD) for later, found in added.items())


@torch.no_grad()
def test_what_enters_a_layer_and_what_it_adds_is_what_leaves_it(model: Decoder) -> None:
    traced = trace(model, BATCH.tokens_BS)
    differences = [(layer.h_BSD + layer.delta_BSD - layer.after_BSD).abs().max() for layer in traced.layers]
    assert max(differences) < 8e-6  # 3.9e-6 measured, of values up to 10
    norms = [layer.after_BSD.norm() for layer in traced.layers]
    assert min(float(norm) for norm in norms) > 1


@torch.no_grad()
def test_a_prompt_goes_on_alone_several_times_and_in_any_order(model: Decoder) -> None:
    traced = trace(model, BATCH.tokens_BS, DOCUMENTS)
    rows = torch.tensor([2, 0, 2, 2])
    for place in range(len(traced.layers)):
        found = resume(model, traced, place, rows, lambda _, layer: layer.after_BSD[rows])
        assert torch.equal(found, traced.final_BSD[rows])


@torch.no_grad()
def test_an_edited_pass_is_traced_as_it_runs() -> None:
    model = decoder("2-2x3-1")
    calls = swap(model.plan.calls(), 2, 2)
    traced = trace(model, BATCH.tokens_BS, calls=calls)
    assert traced.calls == calls
    assert torch.equal(model.logits(traced.final_BSD), model(BATCH.tokens_BS, calls=calls))


def test_no_measure_leaves_the_model_changed(model: Decoder) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {name: vars(module).copy() for name, module in model.named_modules()}
    logits = model(BATCH.tokens_BS)
    traced = trace(model, BATCH.tokens_BS)
    contributions(traced, BATCH)
    lens(model, traced, BATCH)
    states = [layer.h_BSD.clone() for layer in traced.layers]
    for setting, at in (("current", []), ("future", [[8], [8, 16], [8]])):
        skip_effects(model, traced, BATCH, setting, at)  # type: ignore[arg-type]
        local_effects(model, traced, BATCH, setting, at)  # type: ignore[arg-type]
    assert all(torch.equal(one, layer.h_BSD) for one, layer in zip(states, traced.layers, strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert {name: vars(module) for name, module in model.named_modules()} == modules
    assert torch.equal(model(BATCH.tokens_BS), logits)
