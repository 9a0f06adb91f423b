"""Evaluation with halting and shared caches is what generation does with its tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaloop.data import MicroBatch
from megaloop.errors import MegaloopError
from megaloop.evaluation.held_out import score_held_out
from megaloop.evaluation.scoring import Question, Scores, score
from megaloop.evaluation.thinking import TokenClasses, by_class, loops_over_text, spent
from megaloop.inference.caches import CachePolicy
from megaloop.inference.engine import Engine, Request
from megaloop.inference.halting import Halting
from megaloop.inference.passes import Passes
from megaloop.inference.sampling import Sampling
from megaloop.inference.thinking import Thinking
from megaloop.model import Decoder
from tests.inference.thinking import VOCAB, dense, model_of, prompts, shared_slots

LENGTHS = (1, 2, 4, 3)
"""Of the answers to each question."""
EXACT = 2e-5
"""Twice the largest difference measured, of log-likelihoods of up to 40 nats."""
TOKENS = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def models() -> dict[str, Decoder]:
    return {depth: model_of(depth) for depth in ("0-2x4-0", "1-2x3-1")}


def thinking(halt: str | None = None, cache: str = "full", **options: Any) -> Thinking:
    return Thinking(None if halt is None else Halting.parse(halt, **options), CachePolicy.parse(cache))


def questions() -> tuple[list[int], list[Question]]:
    queries = prompts(7, 9, seed=1)
    generator = torch.Generator().manual_seed(2)
    answers = [
        [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS] for _ in queries
    ]
    return prompts(1, 12, seed=4)[0], [Question(query, each) for query, each in zip(queries, answers, strict=True)]


def of_each_answer(question: Question, loops: list[int]) -> list[list[int]]:
    """Iterations of the tokens that predict it."""
    ends = list(itertools.accumulate((len(answer) - 1 for answer in question.answers), initial=1))
    return [[loops[0], *loops[start:stop]] for start, stop in itertools.pairwise(ends)]


def expected(model: Decoder, before: list[int], answer: list[int], loops: list[int], most: int) -> float:
    """The log-likelihood by the definition: all of a prompt but its last token runs in full."""
    tokens = before + answer[:-1]
    logits_SV = dense(model, tokens, [most] * (len(before) - 1) + loops)[len(before) - 1 :]
    return float(logits_SV.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).sum())


@pytest.mark.parametrize("depth", ["0-2x4-0", "1-2x3-1"])
@pytest.mark.parametrize("halt", ["kl=0.04", "latent=0.5", "fixed=2", "fixed=1"])
def test_answers_score_as_their_tokens_loop(models: dict[str, Decoder], depth: str, halt: str) -> None:
    model, (beginning, asked) = models[depth], questions()
    most = Passes(model).iterations
    found = score(model, beginning, asked, batch_tokens=60, thinking=thinking(halt))
    for question, scores in zip(asked, found, strict=True):
        assert len(scores.loops) == 1 + sum(len(answer) - 1 for answer in question.answers)
        for answer, loops, likelihood in zip(
            question.answers, of_each_answer(question, scores.loops), scores.log_likelihoods, strict=True
        ):
            before = beginning + question.query
            assert likelihood == pytest.approx(expected(model, before, answer, loops, most), abs=EXACT)
    ran = {loops for scores in found for loops in scores.loops}
    assert ran == {int(halt[-1])} if halt.startswith("fixed") else len(ran) > 1


GENERATED = [
    thinking("kl=0.04"),
    thinking("latent=0.5"),
    thinking("kl=0.04", minimum=2),
    thinking("confidence=0.99", decay=4.0),
    thinking("kl=0.3", scope="sequence"),
    thinking("confidence=0.99", decay=4.0, scope="sequence"),
    thinking(None, "last"),
    thinking("kl=0.04", "shared=2"),
    thinking("latent=0.9", "last", scope="sequence"),
]


@pytest.mark.parametrize(
    "how", GENERATED, ids=lambda how: f"{how.halting}-{how.policy}-{how.halting and how.halting.scope}"
)
@pytest.mark.parametrize("depth", ["0-2x4-0", "1-2x3-1"])
def test_what_generation_gives_scores_as_greedy_with_the_loops_of_generation(
    models: dict[str, Decoder], depth: str, how: Thinking
) -> None:
    model, (beginning, asked) = models[depth], questions()
    length = 4
    engine = Engine(how.passes(model, None, None), Sampling(0.0))
    made: list[list[int]] = [[] for _ in asked]
    loops: list[list[int]] = [[] for _ in asked]
    for event in engine.run([Request([*beginning, *question.query], length) for question in asked]):
        made[event.number].append(event.token)
        loops[event.number].append(event.loops)
    other = [(made[0][0] + 1) % VOCAB, 3]
    candidates = [Question(question.query, [other, answer]) for question, answer in zip(asked, made, strict=True)]
    found = score(model, beginning, candidates, batch_tokens=80, thinking=how)
    assert [scores.greedy[1] for scores in found] == [True] * len(asked)
    assert [
        of_each_answer(*pair)[1] for pair in zip(candidates, (scores.loops for scores in found), strict=True)
    ] == loops


def test_at_threshold_0_and_with_the_oracle_scores_are_those_of_all_iterations(models: dict[str, Decoder]) -> None:
    beginning, asked = questions()
    for model in models.values():
        plain = score(model, beginning, asked)
        never, oracle = (score(model, beginning, asked, thinking=thinking(halt)) for halt in ("kl=0", "oracle"))
        for found in (never, oracle):
            for one, other in zip(plain, found, strict=True):
                assert other.log_likelihoods == pytest.approx(one.log_likelihoods, abs=EXACT)
                assert (other.greedy, other.best) == (one.greedy, one.best)
        most = Passes(model).iterations
        assert {loops for scores in never for loops in scores.loops} == {most}
        assert 1 < _mean(oracle) < most


def _mean(found: list[Scores]) -> float:
    return float(spent((loops for scores in found for loops in scores.loops), 9)["loops_mean"])


@pytest.mark.parametrize("halt", ["kl=0.09", "latent=0.9", "oracle"])
@pytest.mark.parametrize("cache", ["full", "last"])
def test_a_held_out_sample_leaves_as_one(models: dict[str, Decoder], halt: str, cache: str) -> None:
    model, batch = models["1-2x3-1"], batch_of(TOKENS)
    scored, loops_BS = score_held_out(model, batch, model.plan.calls(), VOCAB, thinking(halt, cache, scope="sequence"))
    assert loops_BS is not None
    assert bool((loops_BS == loops_BS[:, :1]).all())
    for row, one in enumerate(scored):
        loops = [3] * batch.inputs.shape[1] if halt == "oracle" else loops_BS[row].tolist()
        logits_SV = dense(model, batch.inputs[row].tolist(), loops)
        loss = float(torch.nn.functional.cross_entropy(logits_SV, batch.targets[row], reduction="sum"))
        assert one.loss == pytest.approx(loss, abs=2e-4)


def batch_of(tokens_BS: Tensor, **changes: Any) -> MicroBatch:
    return replace(MicroBatch.of(tokens_BS[:, :-1], tokens_BS[:, 1:]), **changes)


@pytest.mark.parametrize("depth", ["0-2x4-0", "1-2x3-1"])
@pytest.mark.parametrize("halt", ["kl=0.04", "latent=0.5"])
def test_held_out_loss_is_that_of_tokens_with_their_loops(models: dict[str, Decoder], depth: str, halt: str) -> None:
    model, batch = models[depth], batch_of(TOKENS)
    scored, loops_BS = score_held_out(model, batch, model.plan.calls(), VOCAB, thinking(halt))
    assert loops_BS is not None
    assert len(loops_BS.unique()) > 1
    for row, one in enumerate(scored):
        logits_SV = dense(model, batch.inputs[row].tolist(), loops_BS[row].tolist())
        loss = float(torch.nn.functional.cross_entropy(logits_SV, batch.targets[row], reduction="sum"))
        assert one.loss == pytest.approx(loss, abs=EXACT)
        assert one.loops == tuple(zip(batch.targets[row].tolist(), loops_BS[row].tolist(), strict=True))


def test_only_what_counts_leaves_early(models: dict[str, Decoder]) -> None:
    weights_BS = torch.zeros(4, 11)
    weights_BS[:, 3::4] = weights_BS[:, 10] = 0.1
    batch = batch_of(TOKENS, loss_weights=weights_BS)
    model = models["1-2x3-1"]
    scored, loops_BS = score_held_out(model, batch, model.plan.calls(), VOCAB, thinking("fixed=1"))
    assert loops_BS is not None
    assert torch.equal(loops_BS == 1, weights_BS > 0)
    for row, one in enumerate(scored):
        logits_SV = dense(model, batch.inputs[row].tolist(), loops_BS[row].tolist())
        counts_S = weights_BS[row] > 0
        right_S = logits_SV.argmax(-1)[counts_S] == batch.targets[row][counts_S]
        loss = torch.nn.functional.cross_entropy(logits_SV[counts_S], batch.targets[row][counts_S], reduction="sum")
        assert one.loss == pytest.approx(float(loss), abs=EXACT)
        assert (one.right, one.tokens, len(one.loops)) == (int(right_S.sum()), 3, 3)


def test_with_document_masking_each_document_is_alone() -> None:
    model = model_of("0-2x4-0", document_masking=True)
    documents_BS = (torch.arange(11) >= 5).int().expand(4, -1)
    batch = batch_of(TOKENS, documents=documents_BS)
    scored, loops_BS = score_held_out(model, batch, model.plan.calls(), VOCAB, thinking("kl=0.04"))
    assert loops_BS is not None
    for row, one in enumerate(scored):
        parts = [
            dense(model, batch.inputs[row, at].tolist(), loops_BS[row, at].tolist()) for at in (slice(5), slice(5, 11))
        ]
        loss = torch.nn.functional.cross_entropy(torch.cat(parts), batch.targets[row], reduction="sum")
        assert one.loss == pytest.approx(float(loss), abs=EXACT)


@pytest.mark.parametrize("cache", ["last", "shared=2"])
def test_with_fewer_caches_the_loss_is_that_of_token_after_token(models: dict[str, Decoder], cache: str) -> None:
    model, batch = models["0-2x4-0"], batch_of(TOKENS[:2])
    how = thinking(None, cache)
    scored, loops_BS = score_held_out(model, batch, model.plan.calls(), VOCAB, how)
    assert loops_BS is None
    plain, _ = score_held_out(model, batch, model.plan.calls(), VOCAB)
    for row, one in enumerate(scored):
        logits_SV = shared_slots(model, batch.inputs[row].tolist(), how.policy.shared or 0)
        loss = torch.nn.functional.cross_entropy(logits_SV, batch.targets[row], reduction="sum")
        assert one.loss == pytest.approx(float(loss), abs=EXACT)
        assert abs(one.loss - plain[row].loss) > 0.1
    kept = how.policy.shared or 0
    assert how.memory(model, model.plan.calls()) == {"cache_bytes": 256 * kept, "cache_bytes_full": 1024}


def test_all_iterations_and_all_caches_are_the_forward_pass(models: dict[str, Decoder]) -> None:
    for model in models.values():
        plain, _ = score_held_out(model, batch_of(TOKENS), model.plan.calls(), VOCAB)
        for how in (thinking("kl=0"), thinking("oracle"), thinking(None, "shared=4")):
            found, _ = score_held_out(model, batch_of(TOKENS), model.plan.calls(), VOCAB, how)
            assert [one.loss for one in found] == pytest.approx([one.loss for one in plain], abs=EXACT)


def test_loops_are_counted_by_what_was_to_be_predicted() -> None:
    texts = {1: "42", 2: " dog", 3: "!?", 4: "\n", 5: "\N{REPLACEMENT CHARACTER}", 6: "", 7: "v2"}
    classes = TokenClasses(lambda tokens: texts[tokens[0]])
    assert [classes.of(token) for token in texts] == [
        "digits",
        "words",
        "punctuation",
        "space",
        "other",
        "other",
        "words",
    ]
    assert by_class(classes, [(1, 3), (2, 1), (7, 2), (2, 3)]) == {"digits": [3.0, 1], "words": [2.0, 3]}
    assert spent([1, 3, 3, 1, 3], 4) == {"loops_mean": 2.2, "loops_histogram": [2, 0, 3, 0]}


def test_a_text_shows_the_loops_that_its_tokens_took() -> None:
    tokenizer: Any = SimpleNamespace(decode=lambda tokens: bytes(tokens).decode(errors="replace"))
    text = "aé b"
    tokens_S = torch.tensor([*text.encode(), 99])
    documents_S = torch.tensor([0] * 5 + [1])
    loops_S, asked_S = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([True, True, True, False, True, True])
    shown = loops_over_text(tokenizer, tokens_S, documents_S, asked_S, loops_S, own_targets=False)
    assert shown == [["a", None], ["", 1], ["é", 2], [" ", 3], ["b", None]]
    own = loops_over_text(tokenizer, tokens_S, documents_S, asked_S, loops_S, own_targets=True)
    assert own == [["a", 1], ["", 2], ["é", 3], [" ", None], ["b", 5]]


def test_a_model_without_a_loop_cannot_halt() -> None:
    with pytest.raises(MegaloopError, match="the model runs without a loop"):
        score(model_of("2"), [], [Question([1], [[2]])], thinking=thinking("kl=0.1"))
