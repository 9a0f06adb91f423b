"""Many sequences together: each gets the tokens, the loops and the end that it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megaloop.inference.caches import CachePolicy
from megaloop.inference.engine import Engine, Event, Request
from megaloop.inference.halting import Halting
from megaloop.inference.passes import Passes
from megaloop.inference.sampling import Sampling, draw
from tests.inference.thinking import dense, model_of, prompts, shared_slots

PROMPTS = prompts(16, 12)
DRAWN = Sampling(1.0, top_k=20, top_p=0.95)


def run(
    passes: Passes, requests: Sequence[Request], sampling: Sampling = Sampling(), **options: Any
) -> list[list[Event]]:
    """Events of each request."""
    found: list[list[Event]] = [[] for _ in requests]
    for event in Engine(passes, sampling, **options).run(requests):
        found[event.number].append(event)
    return found


def made(events: Sequence[Event]) -> list[tuple[int, int, str | None]]:
    return [(event.token, event.loops, event.stopped) for event in events]


def requests(end: int = 60) -> list[Request]:
    return [Request(prompt, 3 + 2 * (number % 4), number) for number, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("halt", "policy"),
    [(None, "full"), ("kl=0.03", "full"), ("confidence=0.98", "full"), ("latent=0.5", "last"), (None, "shared=2")],
)  # fmt: skip
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_a_batch_gives_each_sequence_what_it_gets_alone(halt: str | None, policy: str, sampling: Sampling) -> None:
    passes = Passes(
        model_of("1-2x3-1"), halting=None if halt is None else Halting.parse(halt), policy=CachePolicy.parse(policy)
    )
    alone = [made(run(passes, [request], sampling, rows=1)[0]) for request in requests()]
    for options in ({"rows": 16}, {"rows": 5, "chunk": 3}):
        together = run(passes, requests(), sampling, **options)
        assert [made(events) for events in together] == alone
    if halt is not None:
        assert len({loops for events in alone for _, loops, _ in events}) > 1


def test_greedy_tokens_are_the_argmax_of_passes_without_caches() -> None:
    model = model_of("1-2x3-1")
    for request, events in zip(requests(), run(Passes(model), requests()), strict=True):
        tokens = list(request.tokens)
        for event in events:
            assert event.token == int(model(torch.tensor([tokens]))[0, -1].argmax())
            tokens.append(event.token)


def test_a_generated_token_loops_as_the_definition_says_and_its_prompt_in_full() -> None:
    passes = Passes(model_of("0-2x4-0"), halting=Halting.parse("kl=0.04"))
    for request, events in zip(requests(), run(passes, requests()), strict=True):
        tokens = [*request.tokens, *(event.token for event in events)][:-1]
        loops = [4] * (len(request.tokens) - 1) + [event.loops for event in events]
        logits_SV = dense(passes.model, tokens, loops)
        assert logits_SV[-len(events) :].argmax(-1).tolist() == [event.token for event in events]


@pytest.mark.parametrize("halt", ["kl=0.05", "kl=0"])
@pytest.mark.parametrize("masking", [True, False])
def test_a_new_document_looks_back_to_the_end_before_it_as_in_training(masking: bool, halt: str) -> None:
    passes = Passes(model_of("1-2x3-1", document_masking=masking), halting=Halting.parse(halt))
    (events,) = run(passes, [Request([], 6)], end_id=7)
    tokens, loops = [event.token for event in events], [event.loops for event in events]
    assert len(tokens) == 6
    if masking:  # the end predicts the first token, and no other sees it
        said = [dense(passes.model, [7], loops[:1]), dense(passes.model, tokens[:-1], loops[1:])]
    else:
        said = [dense(passes.model, [7, *tokens[:-1]], loops)]
    assert torch.cat(said).argmax(-1).tolist() == tokens


@pytest.mark.parametrize("shared", [1, 2, 3])
def test_a_prompt_leaves_in_shared_caches_the_last_iteration_of_each_slot(shared: int) -> None:
    passes = Passes(model_of("0-2x4-0"), policy=CachePolicy(shared))
    for request, events in zip(requests(), run(passes, requests()), strict=True):
        tokens = [*request.tokens, *(event.token for event in events)][:-1]
        logits_SV = shared_slots(passes.model, tokens, shared, prompt=len(request.tokens) - 1)
        assert logits_SV.argmax(-1).tolist() == [event.token for event in events]


def test_a_prompt_may_leave_as_one() -> None:
    passes = Passes(model_of("0-2x4-0"), halting=Halting.parse("kl=0.06", scope="sequence"))
    counts = set()
    for request, events in zip(requests(), run(passes, requests(), rows=5), strict=True):
        tokens = [*request.tokens, *(event.token for event in events)][:-1]
        loops = [events[0].loops] * len(request.tokens) + [event.loops for event in events[1:]]
        logits_SV = dense(passes.model, tokens, loops)
        assert logits_SV[-len(events) :].argmax(-1).tolist() == [event.token for event in events]
        counts.add(events[0].loops)
    assert len(counts) > 1


def test_sequences_end_for_their_own_reasons() -> None:
    passes = Passes(model_of("1-2x3-1"))
    alone = [event.token for event in run(passes, [Request(PROMPTS[0], 8)])[0]]
    end, stop = alone[3], alone[5]
    asked = [
        Request(PROMPTS[0], 8),
        Request(PROMPTS[0], 8, should_stop=lambda made: made[-1] == alone[1]),
        Request(PROMPTS[1], 2),
    ]
    found = [made(events)[-1][2] for events in run(passes, asked, end_id=end)]
    assert found == ["end", "stop", "length"]
    assert stop is not None


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws with as many generators as there are rows."""
    probabilities_V = torch.tensor([0.4, 0.3, 0.2, 0.1])
    generators = [torch.Generator().manual_seed(seed) for seed in range(10)]
    counts_V = torch.zeros(4)
    for _ in range(2000):
        counts_V += torch.tensor(draw(probabilities_V.expand(10, -1), generators)).bincount(minlength=4)
    expected_V = 20_000 * probabilities_V
    assert float(((counts_V - expected_V) ** 2 / expected_V).sum()) < 16.27  # p = 0.001 with 3 degrees of freedom


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-300])
def test_near_temperature_0_the_likeliest_token_is_drawn(temperature: float) -> None:
    probabilities_BV = Sampling(temperature).probabilities(torch.tensor([[1.0, 5.0, 3.0]]))
    assert probabilities_BV.tolist() == [[0, 1, 0]]


def test_calms_threshold_falls_over_a_text() -> None:
    halting = Halting.parse("confidence=0.2", decay=4)
    limits = [1 - halting.threshold_at(place, 10) for place in (0, 5, 10)]
    assert limits == pytest.approx([0.82, 0.72 + 0.1 * 2.718281828**-2, 0.72 + 0.1 * 2.718281828**-4])
    never = Passes(model_of("0-2x4-0"), halting=Halting.parse("confidence=0", decay=4))
    assert {event.loops for events in run(never, requests()) for event in events} == {4}
    decayed = Passes(model_of("0-2x4-0"), halting=Halting.parse("confidence=0.98", decay=1))
    alone = [made(run(decayed, [request], rows=1)[0]) for request in requests()]
    assert [made(events) for events in run(decayed, requests())] == alone


@pytest.mark.slow
def test_compiled_layers_give_the_same_tokens() -> None:
    model = model_of("0-1x2-0")
    plain = [made(events) for events in run(Passes(model), requests()[:3])]
    model.compile_layers()
    assert [made(events) for events in run(Passes(model), requests()[:3])] == plain
