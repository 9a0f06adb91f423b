"""What is told of all prompts follows from each prompt alone: sums over tokens, largest effects, means of scores; and the signatures from that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megaloop.analysis import measures
from megaloop.analysis.contributions import STATISTICS, contributions
from megaloop.analysis.effective_depth import depth_score
from megaloop.analysis.effects import boundaries, local_effects, skip_effects
from megaloop.analysis.lens import AT_TOKENS, lens
from megaloop.analysis.measures import Subject
from megaloop.analysis.prompts import Prompt, PromptBatch, Prompts
from megaloop.analysis.signature_table import signature_table
from megaloop.analysis.trace import Trace, trace
from tests.analysis.models import CPU, decoder, random_prompts

LENGTHS = (40, 13, 26, 17)
MODEL = decoder("6")
PROMPTS = random_prompts(LENGTHS)
BLOCK = 3


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Effects are of the first 3 prompts, scores of the first of each difficulty."""
    monkeypatch.setattr(measures, "_EFFECT_PROMPTS", 3)
    monkeypatch.setattr(measures, "_SCORED_PROMPTS", 1)


def _subject(prompts: Prompts = PROMPTS) -> Subject:
    return Subject(MODEL, prompts, BLOCK, 123, None, lambda *_: None)


def _alone(numbers: Sequence[int]) -> list[tuple[Trace, PromptBatch]]:
    batches = [PROMPTS.batch([number], CPU) for number in numbers]
    return [(trace(MODEL, batch.tokens_BS), batch) for batch in batches]


def test_contributions_are_means_over_all_tokens_and_signatures_over_those_of_a_prompt() -> None:
    found = measures.contribution_curves(_subject())
    sums_PLK = torch.cat([contributions(*one) for one in _alone(range(4))]).numpy()
    for index, name in enumerate(STATISTICS):
        assert found.curves[name].values == pytest.approx(sums_PLK[..., index].sum(0) / sum(LENGTHS), rel=2e-5)
    sizes_PL = sums_PLK[..., 0] / np.array(LENGTHS)[:, None]
    np.testing.assert_allclose(found.by_prompt["attention_size"], sizes_PL, rtol=2e-5)


def test_effects_are_the_largest_of_the_first_prompts() -> None:
    found, at = measures.effect_matrices(_subject()), boundaries(LENGTHS[:3], 4, 123)
    for setting in ("current", "future"):
        each = [(one, batch, [at[number]]) for number, (one, batch) in enumerate(_alone(range(3)))]
        effects = [skip_effects(MODEL, one, batch, setting, own) for one, batch, own in each]
        local = [local_effects(MODEL, one, batch, setting, own) for one, batch, own in each]
        for name, values in (
            ("effect on later layers", [one.later_BLL for one in effects]),
            ("local effect", local),
        ):
            expected = torch.cat(values).amax(0)
            np.testing.assert_allclose(found.matrices[f"{setting} {name}"], expected, rtol=2e-5, atol=1e-6)
        output_L = torch.cat([one.output_BL for one in effects]).amax(0)
        assert found.curves[f"{setting} effect on the output"].values == pytest.approx(output_L.tolist(), rel=2e-5)


def test_depth_is_scored_by_the_mean_over_a_few_prompts_of_each_difficulty() -> None:
    levels = (2, -1, 2, 7)
    prompts = [Prompt(one.tokens, one.targets, None, level) for one, level in zip(PROMPTS.prompts, levels, strict=True)]
    found = measures.depth_scores(_subject(Prompts("levels", prompts)))
    numbers = (0, 1, 3)  # the third is the second of its difficulty
    at = boundaries([LENGTHS[number] for number in numbers], 4, 123)
    effects = [
        skip_effects(MODEL, *one, "future", [own]).output_BL for one, own in zip(_alone(numbers), at, strict=True)
    ]
    output_PL = torch.cat(effects).numpy()
    assert found.numbers["depth score"] == pytest.approx(depth_score(output_PL.mean(0)), rel=2e-5)
    assert found.numbers["depth score at difficulty 7"] == pytest.approx(depth_score(output_PL[2]), rel=2e-5)
    np.testing.assert_allclose(found.by_prompt["output"], output_PL, rtol=2e-5, atol=1e-6)
    assert found.by_prompt["difficulty"] == [[2.0], [-1.0], [7.0]]
    assert found.labels == {"boundaries": ["at random"]}


def test_the_overlap_is_that_before_the_last_layer() -> None:
    sums = [lens(MODEL, *one) for one in _alone(range(4))]
    overlap_P = [float(one.tokens_BLK[0, 5, AT_TOKENS.index("overlap")]) for one in sums]
    found = measures.lens_curves(_subject())
    assert [row[0] for row in found.by_prompt["overlap at the last layer"]] == pytest.approx(overlap_P, rel=1e-5)
    assert [row[1] for row in found.by_prompt["overlap at the last layer"]] == list(LENGTHS)
    (row,) = signature_table({"lens": found}, BLOCK)
    assert row.name == "overlap at the last layer"
    assert row.value == pytest.approx(sum(overlap_P) / sum(LENGTHS), rel=1e-5)


def test_what_is_erased_is_put_in_by_the_mean_over_the_tokens_of_the_first_prompts() -> None:
    mean_LD = measures._mean_residuals(_subject())
    for place in range(6):
        states = torch.cat([one.layers[place].h_BSD[0] for one, _ in _alone(range(3))])
        torch.testing.assert_close(mean_LD[place], states.mean(0), rtol=1e-5, atol=1e-5)


def test_signatures_read_the_curves_that_they_are_named_after() -> None:
    results = {
        "contributions": measures.contribution_curves(_subject()),
        **{kind: measures.intervention_curves(_subject(), kind) for kind in ("skip", "swap", "repeat")},
    }
    rows = {row.name: row for row in signature_table(results, BLOCK)}
    targets = sum(int((prompt.targets >= 0).sum()) for prompt in PROMPTS.prompts)

    def rise(kind: str, name: str) -> NDArray[np.float64]:
        by_prompt = results[kind].by_prompt
        return (np.array(by_prompt[name]) - np.array(by_prompt["loss without"])).sum(0) / targets

    skip_L, swap_I = rise("skip", "skip 1"), rise("swap", "swap 1")
    assert rows["late layers indispensable"].value == pytest.approx(skip_L[5] - skip_L[1:5].mean(), rel=1e-6)
    ends, middle = swap_I[[0, 4]].mean(), swap_I[1:4].mean()
    assert rows["middle permutable"].value == pytest.approx(ends - middle, rel=1e-6)
    sums_PI = np.array(results["repeat"].by_prompt[f"repeat {BLOCK} +1"])
    assert sums_PI.shape == (4, 4)
    gain_PI = np.array(results["repeat"].by_prompt["loss without"]) - sums_PI
    counts_P = np.array(results["repeat"].by_prompt["targets"])[:, 0]
    halves = ([0, 2], [1, 3])
    gains = [
        gain_PI[other, gain_PI[own].sum(0).argmax()].sum() / counts_P[other].sum()
        for own, other in (halves, halves[::-1])
    ]
    assert rows["gain from repeating a block"].value == pytest.approx(np.mean(gains), rel=1e-6)
    assert f"period of {BLOCK}" in rows
