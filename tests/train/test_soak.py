"""A run of many steps and many changes of depth, loop and topology holds no more memory and no more files in the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

import megaloop.train.loop as loop
from megaloop.depth import GrowthStage
from megaloop.layout.topology import Topology
from megaloop.train.report import RunReporter
from tests.distributed import RankPool
from tests.train.runs import configuration, events, losses, train

STEPS = int(os.environ.get("MEGALOOP_SOAK_STEPS", "600"))
CHANGES = STEPS // 50
LIMIT = 0.05
DEPTHS = {"1-2x2-1": 6, "4": 4}
"""What the depth changes to, again and again, and how many layers each runs."""


@dataclass(frozen=True)
class _Usage:
    """What a rank holds after a step.

    Attributes:
        depth: layers executed, which tell the loop and the topology apart: each has its own process groups.
    """

    depth: int
    resident_bytes: int
    descriptors: int


def _train_measured(values: dict[str, Any]) -> list[_Usage]:
    """Run on this rank, from stage to stage on the other topology of two ranks; what it uses after each step."""
    used: list[_Usage] = []
    stepped, topology = RunReporter.stepped, loop._Run._topology
    layouts = (Topology(1, 1, 2), Topology(2, 1, 1))
    page, depth = os.sysconf("SC_PAGE_SIZE"), 0

    def measuring(reporter: RunReporter, *arguments: Any) -> None:
        stepped(reporter, *arguments)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        used.append(_Usage(depth, resident, len(os.listdir("/proc/self/fd"))))

    def alternating(run: loop._Run, stage: GrowthStage) -> Topology:
        nonlocal depth
        depth = stage.plan.depth
        return layouts[run._start.stages.index(stage) % 2]

    RunReporter.stepped = measuring  # type: ignore[method-assign, assignment]
    loop._Run._topology = alternating  # type: ignore[method-assign, assignment]
    try:
        train(values)
    finally:
        RunReporter.stepped = stepped  # type: ignore[method-assign]
        loop._Run._topology = topology  # type: ignore[method-assign]
    return used


def _quarters(usage: list[_Usage], value: Callable[[_Usage], int]) -> tuple[float, float]:
    """The first quarter's and the last's: of each the mean over the depths, of which each counts with its median."""
    size = len(usage) // 4
    found = []
    for quarter in (usage[:size], usage[-size:]):
        by_depth = [[value(item) for item in quarter if item.depth == depth] for depth in DEPTHS.values()]
        found.append(mean(median(values) for values in by_depth))
    return found[0], found[1]


@pytest.mark.slow
def test_memory_and_files_stay_as_they_are(corpus: Path, tmp_path: Path) -> None:
    """One growth, then loops that come and go, each on another topology than before."""
    growth = {
        "start": 3,
        "block": 1,
        "schedule": [{"steps": STEPS // 50, "layers": 3}, {"steps": STEPS - STEPS // 50, "layers": 4}],
    }
    depths = list(DEPTHS)
    changes = [{"at": (number + 1.5) / (CHANGES + 1), "depth": depths[number % 2]} for number in range(CHANGES - 1)]
    values = configuration(
        corpus,
        tmp_path / "run",
        (1, 1, 2),
        depth="4",
        growth=growth,
        depth_events=changes,
        train__steps=STEPS,
        validation__every=100,
        checkpoint__every=20,
        checkpoint__keep=2,
    )
    values["logging"]["tensorboard"] = True
    with RankPool(2) as pool:  # ranks of its own: the session's have seen other runs
        used = pool.run(_train_measured, values, timeout=1800)
    assert len(losses(tmp_path / "run")) == STEPS
    assert len(events(tmp_path / "run", "grow")) + len(events(tmp_path / "run", "loop")) == CHANGES
    values_of: dict[str, Callable[[_Usage], int]] = {
        "resident bytes": lambda usage: usage.resident_bytes,
        "file descriptors": lambda usage: usage.descriptors,
    }
    for rank, usage in enumerate(used):
        for name, value in values_of.items():
            first, last = _quarters(usage, value)
            told = f"rank {rank}: {name} {first:,.1f} in the first quarter, {last:,.1f} in the last ({last / first - 1:+.2%})"
            print(told)
            assert abs(last - first) <= LIMIT * first, told
