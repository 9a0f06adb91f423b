"""A run of many steps and many changes of depth, loop and topology holds no more memory and no more files in the end."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import megaloop.train.loop as loop
from megaloop.depth import GrowthStage
from megaloop.parallel.topology import Topology
from megaloop.train.report import Position, RunReporter
from tests.distributed import RankPool
from tests.train.runs import configuration, events, losses, train

STEPS = int(os.environ.get("MEGALOOP_SOAK_STEPS", "500"))
CHANGES = STEPS // 50
LIMIT = 0.05

Usage = tuple[int, int]
"""Resident bytes and open file descriptors."""


def _train_measured(values: dict[str, Any]) -> list[Usage]:
    """Run on this rank, from stage to stage on the other topology of two ranks; what it uses after each step."""
    used: list[Usage] = []
    stepped, topology = RunReporter.stepped, loop._Run._topology
    layouts = (Topology(1, 1, 2), Topology(2, 1, 1))
    page = os.sysconf("SC_PAGE_SIZE")

    def measuring(reporter: RunReporter, at: Position, *arguments: Any) -> None:
        stepped(reporter, at, *arguments)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        used.append((resident, len(os.listdir("/proc/self/fd"))))

    def alternating(run: loop._Run, stage: GrowthStage) -> Topology:
        return layouts[run._start.stages.index(stage) % 2]

    RunReporter.stepped = measuring  # type: ignore[method-assign, assignment]
    loop._Run._topology = alternating  # type: ignore[method-assign]
    try:
        train(values)
    finally:
        RunReporter.stepped = stepped  # type: ignore[method-assign]
        loop._Run._topology = topology  # type: ignore[method-assign]
    return used


def _quarters(values: list[int]) -> tuple[float, float]:
    """The medians of the first quarter and of the last."""
    size = len(values) // 4
    return median(values[:size]), median(values[-size:])


@pytest.mark.slow
def test_memory_and_files_stay_as_they_are(corpus: Path, tmp_path: Path) -> None:
    """One growth, then loops that come and go, each on another topology than before."""
    growth = {
        "start": 3,
        "block": 1,
        "schedule": [{"steps": STEPS // 50, "layers": 3}, {"steps": STEPS - STEPS // 50, "layers": 4}],
    }
    depths = ["1-2x2-1", "4"]
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
    for rank, usage in enumerate(used):
        for name, values_of in (("resident bytes", 0), ("file descriptors", 1)):
            first, last = _quarters([each[values_of] for each in usage])
            print(f"rank {rank}: {name} {first:,.0f} -> {last:,.0f} ({last / first - 1:+.2%})")
            assert abs(last - first) <= LIMIT * first, f"rank {rank}: {name} went from {first:,.0f} to {last:,.0f}"
