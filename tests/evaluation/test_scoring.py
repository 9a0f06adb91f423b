"""Scores of packed rows are those of one question and one answer at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from megaloop.analysis.interventions import KINDS, Kind, sweep
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, LayerCall, LoopStyle, with_inference_loop
from megaloop.depth.loops import reorder
from megaloop.evaluation.scoring import Question, score, score_in_orders
from megaloop.inference.generate import generate_tokens
from megaloop.model import Decoder

SHAPE = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=64)
PLANS = {
    "plain": DepthPlan.parse("3"),
    "looped": DepthPlan.parse("1-1x3-1"),
    "adapter": reorder(DepthPlan.parse("3"), DepthSpec.parse("1-1x2-1"), LoopStyle("concat", "1/k", True)),
}


def _model(plan: str, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(SHAPE, 64, PLANS[plan])
    model.initialise(3)
    for parameter in model.parameters():
        parameter.data *= 4  # so that predictions differ from one another
    return model.to(dtype).eval()


def _questions(count: int, seed: int = 0) -> tuple[list[int], list[Question]]:
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(60) for _ in range(rng.randint(least, most))]

    return tokens(9, 9), [Question(tokens(1, 12), [tokens(1, 5) for _ in range(4)]) for _ in range(count)]


@torch.no_grad()
def _plainly(
    model: Decoder, beginning: list[int], query: list[int], answer: list[int], calls: Sequence[LayerCall] | None = None
) -> tuple[float, bool]:
    tokens = beginning + query + answer
    calls = model.plan.calls() if calls is None else calls
    logits_SV = model.run(torch.tensor([tokens[:-1]]), calls, first=True, last=True)[0, -len(answer) :].double()
    targets = torch.tensor(answer)
    likelihood = logits_SV.log_softmax(-1).gather(1, targets.unsqueeze(1)).sum()
    return float(likelihood), bool((logits_SV[:, :60].argmax(-1) == targets).all())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shared", [True, False])
def test_packed_rows_score_as_one_answer_at_a_time(plan: str, shared: bool) -> None:
    model = _model(plan)
    beginning, questions = _questions(17)
    beginning = beginning if shared else []
    found = score(model, beginning, questions, vocab_size=60, batch_tokens=100)
    for question, scores in zip(questions, found, strict=True):
        expected = [_plainly(model, beginning, question.query, answer) for answer in question.answers]
        assert scores.log_likelihoods == pytest.approx([likelihood for likelihood, _ in expected], abs=3e-6)
        assert scores.greedy == [greedy for _, greedy in expected]
        assert scores.best == max(range(4), key=lambda i: expected[i][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_edited_orders_score_as_whole_passes(plan: str, kind: Kind) -> None:
    """Half a loop, a layer of it twice in an iteration: each execution has keys and values of its own."""
    model, (beginning, questions) = _model(plan), _questions(7)
    calls = model.plan.calls()
    orders = [calls, *(one.calls(calls) for one in sweep(kind, len(calls), 2))]
    found = dict(score_in_orders(model, beginning, questions, orders, vocab_size=60, batch_tokens=100))
    assert sorted(found) == list(range(len(orders)))
    for number, order in enumerate(orders):
        for question, scores in zip(questions, found[number], strict=True):
            expected = [_plainly(model, beginning, question.query, answer, order) for answer in question.answers]
            assert scores.log_likelihoods == pytest.approx([likelihood for likelihood, _ in expected], abs=3e-6)
            assert scores.greedy == [greedy for _, greedy in expected]
        assert found[number] == score(model, beginning, questions, calls=order, vocab_size=60, batch_tokens=100)


@pytest.mark.parametrize(("plan", "depth"), [("plain", "0-3x2-0"), ("looped", "3"), ("adapter", "1-1x4-1")])
def test_another_execution_is_given_and_leaves_the_model_as_it_is(plan: str, depth: str) -> None:
    model, (beginning, questions) = _model(plan), _questions(5)
    before = score(model, beginning, questions)
    way = with_inference_loop(model.plan, DepthSpec.parse(depth))
    found = score(model, beginning, questions, calls=way.calls)
    assert found != before == score(model, beginning, questions)
    assert model.plan == PLANS[plan]
    row = torch.tensor([beginning + questions[0].query])
    with torch.no_grad():
        made = model(row, calls=way.calls)
        model.plan = model.plan if plan == "adapter" else reorder(model.plan, way.depth)
        assert torch.equal(made, model(row, calls=model.plan.calls(4 if plan == "adapter" else None)))
    assert found == score(model, beginning, questions, calls=way.calls)


def test_how_rows_are_batched_changes_nothing() -> None:
    model = _model("plain")
    beginning, questions = _questions(17)
    alone = score(model, beginning, questions, batch_tokens=1)
    together = score(model, beginning, questions, batch_tokens=10**6)
    for one, other in zip(alone, together, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-6)


def test_an_answer_is_greedy_where_generation_gives_it() -> None:
    model = _model("looped")
    beginning, questions = _questions(12)
    asked = []
    for number, question in enumerate(questions):
        made = list(generate_tokens(model, beginning + question.query, 3, vocab_size=60))
        other = [*made[:2], (made[2] + 1 + number) % 60]
        asked.append(Question(question.query, [other, made]))
    assert [scores.greedy for scores in score(model, beginning, asked, vocab_size=60)] == [[False, True]] * 12


def test_bf16_ranks_as_fp32_does_where_it_is_clear() -> None:
    beginning, questions = _questions(40)
    exact, rounded = (score(_model("plain", dtype), beginning, questions) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(exact, rounded, strict=True):
        assert other.log_likelihoods == pytest.approx(one.log_likelihoods, rel=0.05, abs=0.5)
