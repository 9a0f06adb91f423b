"""Contributions, effects of skipping and lenses equal those computed with hooks on transformers' own model, use by use of a loop.

Prompts of several lengths go through ours in one batch, filled up at their ends, and through theirs one by one. Tolerances are twice the
largest difference over all models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaloop.analysis.contributions import STATISTICS, contributions
from megaloop.analysis.effects import Setting, boundaries, local_effects, skip_effects
from megaloop.analysis.lens import AT_TARGETS, AT_TOKENS, lens
from tests.analysis.conftest import Pair

SETTINGS: list[Setting] = ["current", "future"]


def _close(found: Any, expected: Any, measured: float, what: str) -> None:
    difference = float((torch.as_tensor(found).double() - torch.as_tensor(expected).double()).abs().max())
    assert difference <= 2 * measured, f"{what}: {difference}"


def _boundaries(pair: Pair, setting: Setting) -> tuple[list[list[int]] | list[None], list[list[int]]]:
    """Those of each prompt, as the reference and as we are given them."""
    if setting == "current":
        return [None] * len(pair.prompts), []
    found = boundaries([len(prompt) for prompt in pair.prompts.prompts], 2, seed=123)
    assert [len(at) for at in found] == [1, 2, 1]
    return found, found


def test_contributions_and_cosines(pair: Pair) -> None:
    found = contributions(pair.traced, pair.batch)
    for row, prompt in enumerate(pair.prompts.prompts):
        expected = torch.tensor(pair.theirs.contributions(prompt.tokens.tolist()))
        assert expected.shape == (pair.ours.plan.depth, len(STATISTICS))
        _close(found[row] / len(prompt), expected, 3.7e-6, "contributions")


@pytest.mark.parametrize("setting", SETTINGS)
def test_effects_of_skipping(pair: Pair, setting: Setting) -> None:
    theirs, ours = _boundaries(pair, setting)
    found = skip_effects(pair.ours, pair.traced, pair.batch, setting, ours)
    for row, prompt in enumerate(pair.prompts.prompts):
        for place in range(pair.ours.plan.depth):
            later, output = pair.theirs.skipping(prompt.tokens.tolist(), place, theirs[row])
            _close(found.later_BLL[row, place], later, 2e-6, f"later {setting}")
            _close(found.output_BL[row, place], output, 1.1e-6, f"output {setting}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_local_effects(pair: Pair, setting: Setting) -> None:
    theirs, ours = _boundaries(pair, setting)
    found, depth = local_effects(pair.ours, pair.traced, pair.batch, setting, ours), pair.ours.plan.depth
    for row, prompt in enumerate(pair.prompts.prompts):
        expected = torch.zeros(depth, depth)
        for later in range(depth):
            for place in range(later):
                expected[place, later] = pair.theirs.local(prompt.tokens.tolist(), place, later, theirs[row])
        _close(found[row], expected, 1.5e-6, f"local {setting}")


def test_logit_lens_early_exit_and_deep_thinking(pair: Pair) -> None:
    found = lens(pair.ours, pair.traced, pair.batch)
    for row, prompt in enumerate(pair.prompts.prompts):
        expected = pair.theirs.lens(prompt.tokens.tolist(), prompt.targets.tolist())
        assert found.token_count_B[row] == len(prompt)
        assert found.target_count_B[row] == (prompt.targets >= 0).sum()
        for index, name in enumerate(AT_TOKENS):
            mean = found.tokens_BLK[row, :, index] / len(prompt)
            _close(mean, getattr(expected, name), 1e-6, f"lens {name}")
        for index, name in enumerate(AT_TARGETS):
            mean = found.targets_BLK[row, :, index] / found.target_count_B[row]
            _close(mean, getattr(expected, name), 1e-6, f"lens {name}")
        assert found.deep_B[row] / len(prompt) == pytest.approx(expected.deep, abs=1e-12)
