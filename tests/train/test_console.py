"""What a person reads of a run's events."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megaloop.config.changes import ChangedSetting
from megaloop.depth import DepthPlan
from megaloop.layout.topology import Topology
from megaloop.runs import events
from megaloop.train.console import lines
from tests.runs.test_events import ALL, FLIGHT, LARGE, LOOPED, SMALL, STARTED


def test_a_start_says_what_was_built_from_what_on_what() -> None:
    assert list(lines(STARTED)) == [
        "run run  on a machine",
        "model 0.0M parameters, 2 layers, vocabulary 64, fp32",
        "2 ranks: pp 1 x tp 1 x dp 2, layers per stage 3, 2 micro-batches of 1",
        "kernels: attention torch SDPA, norm torch, Adam torch fused",
        "data",
    ]
    resumed = replace(STARTED, step=4, checkpoint=Path("step-00000004"), operator="midas")
    assert list(lines(resumed))[-2:] == [
        "growth midas: 2 layers until step 10", "resuming step-00000004 at step 4"
    ]  # fmt: skip


def test_rounds_are_told_apart_in_the_layers_of_a_stage() -> None:
    layout = events.Layout(Topology(2, 1, 1), (((0, 2), (2, 3)), ((3, 5), (5, 6))), 4, 1)
    line = list(lines(replace(STARTED, layout=layout)))[2]
    assert line == "2 ranks: pp 2 x tp 1 x dp 1, layers per stage 2+2, 1+1, 4 micro-batches of 1"


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (events.Validated(20, 3.25, 1.5), "step 20  validation loss 3.2500  1.5000 bits/byte"),
        (
            events.Saved(20, 1.25, 123_456_789, Path("checkpoints/step-00000020"), 0.0),
            "step 20  saved checkpoints/step-00000020  118 MiB in 1.2 s",
        ),
        (events.Grown(4, SMALL, LARGE, 3.25), "step 4  grown from 2 to 3 layers while loading; validation loss 3.2500"),
        (
            events.LoopChanged(4, SMALL, LOOPED, 3.25),
            "step 4  changed from 2 layers to 0-2x2-0 (2 layers, 4 deep) while loading; validation loss 3.2500",
        ),
        (
            events.Grown(4, SMALL, LARGE, 3.25, FLIGHT),
            "step 4  grown from 2 to 3 layers in 1.50 s, 0.0234 KiB moved, 0.0078 KiB in place; validation loss 3.5000 -> 3.2500",
        ),
        (
            events.ScheduleChanged(4, 1e-3, 2e-3, 4, 8),
            "step 4  warning: this run was finished (train.steps was 4, now 8): its learning rate jumps from 1.00e-03 to "
            "2.00e-03; to train longer, resume from before its cooldown",
        ),
        (
            events.ScheduleChanged(4, None, 2e-3, None, 8),
            "step 4  warning: the schedule is another than that of the steps so far: the learning rate jumps to 2.00e-03",
        ),
        (
            events.SettingsChanged(
                4, (ChangedSetting("optimizer.beta2", 0.95, 0.99), ChangedSetting("growth", {"start": 4}, None))
            ),
            'step 4  other settings than so far: optimizer.beta2 0.99 (was 0.95), growth null (was {"start": 4})',
        ),
        (events.SaveFailed(4, "full, then go on with --resume"), "step 4  warning: full"),
        (events.EndedEarly(4, None, None), "stopped after step 4, which is saved; add --resume to go on"),
        (events.EndedEarly(0, 9, "train it"), "stopped before the first step; go on with: train it --stop-at 9"),
        (
            events.GrowthSavings(10, 750, 1000.0, 100),
            "750 FLOPs, 75.0% of what 10 steps at full depth cost: growing saved 25.0%, as much as 2 steps at full depth",
        ),
        (
            events.RolledBack(4, 8, "a spike", (16, 24)),
            "step 8  a spike: going back to step 4; samples 16 to 23 are excluded",
        ),
    ],
)
def test_an_event_in_words(event: events.Event, expected: str) -> None:
    assert next(iter(lines(event))) == expected


@pytest.mark.parametrize(("event", "_"), ALL)
def test_only_what_others_say_is_silent(event: events.Event, _: list[str]) -> None:
    """What a resume discards is of no interest, and the last lines say how the run has ended."""
    assert bool(list(lines(event))) == (not isinstance(event, events.RunResumed | events.RunStopped))


def test_a_plan_of_no_loop_is_its_number_of_layers() -> None:
    line = list(lines(replace(STARTED, plan=DepthPlan.plain(1))))[1]
    assert ", 1 layer, " in line
