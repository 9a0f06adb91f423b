"""What happens to a loop's state, against iterations written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from megaloop.analysis.loop_monitors import MONITORS, loop_monitors, loop_states
from megaloop.analysis.measures import Subject, monitors
from megaloop.analysis.prompts import Prompts
from megaloop.depth import DepthPlan, LoopStyle
from megaloop.errors import MegaloopError
from megaloop.model import Decoder
from tests.analysis.tiny import STYLES, tiny_batch, tiny_model, tiny_prompt


def by_hand(model: Decoder, style: LoopStyle, tokens_S: Tensor, iterations: int) -> list[Tensor]:
    """x_0, x_1, ... of a 1-2xk-1 model and one prompt alone, [S, D]."""
    context = model.attention_context(len(tokens_S), 0, None, tokens_S.device)
    x = entered = model.layers["0"](model.embedding(tokens_S[None]), context)
    found = [x[0]]
    for iteration in range(iterations):
        if style.injection == "add" and iteration:
            x = x + entered
        elif style.injection == "concat":
            x = torch.cat([x, entered], -1) @ model.loop["adapter"].weight.T  # type: ignore[operator]
        for name in ("1", "2"):
            x = model.layers[name](x, context, None, 1 / iterations if style.residual_scale == "1/k" else 1.0)
        if style.norm:
            x = x * (x.square().mean(-1, keepdim=True) + model.config.norm_eps).rsqrt() * model.loop["norm"].weight
        found.append(x[0])
    return found


@torch.no_grad()
@pytest.mark.parametrize("iterations", [None, 1, 5])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_monitors_are_those_of_iterations_by_hand(style: LoopStyle, iterations: int | None) -> None:
    model, batch = tiny_model("1-2x3-1", style), tiny_batch((7, 5))
    found_BRK = loop_monitors(model, batch, iterations)
    count = iterations or 3
    assert found_BRK.shape == (2, count, len(MONITORS))
    for row, length in enumerate(batch.lengths):
        states = [x.double() for x in by_hand(model, style, batch.tokens_BS[row, :length], count)]
        for r in range(1, count + 1):
            x, before = states[r], states[r - 1]
            pairs = [
                float(cosine_similarity(x[i], x[j], dim=0)) for i in range(length) for j in range(length) if i != j
            ]
            change = (x - before).norm(dim=1)
            expected = {
                "state_norm": x.norm(dim=1).mean(),
                "change": change.mean(),
                "relative_change": (change / x.norm(dim=1)).mean(),
                "cosine": cosine_similarity(x, before, dim=1).mean(),
                "token_cosine": torch.tensor(sum(pairs) / len(pairs), dtype=torch.float64),
            }
            for name, value in zip(MONITORS, found_BRK[row, r - 1] / length, strict=True):
                # measured: 4.4e-16; a processor may round a batch otherwise than a prompt alone, in fp32
                assert float(value) == pytest.approx(float(expected[name]), rel=1e-6, abs=1e-7), name


@torch.no_grad()
def test_the_states_are_those_of_the_whole_pass_and_the_coda_goes_on_from_the_last() -> None:
    model, batch = tiny_model("1-2x3-1", STYLES[2]), tiny_batch()
    *_, last = loop_states(model, batch, 4)
    rest = model.run(last, model.plan.calls(4)[-1:], first=False, last=True)
    assert torch.equal(rest, model(batch.tokens_BS, calls=model.plan.calls(4)))


@torch.no_grad()
def test_a_loop_of_layers_that_add_nothing_has_a_fixed_point() -> None:
    model, batch = tiny_model("1-1x4-1"), tiny_batch()
    for name, parameter in model.layers["1"].named_parameters():
        if name.endswith(("wo.weight", "w_down.weight")):
            parameter.zero_()
    found_BRK = loop_monitors(model, batch)
    assert (found_BRK[:, :, [1, 2]] == 0).all()
    tokens_B1 = batch.valid_BS.sum(1, keepdim=True).double()
    assert torch.allclose(found_BRK[:, :, 3], tokens_B1.expand(-1, 4), rtol=1e-14, atol=0)
    assert all(torch.equal(found_BRK[:, 0], found_BRK[:, r]) for r in range(1, 4))


@torch.no_grad()
def test_a_prompt_of_one_token_has_no_other_to_be_like() -> None:
    found_BRK = loop_monitors(tiny_model("1-1x2-1"), tiny_batch((1, 4)))
    assert (found_BRK[0, :, 4] == 0).all()
    assert (found_BRK[1, :, 4] != 0).all()
    assert found_BRK.isfinite().all()


def test_a_model_without_a_loop_is_told_how_to_get_one() -> None:
    with pytest.raises(MegaloopError, match=r"depth 3 has no loop .* megaloop loop CKPT --out CKPT2 --depth"):
        loop_monitors(tiny_model("3"), tiny_batch())
    assert DepthPlan.parse("3").loop is None
    with pytest.raises(MegaloopError, match="at least once"):
        loop_monitors(tiny_model("1-1x2-1"), tiny_batch(), 0)


@pytest.mark.parametrize(("style", "iterations"), [(STYLES[1], 6), (STYLES[2], 3)], ids=str)
def test_a_loop_that_adds_1_over_k_is_watched_as_it_was_trained(style: LoopStyle, iterations: int) -> None:
    """With more iterations each would add less; others are watched for twice as many."""
    model = tiny_model("1-2x3-1", style)
    prompts = Prompts("tests", [tiny_prompt(7), tiny_prompt(5, 1)])
    found = monitors(Subject(model, prompts, 2, 0, None, lambda *_: None)).curves["state_norm"].values
    assert len(found) == iterations
    expected_BRK = loop_monitors(model, prompts.batch([1, 0], torch.device("cpu")), iterations)
    # what is kept has six digits, so differs by up to 5e-6
    assert found == pytest.approx((expected_BRK[..., 0].sum(0) / 12).tolist(), rel=1e-5)
