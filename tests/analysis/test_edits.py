"""An edited pass computes bit for bit what a model with that order of layers would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megaloop.analysis.edits import Calls, exit_after, repeat, reverse, skip, swap
from megaloop.depth import DepthPlan, LayerCall, LoopStyle
from megaloop.errors import MegaloopError
from megaloop.model import Decoder, norm_factors
from tests.analysis.models import CONFIG, VOCAB, decoder, random_prompts, whole_batch
from tests.loop_styles import STYLES

TOKENS = whole_batch(random_prompts()).tokens_BS
Edit = Callable[[Calls], Calls]
ORDERS: list[tuple[str, Edit, tuple[int, ...]]] = [
    ("6", partial(skip, start=1), (0, 2, 3, 4, 5)),
    ("6", partial(skip, start=2, count=3), (0, 1, 5)),
    ("6", partial(swap, start=0, count=2), (2, 3, 0, 1, 4, 5)),
    ("6", partial(reverse, start=1), (0, 4, 3, 2, 1, 5)),
    ("6", partial(repeat, start=1, count=2, more=2), (0, 1, 2, 1, 2, 1, 2, 3, 4, 5)),
    ("6", partial(exit_after, count=4), (0, 1, 2, 3)),
    ("2-2x3-1", partial(skip, start=3), (0, 1, 2, 2, 3, 2, 3, 4)),
    ("2-2x3-1", partial(skip, start=3, count=2), (0, 1, 2, 3, 2, 3, 4)),
    ("2-2x3-1", partial(swap, start=1, count=2), (0, 3, 2, 1, 2, 3, 2, 3, 4)),
    ("2-2x3-1", partial(reverse, start=4), (0, 1, 2, 3, 3, 2, 3, 2, 4)),
    ("2-2x3-1", partial(repeat, start=2, count=2, more=1), (0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4)),
    ("2-2x3-1", partial(repeat, start=1, count=3, more=1), (0, 1, 2, 3, 1, 2, 3, 2, 3, 2, 3, 4)),
    ("2-2x3-1", partial(exit_after, count=5), (0, 1, 2, 3, 2)),
]


def _with_order(model: Decoder, plan: DepthPlan, values: dict[str, Tensor] | None = None, **changes: Any) -> Decoder:
    """Another model, with the same weights."""
    other = Decoder(model.config.model_copy(update=changes), VOCAB, plan)
    missing = other.load_state_dict(values or model.state_dict(), strict=False).missing_keys
    assert not missing
    return other.eval()


@torch.no_grad()
@pytest.mark.parametrize(("depth", "edit", "order"), ORDERS)
def test_an_edited_pass_is_that_of_a_model_with_that_order(depth: str, edit: Edit, order: tuple[int, ...]) -> None:
    model = decoder(depth)
    before, weights = model(TOKENS), {name: value.clone() for name, value in model.state_dict().items()}
    edited = edit(model.plan.calls())
    assert tuple(call.layer_id for call in edited) == order
    found = model(TOKENS, calls=edited)
    assert torch.equal(found, _with_order(model, DepthPlan(order))(TOKENS))
    assert not torch.allclose(found, before, atol=0.1)
    assert torch.equal(model(TOKENS), before)  # nothing is left behind
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(("depth", "edit", "order"), [case for case in ORDERS if case[0] == "6"])
def test_layers_keep_their_factors_of_ln_scaling_wherever_they_are_executed(
    depth: str, edit: Edit, order: tuple[int, ...]
) -> None:
    model = decoder(depth, config=CONFIG.model_copy(update={"norm_scaling": True}))
    folded = dict(model.state_dict())
    for layer_id, factor in norm_factors(model.config, model.plan).items():
        for norm in ("attention_norm", "mlp_norm"):
            folded[f"layers.{layer_id}.{norm}.weight"] = folded[f"layers.{layer_id}.{norm}.weight"] * factor
    plain = _with_order(model, DepthPlan(order), folded, norm_scaling=False)
    assert torch.equal(model(TOKENS, calls=edit(model.plan.calls())), plain(TOKENS))


@torch.no_grad()
def test_a_model_without_a_layer_predicts_from_the_embedding() -> None:
    model = decoder("3")
    assert torch.equal(model(TOKENS, calls=exit_after(model.plan.calls(), 0)), model.logits(model.embedding(TOKENS)))


@torch.no_grad()
@pytest.mark.parametrize("start", [2, 4, 6])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_a_whole_time_of_a_loop_less_or_more_is_a_plan_with_as_many_times(style: LoopStyle, start: int) -> None:
    """What 1/k divides by stays: only the number of times is another."""
    model = decoder("2-2x3-1", style)
    for times, edited in ((2, skip(model.plan.calls(), start, 2)), (4, repeat(model.plan.calls(), start, 2, 1))):
        other = _with_order(model, DepthPlan(DepthPlan.parse(f"2-2x{times}-1").order, style=style))
        calls = [call if call.iterations is None else replace(call, iterations=3) for call in other.plan.calls()]
        assert torch.equal(model(TOKENS, calls=edited), other(TOKENS, calls=calls))


def _by_hand(model: Decoder, times: Sequence[Sequence[int]]) -> Tensor:
    """Logits of 2-2x3-1, with the loop's layers in each of its times as they are given."""
    style, context = model.plan.style, model.attention_context(TOKENS.shape[1], 0, None, TOKENS.device)
    layers: Any = model.layers
    loop: Any = getattr(model, "loop", None)
    entered = x = layers["1"](layers["0"](model.embedding(TOKENS), context), context)
    scale = 1 / 3 if style.residual_scale == "1/k" else 1.0
    for number, ids in enumerate(times):
        if style.injection == "add" and number:
            x = x + entered
        elif style.injection == "concat":
            x = loop["adapter"](x, entered)
        for layer_id in ids:
            x = layers[str(layer_id)](x, context, None, scale)
        if style.norm:
            x = loop["norm"](x)
    return model.logits(layers["4"](x, context))


BY_TIMES: list[tuple[Edit, list[list[int]]]] = [
    (partial(skip, start=2), [[3], [2, 3], [2, 3]]),
    (partial(skip, start=3), [[2], [2, 3], [2, 3]]),
    (partial(skip, start=7), [[2, 3], [2, 3], [2]]),
    (partial(skip, start=3, count=2), [[2], [3], [2, 3]]),
    (partial(skip, start=2, count=3), [[3], [2, 3]]),
    (partial(skip, start=5, count=3), [[2, 3], [2]]),
    (partial(swap, start=2), [[3, 2], [2, 3], [2, 3]]),
    (partial(swap, start=3), [[2, 2], [3, 3], [2, 3]]),
    (partial(reverse, start=2), [[3, 2], [3, 2], [2, 3]]),
    (partial(repeat, start=2, count=1, more=2), [[2, 2, 2, 3], [2, 3], [2, 3]]),
    (partial(repeat, start=5, count=1, more=1), [[2, 3], [2, 3, 3], [2, 3]]),
    (partial(repeat, start=2, count=4, more=1), [[2, 3], [2, 3], [2, 3], [2, 3], [2, 3]]),
    (partial(repeat, start=3, count=2, more=1), [[2, 3], [2, 3], [2, 3], [2, 3]]),
]


@torch.no_grad()
@pytest.mark.parametrize(("edit", "times"), BY_TIMES)
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_injection_and_norm_stay_at_the_ends_of_each_time(style: LoopStyle, edit: Edit, times: list[list[int]]) -> None:
    model = decoder("2-2x3-1", style)
    assert torch.equal(model(TOKENS, calls=edit(model.plan.calls())), _by_hand(model, times))


def test_edits_of_nothing_change_nothing() -> None:
    calls = DepthPlan.parse("2-2x3-1").calls()
    assert repeat(calls, 3, 2, 0) == calls
    assert exit_after(calls, len(calls)) == calls
    assert reverse(reverse(calls, 1, 4), 1, 4) == calls
    assert swap(swap(calls, 1, 2), 1, 2) == calls


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (partial(skip, start=6), "skip: layers 6 to 7 .exclusive. of a model that executes 6"),
        (partial(skip, start=-1), "skip: layers -1"),
        (partial(skip, start=0, count=0), "skip: layers 0 to 0"),
        (partial(swap, start=3, count=2), "swap: layers 3 to 7"),
        (partial(reverse, start=3), "reverse: layers 3 to 7"),
        (partial(repeat, start=5, count=2, more=1), "repeat: layers 5 to 7"),
        (partial(repeat, start=0, count=1, more=-1), "repeat: -1 more times"),
        (partial(exit_after, count=7), "exit: after 7 layers of 6"),
    ],
)
def test_places_that_are_not_there_are_refused(edit: Edit, message: str) -> None:
    calls: tuple[LayerCall, ...] = DepthPlan.plain(6).calls()
    with pytest.raises(MegaloopError, match=message):
        edit(calls)
