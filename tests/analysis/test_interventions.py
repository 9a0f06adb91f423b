"""A pass that begins where an intervention first differs scores to the bit as the whole pass in that order does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megaloop.analysis.edits import Calls
from megaloop.analysis.interventions import KINDS, score_targets, sweep
from megaloop.analysis.prompts import PromptBatch
from megaloop.depth import LoopStyle
from megaloop.model import Decoder
from tests.analysis.models import decoder, random_prompts, whole_batch
from tests.loop_styles import STYLES


@torch.no_grad()
def _whole(model: Decoder, batch: PromptBatch, calls: Calls) -> Tensor:
    """Loss and correct predictions of each prompt, from all layers at once."""
    x_BSD = model.run(batch.tokens_BS, calls, first=True, last=False)
    asked_BS = batch.targets_BS >= 0
    logits_MV, target_M = model.logits(x_BSD[asked_BS].unsqueeze(0))[0], batch.targets_BS[asked_BS]
    each_M2 = torch.stack([cross_entropy(logits_MV, target_M, reduction="none"), logits_MV.argmax(1) == target_M], 1)
    return torch.stack([of_prompt.double().sum(0) for of_prompt in each_M2.split(asked_BS.sum(1).tolist())])


@pytest.mark.parametrize("depth", ["2-2x2-1", "1-2x2-0"])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_every_intervention_scores_as_the_whole_pass_with_that_order(style: LoopStyle, depth: str) -> None:
    """Where a loop has an injection or a norm, and where it is the model's end, too."""
    model, batch = decoder(depth, style), whole_batch(random_prompts((9, 14)))
    calls = model.plan.calls()
    interventions = [one for kind in KINDS for one in sweep(kind, len(calls), 2 - len(calls) % 2)]
    found = score_targets(model, batch, [calls, *(one.calls(calls) for one in interventions)])
    changed = 0
    for index, one in enumerate(interventions, start=1):
        expected = _whole(model, batch, one.calls(calls))
        assert torch.equal(found[:, index], expected), one
        changed += not torch.equal(expected, found[:, 0])
    assert changed > 0.9 * len(interventions)
