"""The model drafts for itself: the tokens of plain generation, or its distribution, in fewer calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import chi2

from megaloop.analysis.tuned_lens import LensSource, TunedLens
from megaloop.depth import DepthSpec, LoopStyle, with_inference_loop
from megaloop.errors import MegaloopError
from megaloop.inference.caches import CachePolicy
from megaloop.inference.engine import Event, Request
from megaloop.inference.halting import Halting
from megaloop.inference.passes import Passes
from megaloop.inference.sampling import Sampling
from megaloop.inference.speculation import EarlyExit, Speculation, Speculator
from megaloop.model import Decoder
from tests.inference.test_engine import DRAWN, made, run
from tests.inference.test_passes import EXACT, TOKENS
from tests.inference.thinking import model_of, prompts
from tests.loop_styles import STYLES

CASES = [(depth, style) for depth in ("0-2x4-0", "1-2x3-1") for style in STYLES]
PROMPTS = prompts(42 * len(CASES), 12)
"""504, 42 for each way to loop."""
DRAFTS = [Speculation(1), Speculation(5), Speculation(2, draft_loops=2)]
END = 7


def asked(own: Sequence[list[int]]) -> list[Request]:
    """That end for all three reasons."""
    stop = [None, lambda made: made[-1] % 9 == 4]
    return [Request(prompt, 3 + 2 * (number % 6), number, stop[number % 2]) for number, prompt in enumerate(own)]


def accepted(found: Sequence[Sequence[Event]]) -> tuple[int, int]:
    """Tokens that were accepted, and drafted."""
    return sum(events[-1].accepted for events in found), sum(events[-1].drafted for events in found)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{depth}-{style}" for depth, style in CASES])
def test_greedy_tokens_loops_and_ends_are_those_of_plain_generation(number: int) -> None:
    passes = Passes(model_of(*CASES[number]))
    requests = asked(PROMPTS[42 * number : 42 * (number + 1)])
    plain = [made(events) for events in run(passes, requests, rows=42, end_id=END)]
    assert {events[-1][2] for events in plain} >= {"stop", "length"}
    for how in DRAFTS:
        found = run(passes, requests, rows=42 if how.tokens > 1 else 25, end_id=END, speculate=how)
        assert [made(events) for events in found] == plain
        right, drafted = accepted(found)
        assert 0 < right < drafted


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("loops", [1, 2])
def test_what_a_draft_has_run_need_not_be_run_again(style: LoopStyle, loops: int) -> None:
    """Drafts one after another, then the rest of all at once: the model's own logits."""
    passes = Passes(model_of("1-2x3-1", style))
    caches, begun = passes.caches(3, 12), []
    for at in range(12):
        place = passes.place(torch.full((3, 1), at), at + 1)
        begun.append(passes.begin(TOKENS[:, at : at + 1], place, caches, passes.calls_of(loops)))
        passes.leave(begun[-1], place, caches)
    hidden_BSD = passes.finish(type(begun[0]).joined(begun), passes.place(torch.arange(12).expand(3, -1), 12), caches)
    torch.testing.assert_close(passes.logits(hidden_BSD), passes.model(TOKENS), rtol=0, atol=EXACT)


@pytest.mark.parametrize("depth", ["2-2x3-0", "1-2x3-1"])
def test_of_a_loop_that_only_inference_has_one_iteration_is_the_model_as_trained(depth: str) -> None:
    model = model_of("4")
    passes = Passes(model, with_inference_loop(model.plan, DepthSpec.parse(depth)).calls)
    place, caches = passes.place(torch.arange(12).expand(3, -1), 12), passes.caches(3, 12)
    hidden_BSD = passes.leave(passes.begin(TOKENS, place, caches, passes.calls_of(1)), place, caches)
    torch.testing.assert_close(passes.logits(hidden_BSD), model(TOKENS), rtol=0, atol=EXACT)
    requests = asked(PROMPTS[:20])
    plain = [made(events) for events in run(passes, requests)]
    found = run(passes, requests, speculate=Speculation(3))
    assert [made(events) for events in found] == plain
    assert accepted(found)[0] > 0


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_documents_begin_and_sequences_run_beside_each_other_as_alone(sampling: Sampling) -> None:
    passes = Passes(model_of("1-2x3-1", document_masking=True))
    requests = asked([prompt if number % 3 else [] for number, prompt in enumerate(PROMPTS[:9])])
    for how in (Speculation(1), Speculation(4)):
        alone = [made(run(passes, [one], sampling, rows=1, end_id=END, speculate=how)[0]) for one in requests]
        together = run(passes, requests, sampling, rows=5, chunk=3, end_id=END, speculate=how)
        assert [made(events) for events in together] == alone
        if sampling.temperature == 0:
            assert alone == [made(events) for events in run(passes, requests, end_id=END)]


def test_nothing_is_drafted_that_cannot_come() -> None:
    (events,) = run(Passes(model_of("0-2x4-0")), [Request([5], 1)], speculate=Speculation(4))
    assert (events[-1].drafted, len(events)) == (0, 1)


def layer_calls(model: Decoder) -> Counter[str]:
    """Counts from now on how often each layer runs."""
    calls: Counter[str] = Counter()
    for name, layer in model.layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("loops", [1, 3])
def test_a_model_whose_drafts_are_right_makes_the_calls_that_are_expected(loops: int) -> None:
    """Iterations that add nothing: two steps of 3 drafts bring 8 tokens."""
    model = model_of("1-2x4-1")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("layers.1.", "layers.2.")) and name.endswith(("wo.weight", "w_down.weight")):
                weight.zero_()
    calls = layer_calls(model)
    (plain,) = run(Passes(model), [Request([5], 8)])
    assert calls == {"0": 8, "1": 32, "2": 32, "3": 8}
    calls.clear()
    (events,) = run(Passes(model), [Request([5], 8)], speculate=Speculation(3, loops))
    looped = 2 * (4 * loops + (4 - loops))
    assert calls == {"0": 8, "1": looped, "2": looped, "3": 2 * (3 + 1)}
    assert made(events) == made(plain)
    assert (events[-1].drafted, events[-1].accepted) == (6, 6)


def test_a_model_whose_drafts_are_wrong_is_right() -> None:
    """All states say that the last token does not come; the lens says that it does."""
    model = model_of("4")
    with torch.no_grad():
        model.embedding.weight[:, 0] = 30
        model.head.weight[-1] = 0
        model.head.weight[-1, 0] = -10
    requests = asked(PROMPTS[:20])
    no = EarlyExit(2, lambda layers, x_BSD: -torch.eye(x_BSD.shape[-1])[0].expand_as(x_BSD))
    plain, found = run(Passes(model), requests), run(Passes(model), requests, speculate=Speculation(3, exit=no))
    assert [made(events) for events in found] == [made(events) for events in plain]
    right, drafted = accepted(found)
    assert right == 0 < drafted


def test_a_model_without_a_loop_drafts_through_a_tuned_lens() -> None:
    model = model_of("4")
    calls = layer_calls(model)
    lens = TunedLens(4, 32, LensSource("", "", 1, 1)).requires_grad_(False)
    exit = EarlyExit(3, lens)
    requests = asked(PROMPTS[:20])
    plain = [made(events) for events in run(Passes(model), requests)]
    found = run(Passes(model), requests, speculate=Speculation(3, exit=exit))
    assert [made(events) for events in found] == plain
    assert accepted(found)[0] > 0
    calls.clear()
    run(Passes(model), requests[:1], speculate=Speculation(2, exit=exit))
    assert calls["3"] < calls["0"] == calls["2"]
    lens.bias_LD[3] = 5 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    other = run(Passes(model), requests, speculate=Speculation(3, exit=exit))
    assert [made(events) for events in other] == plain
    assert accepted(other) != accepted(found)


@torch.no_grad()
def _exact(model: Decoder, prompt: list[int], sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probabilities of the three tokens after a prompt."""
    after: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        texts = torch.tensor([[*prompt, *tokens] for tokens in after])
        p_BV = sampling.probabilities(model(texts)[:, -1])
        after = {
            (*tokens, token): before * float(p_V[token])
            for (tokens, before), p_V in zip(after.items(), p_BV, strict=True)
            for token in p_V.nonzero().flatten().tolist()
        }
    return after


@pytest.mark.parametrize("how", [None, Speculation(2), Speculation(1, draft_loops=2)], ids=["plain", "2", "1-loops-2"])
def test_drawn_tokens_have_the_distribution_of_plain_generation(how: Speculation | None) -> None:
    """Chi-square of 20,000 texts of three tokens, of which up to 64 are possible."""
    model, sampling, prompt = model_of("0-1x3-0"), Sampling(1.2, top_k=4), [5, 11]
    requests = [Request(prompt, 3, seed) for seed in range(20_000)]
    found = run(Passes(model), requests, sampling, rows=len(requests), speculate=how)
    counts = Counter(tuple(event.token for event in events) for events in found)
    exact = _exact(model, prompt, sampling)
    assert set(counts) <= set(exact)
    often = {tokens: 20_000 * p for tokens, p in exact.items() if 20_000 * p >= 5}
    rare = 20_000 - sum(often.values())
    pairs = [(counts[tokens], expected) for tokens, expected in often.items()]
    if rare > 1:
        pairs.append((20_000 - sum(counts[tokens] for tokens in often), rare))
    assert len(pairs) > 20
    assert sum((count - expected) ** 2 / expected for count, expected in pairs) < chi2.isf(1e-3, len(pairs) - 1)
    if how is not None:
        right, drafted = accepted(found)
        assert 0.1 * drafted < right < 0.9 * drafted


@pytest.mark.parametrize(
    ("depth", "options", "how", "message"),
    [
        ("0-2x4-0", {"halting": Halting("kl", 0.1)}, {}, "--speculate 2: with --halt kl=0.1 the tokens of plain"),
        ("0-2x4-0", {"policy": CachePolicy(2)}, {}, "--speculate 2: with --cache shared=2 a token sees"),
        ("0-2x4-0", {}, {"draft_loops": 4}, "--draft-loops 4: the loop runs 4 times, and drafts must run fewer"),
        ("0-2x4-0", {}, {"exit": EarlyExit(1, lambda _, x: x)}, "early exit is for models without a loop"),
        ("4", {}, {}, r"--speculate 2: the model runs without a loop \(depth 4\); give it one with --max-loops"),
        ("4", {}, {"exit": EarlyExit(4, lambda _, x: x)}, "after 4 of 4 layers; expected at least 1, and fewer than 4"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_draft_is_refused(depth: str, options: dict, how: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(MegaloopError, match=message):
        Speculator(Passes(model_of(depth), **options), Speculation(2, **how), Sampling())


@pytest.mark.parametrize(("tokens", "loops", "message"), [(0, 1, "--speculate 0: "), (1, 0, "--draft-loops 0: ")])
def test_numbers_below_1_are_refused(tokens: int, loops: int, message: str) -> None:
    with pytest.raises(MegaloopError, match=message):
        Speculation(tokens, loops)


def test_caches_with_as_many_slots_as_iterations_are_full() -> None:
    Speculator(Passes(model_of("1-2x3-1"), policy=CachePolicy(3)), Speculation(2), Sampling())
