"""What happens to a run: its lines of ``events.jsonl`` are as docs/RUNS.md describes them, and sinks get them all."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from megaloop.checkpoint import RunState
from megaloop.config.changes import ChangedSetting
from megaloop.depth import DepthPlan, Growth, GrowthStage
from megaloop.errors import MegaloopError
from megaloop.layout.topology import Topology
from megaloop.model import Kernels
from megaloop.runs import events
from megaloop.runs.allow import Allow
from megaloop.runs.metrics import EVENTS, METRICS, RANKS, RankRecord, RanksRecord, StepRecord
from megaloop.runs.sinks import Hub, RunFiles, Sink, append_event
from tests.runs.test_metrics import RECORD, lines

DOCS = (Path(__file__).parents[2] / "docs" / "RUNS.md").read_text(encoding="utf-8")
COMMON = ["event", "step", "time", "seconds", "bytes"]
SMALL, LARGE, LOOPED = DepthPlan.plain(2), DepthPlan((0, 1, 2), {2: 1}), DepthPlan.parse("0-2x2-0")
LAYOUT = events.Layout(Topology(1, 1, 2), (((0, 3),),), 2, 1)
FLIGHT = events.InFlight(Topology(1, 1, 2), LAYOUT, 1.5, 1.0, 0.25, (8, 16), (4, 4), 3.5)
STARTED = events.RunStarted(
    0, directory=Path("run"), machine="a machine", plan=SMALL, layout=LAYOUT, parameters=1000, vocab_size=64,
    precision="fp32", kernels=Kernels(), torch="2", data="data", state=RunState.fresh(),
    stages=[GrowthStage(0, 10, SMALL, Growth.none(SMALL))], operator=None, checkpoint=None, restarts=1, seconds=2.0,
)  # fmt: skip
LIVE = [
    "live", "plan_before", "plan", "topology_before", "topology", "build_seconds", "exchange_seconds", "moved_bytes",
    "in_place_bytes", "loss_before", "loss_after",
]  # fmt: skip

ALL: list[tuple[events.Event, list[str]]] = [
    (STARTED, ["plan", "pp", "tp", "dp", "parameters", "attention", "norm", "adam", "torch", "ranks", "restarts"]),
    (events.RunResumed(4, 2), ["discarded"]),
    (events.Grown(4, SMALL, LARGE, 3.25, FLIGHT), LIVE),
    (events.Grown(4, SMALL, LARGE, 3.25), ["live", "plan_before", "plan", "loss_after"]),
    (events.LoopChanged(4, SMALL, LOOPED, 3.25, FLIGHT), LIVE),
    (events.LoopChanged(4, SMALL, LOOPED, 3.25), ["live", "plan_before", "plan", "loss_after"]),
    (events.Saved(4, 1.5, 1 << 20, Path("checkpoints/step-00000004"), 0.5), ["path", "stall_seconds"]),
    (events.Saved(4, 1.5, 9, Path("step"), 0.5, "not permitted"), ["path", "stall_seconds", "not_deleted"]),
    (events.SaveFailed(4, "no room"), ["reason"]),
    (events.StepSkipped(4, float("inf"), 1), ["grad_norm", "skipped"]),
    (events.Spiked(4, 9.0, 3.0, 0.5), ["loss", "median", "deviation"]),
    (events.CheckpointPassedOver(4, 8, "damaged"), ["step_before", "reason"]),
    (events.RolledBack(4, 8, "a spike", (16, 24)), ["step_before", "reason", "samples"]),
    (events.ConfigChanged(4, Allow.seed, "it was 1, and is 2"), ["what", "text"]),
    (events.SettingsChanged(4, (ChangedSetting("optimizer.beta2", 0.95, 0.9),)), ["changes"]),
    (events.ScheduleChanged(4, 1e-3, 2e-3, 4, 8), ["lr_before", "lr", "steps_before", "steps"]),
    (events.Signalled(4, "SIGTERM"), ["name"]),
    (events.RunStopped(4, 9.5, "finished"), ["reason"]),
]  # fmt: skip
"""An event of each kind, and of each shape of it; and its keys after those that all have, in order."""

VALUES = {"changed": {"data", "seed", "batch"}, "stop": {"finished", "stop_at", "rollback", "interrupted"}}
"""What stands in the documentation of a kind as code without being one of its keys."""


def _kinds(event: type[events.Event]) -> set[str]:
    own = {event.kind} if event.kind else set()
    return own.union(*(_kinds(subclass) for subclass in event.__subclasses__()))


def _documented(kind: str) -> set[str]:
    """The words that stand as code in the row of a kind; of one that is like the kind above it, also those of that."""
    (row,) = re.findall(rf"^\| `{kind}` \| (.*) \|$", DOCS.split("## events.jsonl")[1], re.MULTILINE)
    words = set(re.findall(r"`([a-z_]+)`", row))
    return words | _documented("grow") if row.startswith("the same") else words


def test_every_kind_of_event_is_documented() -> None:
    (listed,) = re.findall(r"^\| `event` \| *\| (.*) \|$", DOCS, re.MULTILINE)
    assert set(re.findall(r"`([a-z_]+)`", listed)) == _kinds(events.Event) == {event.kind for event, _ in ALL}


@pytest.mark.parametrize(
    ("event", "keys"), ALL, ids=lambda value: value.kind if isinstance(value, events.Event) else ""
)
def test_an_event_has_the_documented_keys(event: events.Event, keys: list[str]) -> None:
    record = event.to_json()
    assert list(record) == [*COMMON, *keys]
    assert event.kind is not None
    assert set(keys) - _documented(event.kind) == set(), "not documented"
    assert json.loads(json.dumps(record, allow_nan=False))["event"] == event.kind


@pytest.mark.parametrize("kind", sorted(_kinds(events.Event)))
def test_every_documented_key_is_written(kind: str) -> None:
    written = {key for event, _ in ALL if event.kind == kind for key in event.to_json()}
    assert _documented(kind) - VALUES.get(kind, set()) - written == set()


def test_events_say_what_when_how_long_and_how_much(tmp_path: Path) -> None:
    with closing(RunFiles(tmp_path)) as files:
        files.event(events.Saved(200, 1.5, 1 << 20, Path("checkpoints/step-00000200"), 0.5))
        files.event(events.Validated(200, 3.0, 1.0))  # only to be shown
        files.event(events.Spiked(200, float("nan"), 3.0, 0.5))
        save, spike = lines(tmp_path / EVENTS)  # while the run goes on
    assert datetime.now(UTC) - datetime.fromisoformat(save.pop("time")) < timedelta(minutes=1)
    assert save == {
        "event": "save", "step": 200, "seconds": 1.5, "bytes": 1 << 20, "path": "checkpoints/step-00000200",
        "stall_seconds": 0.5,
    }  # fmt: skip
    assert (spike["seconds"], spike["bytes"], spike["loss"], spike["median"]) == (None, None, None, 3.0)


def test_ranks_are_recorded_with_the_documented_keys(tmp_path: Path) -> None:
    ranks = [RankRecord(0.5, 100, 1000.0, "a"), RankRecord(0.25, 200, 1000.5, "b")]
    with closing(RunFiles(tmp_path)) as files:
        files.ranks(RanksRecord(50, Topology(2, 1, 1), ranks))
    (record,) = lines(tmp_path / RANKS)
    table = DOCS.split("## ranks.jsonl")[1].split("##")[0]
    documented = re.findall(r"`([a-z_]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert list(record) == documented
    assert record["clock_seconds"] == [0.0, 0.5]
    assert (record["busy_seconds"], record["memory_bytes"], record["hosts"]) == ([0.5, 0.25], [100, 200], ["a", "b"])


class _Tracker(Sink):
    """All that a tracker is: a class with the methods that it has a use for."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def step(self, record: StepRecord) -> None:
        self.seen.append(record.step)

    def event(self, event: events.Event) -> None:
        self.seen.append(type(event))


def test_a_hub_sends_everything_to_every_sink(tmp_path: Path) -> None:
    hub, tracker = Hub(), _Tracker()
    hub.event(STARTED)  # a rank without sinks
    hub.add(RunFiles(tmp_path))
    hub.add(tracker)
    hub.event(STARTED)
    hub.step(RECORD)
    hub.step(replace(RECORD, step=2))
    hub.close()
    assert tracker.seen == [events.RunStarted, 1, 2]
    assert [record["step"] for record in lines(tmp_path / METRICS)] == [1, 2]
    assert [record["event"] for record in lines(tmp_path / EVENTS)] == ["start"]


def test_a_full_disk_is_told_once(tmp_path: Path) -> None:
    class Full(Sink):
        waiting = 0

        def step(self, record: StepRecord) -> None:
            self.waiting += 1

    hub, tracker = Hub(), _Tracker()
    hub.add(Full())
    hub.add(tracker)
    hub.step(RECORD)
    hub.step(RECORD)
    assert tracker.seen == [1, events.DiskFull, 1]


def test_all_sinks_are_closed_although_one_fails(tmp_path: Path) -> None:
    closed: list[str] = []

    class Closing(Sink):
        def __init__(self, name: str):
            self._name = name

        def close(self) -> None:
            closed.append(self._name)
            if self._name == "second":
                raise MegaloopError("cannot be written")

    hub = Hub()
    for name in ("first", "second", "third"):
        hub.add(Closing(name))
    with pytest.raises(MegaloopError, match="cannot be written"):
        hub.close()
    assert closed == ["third", "second", "first"]


def test_an_event_is_added_to_those_that_are_there(tmp_path: Path) -> None:
    append_event(tmp_path, STARTED)
    append_event(tmp_path, events.RunResumed(4, 1))
    assert [(record["event"], record["step"]) for record in lines(tmp_path / EVENTS)] == [("start", 0), ("resume", 4)]
