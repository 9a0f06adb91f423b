"""``megaloop doctor``: what happened to a run, read from its directory alone, in plain words."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megaloop.checkpoint import list_checkpoints, list_damaged
from megaloop.errors import MegaloopError
from megaloop.parallel.topology import Topology
from megaloop.train.metrics import EVENTS, METRICS, RANKS
from megaloop.train.progress import format_bytes
from megaloop.train.rundir import DISCARDED, is_held
from megaloop.train.watchdog import STACKS

__all__ = ["Diagnosis", "Finding", "examine"]

Level = Literal["good", "note", "warning"]

_SLOW = 1.1
"""A rank that computes so many times as long as those of its pipeline stage is slow."""
_UNEVEN = 1.15
"""Pipeline stages of which the longest takes so many times the mean are unevenly filled."""
_GAP, _GAP_SECONDS = 10.0, 5.0
"""A step so many times as long as the median, and so many seconds longer, is a gap."""
_CLOCK = 1.0
"""Seconds by which clocks may differ."""
_GROWING = 1.05
"""How many times the memory of its first quarter a run may take in its last."""


@dataclass(frozen=True)
class Finding:
    """One thing to say of a run."""

    level: Level
    topic: str
    text: str


@dataclass
class Diagnosis:
    """What is known of a run.

    Attributes:
        state: ``running``, ``finished``, ``stopped`` (on purpose, to be continued), ``failed``, or ``killed``.
        steps: optimizer steps that the run has behind it.
        starts: how often it was started; ``killed``: how many of these ended without a word.
        lost_steps, lost_seconds: trained and then trained again, because they came after the checkpoint resumed.
        down_seconds: from the last word of one start to the beginning of the next.
    """

    run: str
    state: str = "empty"
    steps: int = 0
    starts: int = 0
    killed: int = 0
    lost_steps: int = 0
    lost_seconds: float = 0.0
    down_seconds: float = 0.0
    skipped_steps: int = 0
    spikes: int = 0
    rollbacks: int = 0
    failed_saves: int = 0
    stall_seconds: float = 0.0
    slowest_ranks: list[int] = field(default_factory=list)
    stage_imbalance: float | None = None
    disk_free_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: Level, topic: str, text: str) -> None:
        self.findings.append(Finding(level, topic, text))


def examine(run: Path) -> Diagnosis:
    """Read a run's directory; nothing in it is changed, and it may be alive.

    Raises:
        MegaloopError: there is no run.
    """
    if not (run / EVENTS).is_file() and not (run / METRICS).is_file():
        raise MegaloopError(f"{run}: no run; expected a directory with {EVENTS} and {METRICS} in it")
    events, metrics = list(_lines(run / EVENTS)), list(_lines(run / METRICS))
    discarded, ranks = list(_lines(run / DISCARDED)), list(_lines(run / RANKS))
    diagnosis = Diagnosis(str(run))
    diagnosis.steps = max((record["step"] for record in metrics if isinstance(record.get("step"), int)), default=0)
    _starts(diagnosis, events, is_held(run))
    _losses(diagnosis, discarded, metrics)
    _numbers(diagnosis, events)
    _checkpoints(diagnosis, run, events)
    _steps(diagnosis, metrics)
    _ranks(diagnosis, ranks)
    _stacks(diagnosis, run)
    return diagnosis


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; lines that are none (the one being written) are passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise MegaloopError(f"{path}: cannot be read ({error.strerror})") from None
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _starts(diagnosis: Diagnosis, events: list[dict[str, Any]], alive: bool) -> None:
    """How it was started and how it ended, each time; and how it is now."""
    last: dict[str, Any] | None = None
    ended, rolled_back = True, False
    for event in events:
        kind = event.get("event")
        # a resume opens a start; the start event follows when everything is built
        if kind == "start":
            diagnosis.starts += not rolled_back  # which is the same processes going on
            rolled_back = False
        if kind == "stop":
            rolled_back = event.get("reason") == "rollback"
        if kind in ("resume", "start") and not ended and last and last.get("event") != "resume":
            diagnosis.killed += 1
            where = f"after step {last.get('step')}, {_clock(last)}"
            diagnosis.add("warning", "restarts", f"a start ended without a word ({where}): killed, or its node died")
            ended = True
        if kind in ("resume", "start") and last and last.get("event") == "stop":
            diagnosis.down_seconds += max(_time(event) - _time(last) - (event.get("seconds") or 0.0), 0.0)
        if kind == "start":
            ended = False
        if kind == "stop":
            ended = True
            _ending(diagnosis, event)
        last = event
    stop = next((event for event in reversed(events) if event.get("event") == "stop"), None)
    reason = str(stop.get("reason")) if stop and ended else ""
    if alive:
        diagnosis.state = "running"
    elif not events:
        diagnosis.state = "empty"
    elif not ended:
        diagnosis.state = "killed"
        diagnosis.killed += 1
        assert last is not None
        text = f"the last start ended without a word (after step {last.get('step')}, {_clock(last)}); resume it with --resume"
        diagnosis.add("warning", "restarts", text)
    elif reason == "finished":
        diagnosis.state = "finished"
    elif reason == "stop_at" or reason.startswith("signal") or reason == "interrupted":
        diagnosis.state = "stopped"
    else:
        diagnosis.state = "failed"
    if diagnosis.starts > 1:
        diagnosis.add(
            "note", "restarts", f"started {diagnosis.starts} times, of which {diagnosis.killed} ended without a word"
        )
    if diagnosis.down_seconds >= 1:
        diagnosis.add(
            "note", "restarts", f"{_duration(diagnosis.down_seconds)} between orderly ends and the next start"
        )


def _ending(diagnosis: Diagnosis, stop: dict[str, Any]) -> None:
    reason = str(stop.get("reason"))
    if reason.startswith("error"):
        diagnosis.add("warning", "restarts", f"step {stop.get('step')}: {reason}")
    elif reason.startswith("signal"):
        diagnosis.add(
            "note", "restarts", f"step {stop.get('step')}: saved and left, as {reason.removeprefix('signal ')} asked"
        )


def _losses(diagnosis: Diagnosis, discarded: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> None:
    diagnosis.lost_steps = len(discarded)
    diagnosis.lost_seconds = sum(each["seconds"] for each in discarded if isinstance(each.get("seconds"), float))
    if diagnosis.lost_steps:
        spent = sum(each["seconds"] for each in metrics if isinstance(each.get("seconds"), float))
        share = f", {diagnosis.lost_seconds / (spent + diagnosis.lost_seconds):.1%} of all training" if spent else ""
        text = f"{diagnosis.lost_steps} steps ({_duration(diagnosis.lost_seconds)}{share}) were trained again after restarts and rollbacks"
        diagnosis.add("note", "lost steps", f"{text}; a smaller checkpoint.every loses fewer")


def _numbers(diagnosis: Diagnosis, events: list[dict[str, Any]]) -> None:
    """Steps that were skipped, spikes, and going back."""
    of = {kind: [event for event in events if event.get("event") == kind] for kind in ("skip", "spike", "rollback")}
    diagnosis.skipped_steps, diagnosis.spikes = len(of["skip"]), len(of["spike"])
    diagnosis.rollbacks = len(of["rollback"])
    if of["skip"]:
        steps = _few([str(event.get("step")) for event in of["skip"]])
        diagnosis.add("warning", "numbers", f"{len(of['skip'])} steps without a finite gradient were skipped: {steps}")
    if of["spike"]:
        steps = _few([f"{event.get('step')} ({event.get('loss', 0):.2f})" for event in of["spike"]])
        diagnosis.add("note", "numbers", f"{len(of['spike'])} spikes of the loss: step {steps}")
    for event in of["rollback"]:
        text = f"went back from step {event.get('step_before')} to {event.get('step')}: {event.get('reason')}"
        if event.get("samples"):
            first, stop = event["samples"]
            text += f"; samples {first} to {stop - 1} are passed over"
        diagnosis.add("warning", "numbers" if event.get("samples") else "checkpoints", text)


def _checkpoints(diagnosis: Diagnosis, run: Path, events: list[dict[str, Any]]) -> None:
    """How saving went, and for how many more there is room."""
    saves = [event for event in events if event.get("event") == "save"]
    failed = [event for event in events if event.get("event") == "save_failed"]
    diagnosis.failed_saves = len(failed)
    diagnosis.stall_seconds = sum(event.get("stall_seconds") or 0.0 for event in saves)
    whole, damaged = list_checkpoints(run / "checkpoints"), list_damaged(run / "checkpoints")
    if whole:
        behind = diagnosis.steps - int(whole[-1].name.removeprefix("step-"))
        ago = f", {behind} steps ago" if behind > 0 else ""
        stall = (
            f"; training stood still for {_duration(diagnosis.stall_seconds)} in {len(saves)} saves" if saves else ""
        )
        diagnosis.add("good", "checkpoints", f"{len(whole)} whole, the newest {whole[-1].name}{ago}{stall}")
    elif diagnosis.steps:
        diagnosis.add("warning", "checkpoints", "none is whole: a run that ends now begins anew")
    if damaged:
        diagnosis.add("warning", "checkpoints", f"set aside as damaged: {_few([path.name for path in damaged])}")
    if failed:
        steps = _few([str(event.get("step")) for event in failed])
        text = f"{len(failed)} could not be saved (step {steps}); the last time: {failed[-1].get('reason')}"
        diagnosis.add("warning", "checkpoints", text)
    diagnosis.disk_free_bytes = free = shutil.disk_usage(run).free
    size = next((event["bytes"] for event in reversed(saves) if event.get("bytes")), None)
    if size:
        room = free // size
        text = f"{format_bytes(free)} free, room for {room} more checkpoints of {format_bytes(size)}"
        diagnosis.add("good" if room >= 2 else "warning", "disk", text)
    else:
        diagnosis.add("good", "disk", f"{format_bytes(free)} free")


def _steps(diagnosis: Diagnosis, metrics: list[dict[str, Any]]) -> None:
    """Steps that took much longer than their neighbours, and memory that grows."""
    timed = [each for each in metrics if isinstance(each.get("seconds"), float)]
    for depth in sorted({(each.get("layers"), each.get("depth"), each.get("dp")) for each in timed}, key=str):
        same = [each for each in timed if (each.get("layers"), each.get("depth"), each.get("dp")) == depth]
        median = statistics.median(each["seconds"] for each in same)
        gaps = [each for each in same[1:] if each["seconds"] > max(_GAP * median, median + _GAP_SECONDS)]
        if gaps:
            which = _few([f"{each['step']} ({_duration(each['seconds'])})" for each in gaps])
            diagnosis.add(
                "warning", "speed", f"{len(gaps)} steps took far longer than the median of {median:.2f} s: {which}"
            )
        known = [each["memory_bytes"] for each in same if isinstance(each.get("memory_bytes"), int)]
        if len(known) >= 200:
            quarter = len(known) // 4
            first, last = statistics.median(known[:quarter]), statistics.median(known[-quarter:])
            if last > _GROWING * first:
                text = f"rank 0's grew from {format_bytes(int(first))} to {format_bytes(int(last))} at the same depth"
                diagnosis.add("warning", "memory", text)


def _ranks(diagnosis: Diagnosis, records: list[dict[str, Any]]) -> None:
    """Ranks that compute longer than those who do the same work, stages with more work, and clocks."""
    if not records:
        return
    shape = tuple(records[-1][key] for key in ("pp", "tp", "dp"))
    topology = Topology(*shape)
    same = [each for each in records if tuple(each[key] for key in ("pp", "tp", "dp")) == shape][-50:]
    hosts = same[-1]["hosts"]
    busy = [statistics.median(each["busy_seconds"][rank] for each in same) for rank in range(topology.world_size)]
    stages = [
        statistics.median(seconds for rank, seconds in enumerate(busy) if topology.coordinate(rank).pp == stage)
        for stage in range(topology.pp)
    ]
    for rank, seconds in enumerate(busy):
        usual = stages[topology.coordinate(rank).pp]
        if seconds > _SLOW * usual:
            diagnosis.slowest_ranks.append(rank)
            text = f"rank {rank} ({hosts[rank]}) computes {seconds / usual - 1:.0%} longer than the others of its stage"
            diagnosis.add("warning", "ranks", text)
    if topology.pp > 1:
        diagnosis.stage_imbalance = max(stages) / statistics.mean(stages)
        parts = ", ".join(f"{seconds:.3f}" for seconds in stages)
        text = f"pipeline stages compute {parts} s per step, the longest {diagnosis.stage_imbalance:.2f} times the mean"
        if diagnosis.stage_imbalance > _UNEVEN:
            text += "; set parallel.layer_costs from megaloop bench layers"
            diagnosis.add("warning", "stages", text)
        else:
            diagnosis.add("good", "stages", text)
    offsets = {host: statistics.median(each["clock_seconds"][rank] for each in same) for rank, host in enumerate(hosts)}
    wrong = [f"{host} by {seconds:+.1f} s" for host, seconds in offsets.items() if abs(seconds) > _CLOCK]
    if wrong:
        diagnosis.add("warning", "clocks", f"differ from rank 0's: {_few(wrong)}; logs of several hosts do not line up")


def _stacks(diagnosis: Diagnosis, run: Path) -> None:
    """Ranks that hung."""
    hung = [
        path.stem.removeprefix("rank-")
        for path in sorted((run / STACKS).glob("rank-*.txt"))
        if "most recent call first" in path.read_text(errors="replace")
    ]
    if hung:
        text = f"a step took longer than faults.step_limit; stacks of rank {_few(hung)} are in {run / STACKS}"
        diagnosis.add("warning", "hangs", text)


def _few(words: list[str]) -> str:
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _time(event: dict[str, Any]) -> float:
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp()
    except ValueError:
        return 0.0


def _clock(event: dict[str, Any]) -> str:
    return str(event.get("time", "at an unknown time"))
