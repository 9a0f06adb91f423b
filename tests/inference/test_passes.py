"""Tokens anywhere, with as many loops as each needs: what the definition gives, in any composition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megaloop.depth import DepthPlan, LoopStyle
from megaloop.errors import MegaloopError
from megaloop.inference.caches import CachePolicy
from megaloop.inference.halting import Halting
from megaloop.inference.passes import Passes, Thought
from tests.inference.thinking import VOCAB, dense, model_of, shared_slots
from tests.loop_styles import STYLES

TOKENS = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(5))
SETTLING = ["kl=0.04", "entropy=0.04", "latent=0.5", "cosine=0.07", "confidence=0.98", "argmax=2", "fixed=2"]
EXACT = 5e-6
"""Twice the largest difference measured, of logits of size 3."""


def think(passes: Passes, tokens_BS: Tensor, pieces: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Logits and loops, in one pass or in pieces."""
    caches = passes.caches(*tokens_BS.shape)
    thoughts: list[Thought] = []
    for start, stop in pairwise((0, *pieces, tokens_BS.shape[1])):
        place = passes.place(torch.arange(start, stop).expand(len(tokens_BS), -1), stop)
        thoughts.append(passes.think(tokens_BS[:, start:stop], place, caches))
    hidden_BSD = torch.cat([thought.hidden_BSD for thought in thoughts], dim=1)
    return passes.logits(hidden_BSD), torch.cat([thought.loops_BS for thought in thoughts], dim=1)


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("depth", ["0-2x4-0", "1-2x3-1"])
@pytest.mark.parametrize("halt", SETTLING)
def test_tokens_that_leave_early_are_those_of_the_definition(depth: str, style: LoopStyle, halt: str) -> None:
    model = model_of(depth, style)
    logits_BSV, loops_BS = think(Passes(model, halting=Halting.parse(halt)), TOKENS)
    for row in range(len(TOKENS)):
        expected_SV = dense(model, TOKENS[row].tolist(), loops_BS[row].tolist())
        torch.testing.assert_close(logits_BSV[row], expected_SV, rtol=0, atol=EXACT)


@pytest.mark.parametrize("halt", SETTLING)
def test_the_criteria_tell_tokens_apart(halt: str) -> None:
    """Otherwise the tests above would compare little."""
    _, loops_BS = think(Passes(model_of("0-2x4-0"), halting=Halting.parse(halt)), TOKENS)
    assert len(loops_BS.unique()) > 1 or halt == "fixed=2"
    assert halt != "fixed=2" or bool((loops_BS == 2).all())


@pytest.mark.parametrize("depth", ["0-2x4-0", "1-2x3-1"])
@pytest.mark.parametrize("halt", [None, *SETTLING])
def test_in_pieces_or_alone_is_as_at_once(depth: str, halt: str | None) -> None:
    passes = Passes(model_of(depth), halting=(halt and Halting.parse(halt)) or None)
    logits_BSV, loops_BS = think(passes, TOKENS)
    for pieces in ((5, 6, 7), tuple(range(1, 12))):
        found_BSV, found_BS = think(passes, TOKENS, pieces)
        assert torch.equal(found_BS, loops_BS)
        torch.testing.assert_close(found_BSV, logits_BSV, rtol=0, atol=EXACT)
    for row in range(len(TOKENS)):
        found_BSV, found_BS = think(passes, TOKENS[row : row + 1])
        assert torch.equal(found_BS[0], loops_BS[row])
        torch.testing.assert_close(found_BSV[0], logits_BSV[row], rtol=0, atol=EXACT)


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize(("depth", "count"), [("4", None), ("1-2x3-1", 5), ("0-2x4-0", 1)])
def test_any_number_of_loops_in_pieces_is_one_pass_without_caches(
    depth: str, count: int | None, style: LoopStyle
) -> None:
    """Of a model without a loop too, grown or not: its layers are layers."""
    model = model_of(depth, style)
    calls = model.plan.calls(count)
    logits_BSV, loops_BS = think(Passes(model, calls), TOKENS, (4, 5, 9))
    assert bool((loops_BS == (count or 1)).all())
    torch.testing.assert_close(logits_BSV, model(TOKENS, calls=calls), rtol=0, atol=EXACT)


@pytest.mark.parametrize("halt", [*(f"{one.split('=')[0]}=0" for one in SETTLING), "gate=0"])
def test_at_threshold_0_every_iteration_runs(halt: str) -> None:
    model = model_of("1-2x3-1", LoopStyle(gate=True))
    logits_BSV, loops_BS = think(Passes(model, halting=Halting.parse(halt)), TOKENS)
    assert bool((loops_BS == 3).all())
    torch.testing.assert_close(logits_BSV, model(TOKENS), rtol=0, atol=EXACT)


@pytest.mark.parametrize("depth", ["0-2x4-0", "1-2x3-1"])
def test_the_oracle_predicts_what_all_iterations_do_and_counts_those_up_to_it(depth: str) -> None:
    model = model_of(depth)
    logits_BSV, loops_BS = think(Passes(model, halting=Halting("oracle")), TOKENS)
    torch.testing.assert_close(logits_BSV, model(TOKENS), rtol=0, atol=EXACT)
    plan = DepthPlan.parse(depth)
    after = [model(TOKENS, calls=plan.calls(count)).argmax(-1) for count in range(1, model.plan.loop.iterations + 1)]  # type: ignore[union-attr]
    if depth == "0-2x4-0":  # else what fewer loops make of the tokens before is seen too
        first = (torch.stack(after) == after[-1]).int().argmax(0) + 1
        assert torch.equal(loops_BS, first)
    assert 1 < loops_BS.float().mean() < model.plan.loop.iterations  # type: ignore[union-attr]
    assert bool((think(Passes(model, halting=Halting("oracle", minimum=2)), TOKENS)[1] >= 2).all())


@pytest.mark.parametrize("halt", ["fixed=1", "confidence=1", "argmax=1", "kl=9"])
def test_no_token_leaves_before_the_minimum(halt: str) -> None:
    for minimum in (2, 3, 4):
        _, loops_BS = think(Passes(model_of("0-2x4-0"), halting=Halting.parse(halt, minimum=minimum)), TOKENS)
        assert bool((loops_BS == minimum).all())


def test_a_sequence_leaves_as_one_when_all_of_it_has_settled() -> None:
    passes = Passes(model_of("1-2x3-1"), halting=Halting.parse("kl=0.09", scope="sequence"))
    logits_BSV, loops_BS = think(passes, TOKENS)
    assert bool((loops_BS == loops_BS[:, :1]).all())
    assert len(loops_BS[:, 0].unique()) > 1
    for row in range(len(TOKENS)):
        expected_SV = dense(passes.model, TOKENS[row].tolist(), loops_BS[row].tolist())
        torch.testing.assert_close(logits_BSV[row], expected_SV, rtol=0, atol=EXACT)


def test_what_is_not_asked_for_runs_in_full() -> None:
    model = model_of("0-2x4-0")
    passes = Passes(model, halting=Halting.parse("fixed=1"))
    asked_BS = torch.zeros_like(TOKENS, dtype=torch.bool)
    asked_BS[0, 7:] = asked_BS[2, 3] = True
    place = passes.place(torch.arange(12).expand(3, -1), 12)
    thought = passes.think(TOKENS, place, passes.caches(3, 12), asked_BS)
    assert torch.equal(thought.loops_BS, torch.where(asked_BS, 1, 4))
    expected_SV = dense(model, TOKENS[0].tolist(), thought.loops_BS[0].tolist())
    torch.testing.assert_close(passes.logits(thought.hidden_BSD)[0], expected_SV, rtol=0, atol=EXACT)


def test_work_falls_with_the_tokens_that_loop() -> None:
    """Counted in rows of the products, not in seconds."""
    model, rows = model_of("0-2x4-0"), []
    mlp = model.get_submodule("layers.0.mlp")
    mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2].numel()))
    passes = Passes(model, halting=Halting.parse("kl=0.04"))
    _, loops_BS = think(passes, torch.cat([TOKENS] * 4)[:, :1])
    assert sum(rows) == int(loops_BS.sum()) < 4 * loops_BS.numel()


class TestSharedCaches:
    """Against a loop over tokens and iterations in which nothing is packed."""

    @pytest.mark.parametrize("shared", [1, 2, 3])
    def test_iterations_read_and_write_the_same_slot(self, shared: int) -> None:
        model = model_of("0-2x4-0")
        passes = Passes(model, policy=CachePolicy(shared))
        logits_BSV, _ = think(passes, TOKENS)
        for row in range(len(TOKENS)):
            expected_SV = shared_slots(model, TOKENS[row].tolist(), shared)
            torch.testing.assert_close(logits_BSV[row], expected_SV, rtol=0, atol=EXACT)
        assert (logits_BSV - model(TOKENS)).abs().max() > 0.1

    def test_memory_is_that_of_the_slots(self) -> None:
        model = model_of("1-2x3-1")
        full, shared, last = (
            Passes(model, policy=CachePolicy.parse(text)).caches(2, 7).bytes for text in ("full", "shared=2", "last")
        )
        assert full == 2 * 7 * 8 * (2 * 2 * 8 * 4)  # rows, tokens, uses; keys and values of 2 heads of 8 in fp32
        assert (shared, last) == (full * 6 // 8, full * 4 // 8)

    def test_as_many_slots_as_iterations_change_nothing(self) -> None:
        model = model_of("1-2x3-1")
        found, _ = think(Passes(model, policy=CachePolicy(3)), TOKENS)
        torch.testing.assert_close(found, model(TOKENS), rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        ("4", {"halting": Halting("kl", 1e-3)}, r"--halt kl=0.001: the model runs without a loop \(depth 4\); give it one with"),
        ("4", {"policy": CachePolicy(1)}, "--cache last: the model runs without a loop"),
        ("0-2x4-0", {"halting": Halting("gate", 0.1)}, "--halt gate: the checkpoint has no gate; train one"),
        ("0-2x4-0", {"halting": Halting("kl", 0.1, minimum=5)}, "--min-loops 5: the loop runs 4 times at most"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_do_is_refused(depth: str, options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(MegaloopError, match=message):
        Passes(model_of(depth), **options)
