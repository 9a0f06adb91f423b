"""A pass that begins where an intervention first differs scores to the bit as the whole pass in that order does."""

from __future__ import annotations

import pytest
import torch

from megaloop.analysis.interventions import KINDS, score_targets, sweep
from megaloop.analysis.trace import trace
from megaloop.depth import LoopStyle
from tests.analysis.models import decoder, random_prompts, whole_batch
from tests.loop_styles import STYLES


@pytest.mark.parametrize("depth", ["2-2x2-1", "1-2x2-0"])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_every_intervention_scores_as_the_whole_pass_with_that_order(style: LoopStyle, depth: str) -> None:
    """Where a loop has an injection or a norm, and where it is the model's end, too."""
    model, batch = decoder(depth, style), whole_batch(random_prompts((9, 14)))
    calls = model.plan.calls()
    interventions = [one for kind in KINDS for one in sweep(kind, len(calls), 2 - len(calls) % 2)]
    found = score_targets(model, trace(model, batch.tokens_BS), batch, interventions)
    changed = 0
    for index, one in enumerate(interventions, start=1):
        whole = trace(model, batch.tokens_BS, calls=one.calls(calls))
        (expected,) = score_targets(model, whole, batch, []).unbind(1)
        assert torch.equal(found[:, index], expected), one
        changed += not torch.equal(expected, found[:, 0])
    assert changed > 0.9 * len(interventions)
