"""``megaloop doctor``: what happened to a run, read from its directory alone, in plain words."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megaloop.checkpoint import list_checkpoints, list_damaged, step_of
from megaloop.errors import MegaloopError
from megaloop.layout.topology import Topology
from megaloop.runs.directory import DISCARDED, STACKS, is_locked
from megaloop.runs.metrics import EVENTS, METRICS, RANKS
from megaloop.runs.records import number, read_records, text, whole_number
from megaloop.text import format_bytes, printable

__all__ = ["Diagnosis", "Finding", "State", "examine", "state_of"]

Level = Literal["good", "note", "warning"]
State = Literal["empty", "running", "finished", "stopped", "failed", "killed"]
_Record = dict[str, Any]

_SLOW = 1.1
"""A rank that computes this many times as long as those of its pipeline stage is slow."""
_UNEVEN = 1.15
"""Pipeline stages of which the longest takes this many times the mean are unevenly filled."""
_GAP, _GAP_SECONDS = 10.0, 5.0
"""A step this many times as long as the median, and this many seconds longer, is a gap."""
_CLOCK = 1.0
"""Seconds by which clocks may differ."""
_GROWING = 1.05
"""How many times the memory of its first quarter a run may take in its last."""
_LONGEST = 1e9
"""Seconds; nothing that a run records took longer, or lies further apart."""


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
    state: State = "empty"
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
    """Read a run's directory; nothing in it is changed, and it may be running.

    Raises:
        MegaloopError: there is no run.
    """
    if not (run / EVENTS).is_file() and not (run / METRICS).is_file():
        raise MegaloopError(f"{run}: no run; expected a directory with {EVENTS} and {METRICS} in it")
    events, metrics, discarded, ranks = (list(read_records(run / name)) for name in (EVENTS, METRICS, DISCARDED, RANKS))
    diagnosis = Diagnosis(str(run))
    diagnosis.steps = max((whole_number(record, "step") or 0 for record in metrics), default=0)
    _starts(diagnosis, events, is_locked(run))
    _losses(diagnosis, discarded, metrics)
    _numbers(diagnosis, events)
    _checkpoints(diagnosis, run, events)
    _steps(diagnosis, metrics)
    _ranks(diagnosis, ranks)
    _stacks(diagnosis, run)
    return diagnosis


def state_of(events: Sequence[_Record], alive: bool) -> State:
    """How a run is, by what it has recorded.

    Args:
        alive: a process holds its directory.
    """
    if alive:
        return "running"
    kinds = [event for event in events if event.get("event") in ("start", "stop")]
    if not kinds:
        return "empty"
    if kinds[-1].get("event") == "start":
        return "killed"
    reason = text(kinds[-1], "reason") or ""
    if reason == "finished":
        return "finished"
    return "stopped" if reason in ("stop_at", "interrupted") or reason.startswith("signal") else "failed"


def _starts(diagnosis: Diagnosis, events: Sequence[_Record], alive: bool) -> None:
    """How it was started and how it ended, each time; and how it is now."""
    stop: _Record | None = None
    last: _Record = {}
    under_way = False
    for event in events:
        kind = event.get("event")
        if kind in ("resume", "start") and under_way:
            where = f"after {_step(last)}, {_clock(last)}"
            diagnosis.add("warning", "restarts", f"a start ended without a word ({where}): killed, or its node died")
            diagnosis.killed += 1
            under_way = False
        if kind == "start":
            if stop is None or stop.get("reason") != "rollback":  # which is the same processes going on
                diagnosis.starts += 1
            if stop is not None:
                # a start is recorded when everything is built, which is its seconds after it began
                diagnosis.down_seconds += _seconds_between(stop, event, _seconds(event, "seconds") or 0.0)
            under_way, stop = True, None
        elif kind == "stop":
            under_way, stop = False, event
            _ending(diagnosis, event)
        last = event
    diagnosis.state = state_of(events, alive)
    if diagnosis.state == "killed":
        diagnosis.killed += 1
        where = f"after {_step(last)}, {_clock(last)}"
        diagnosis.add("warning", "restarts", f"the last start ended without a word ({where}); resume it with --resume")
    if diagnosis.starts > 1:
        diagnosis.add(
            "note", "restarts", f"started {diagnosis.starts} times, of which {diagnosis.killed} ended without a word"
        )
    if diagnosis.down_seconds >= 1:
        diagnosis.add(
            "note", "restarts", f"{_duration(diagnosis.down_seconds)} between orderly ends and the next start"
        )


def _ending(diagnosis: Diagnosis, stop: _Record) -> None:
    reason = text(stop, "reason") or ""
    if reason.startswith("error"):
        diagnosis.add("warning", "restarts", f"{_step(stop)}: {printable(reason, 500)}")
    elif reason.startswith("signal"):
        name = printable(reason.removeprefix("signal "))
        diagnosis.add("note", "restarts", f"{_step(stop)}: saved and left, as {name} asked")


def _losses(diagnosis: Diagnosis, discarded: Sequence[_Record], metrics: Sequence[_Record]) -> None:
    diagnosis.lost_steps = len(discarded)
    diagnosis.lost_seconds = sum(_seconds(record, "seconds") or 0.0 for record in discarded)
    if diagnosis.lost_steps:
        spent = sum(_seconds(metric, "seconds") or 0.0 for metric in metrics)
        share = f", {diagnosis.lost_seconds / (spent + diagnosis.lost_seconds):.1%} of all training" if spent else ""
        found = f"{diagnosis.lost_steps} steps ({_duration(diagnosis.lost_seconds)}{share}) were trained again after restarts and rollbacks"
        diagnosis.add("note", "lost steps", f"{found}; a smaller checkpoint.every loses fewer")


def _numbers(diagnosis: Diagnosis, events: Sequence[_Record]) -> None:
    """Steps that were skipped, spikes, and going back."""
    of = {kind: [event for event in events if event.get("event") == kind] for kind in ("skip", "spike", "rollback")}
    diagnosis.skipped_steps, diagnosis.spikes = len(of["skip"]), len(of["spike"])
    diagnosis.rollbacks = len(of["rollback"])
    if of["skip"]:
        steps = _few([_step_number(event) for event in of["skip"]])
        diagnosis.add("warning", "numbers", f"{len(of['skip'])} steps without a finite gradient were skipped: {steps}")
    if of["spike"]:
        steps = _few([f"{_step_number(event)} ({_loss(event)})" for event in of["spike"]])
        diagnosis.add("note", "numbers", f"{len(of['spike'])} spikes of the loss: step {steps}")
    for event in of["rollback"]:
        reason = printable(text(event, "reason") or "no reason is recorded", 500)
        found = f"went back from step {_step_number(event, 'step_before')} to {_step_number(event)}: {reason}"
        samples = _whole_numbers(event, "samples", 2)
        if samples is not None:
            found += f"; samples {samples[0]} to {samples[1] - 1} are excluded"
        diagnosis.add("warning", "checkpoints" if samples is None else "numbers", found)


def _checkpoints(diagnosis: Diagnosis, run: Path, events: Sequence[_Record]) -> None:
    """How saving went, and for how many more there is room."""
    saves = [event for event in events if event.get("event") == "save"]
    failed = [event for event in events if event.get("event") == "save_failed"]
    diagnosis.failed_saves = len(failed)
    diagnosis.stall_seconds = sum(_seconds(event, "stall_seconds") or 0.0 for event in saves)
    complete, damaged = list_checkpoints(run / "checkpoints"), list_damaged(run / "checkpoints")
    if complete:
        behind = diagnosis.steps - step_of(complete[-1])
        ago = f", {behind} steps ago" if behind > 0 else ""
        stall = (
            f"; training stood still for {_duration(diagnosis.stall_seconds)} in {len(saves)} saves" if saves else ""
        )
        diagnosis.add("good", "checkpoints", f"{len(complete)} complete, the newest {complete[-1].name}{ago}{stall}")
    elif diagnosis.steps:
        diagnosis.add("warning", "checkpoints", "none is complete: a run that ends now begins anew")
    if damaged:
        diagnosis.add("warning", "checkpoints", f"quarantined as damaged: {_few([path.name for path in damaged])}")
    if failed:
        steps = _few([_step_number(event) for event in failed])
        reason = printable(text(failed[-1], "reason") or "no reason is recorded", 500)
        diagnosis.add(
            "warning", "checkpoints", f"{len(failed)} could not be saved (step {steps}); the last time: {reason}"
        )
    diagnosis.disk_free_bytes = free = shutil.disk_usage(run).free
    size = next((size for event in reversed(saves) if (size := whole_number(event, "bytes"))), None)
    if size:
        room = free // size
        found = f"{format_bytes(free)} free, room for {room} more checkpoints of {format_bytes(size)}"
        diagnosis.add("good" if room >= 2 else "warning", "disk", found)
    else:
        diagnosis.add("good", "disk", f"{format_bytes(free)} free")


def _steps(diagnosis: Diagnosis, metrics: Sequence[_Record]) -> None:
    """Steps that took much longer than their neighbours, and memory that grows."""
    by_shape: dict[tuple[int | None, ...], list[tuple[_Record, float]]] = {}
    for record in metrics:
        seconds = _seconds(record, "seconds")
        if seconds is not None:
            shape = tuple(whole_number(record, key) for key in ("layers", "depth", "dp"))
            by_shape.setdefault(shape, []).append((record, seconds))
    for shape in sorted(by_shape, key=str):
        same = by_shape[shape]
        median = statistics.median(seconds for _, seconds in same)
        longest = max(_GAP * median, median + _GAP_SECONDS)
        gaps = [f"{_step_number(record)} ({_duration(seconds)})" for record, seconds in same[1:] if seconds > longest]
        if gaps:
            found = f"{len(gaps)} steps took far longer than the median of {median:.2f} s: {_few(gaps)}"
            diagnosis.add("warning", "speed", found)
        known = [size for record, _ in same if (size := whole_number(record, "memory_bytes")) is not None]
        if len(known) >= 200:
            quarter = len(known) // 4
            first, last = statistics.median(known[:quarter]), statistics.median(known[-quarter:])
            if last > _GROWING * first:
                found = f"rank 0's grew from {format_bytes(int(first))} to {format_bytes(int(last))} at the same depth"
                diagnosis.add("warning", "memory", found)


@dataclass(frozen=True)
class _RankLists:
    """A record of ``ranks.jsonl`` whose lists have a value for each rank of its topology."""

    topology: Topology
    busy: list[float]
    clocks: list[float]
    hosts: list[str]

    @classmethod
    def of(cls, record: _Record) -> _RankLists | None:
        """None where the record is something else."""
        shape = [whole_number(record, key) for key in ("pp", "tp", "dp")]
        hosts = record.get("hosts")
        if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
            return None
        pp, tp, dp = (size or 0 for size in shape)
        if not hosts or pp * tp * dp != len(hosts):
            return None
        busy, clocks = (_finite_numbers(record, key, len(hosts)) for key in ("busy_seconds", "clock_seconds"))
        if busy is None or clocks is None or min(busy) < 0:
            return None
        return cls(Topology(pp, tp, dp), busy, clocks, [printable(host, 80) for host in hosts])


def _ranks(diagnosis: Diagnosis, records: Sequence[_Record]) -> None:
    """Ranks that compute longer than those who do the same work, stages with more work, and clocks."""
    known = [lists for record in records if (lists := _RankLists.of(record)) is not None]
    if not known:
        return
    topology, hosts = known[-1].topology, known[-1].hosts
    same = [entry for entry in known if entry.topology == topology][-50:]
    busy = [statistics.median(contender.busy[rank] for contender in same) for rank in range(topology.world_size)]
    stages = [
        statistics.median(seconds for rank, seconds in enumerate(busy) if topology.coordinate(rank).pp == stage)
        for stage in range(topology.pp)
    ]
    for rank, seconds in enumerate(busy):
        usual = stages[topology.coordinate(rank).pp]
        if seconds > _SLOW * usual > 0:
            diagnosis.slowest_ranks.append(rank)
            found = (
                f"rank {rank} ({hosts[rank]}) computes {seconds / usual - 1:.0%} longer than the others of its stage"
            )
            diagnosis.add("warning", "ranks", found)
    if topology.pp > 1 and sum(stages) > 0:
        diagnosis.stage_imbalance = max(stages) / statistics.mean(stages)
        parts = _few([f"{seconds:.3f}" for seconds in stages], 64)
        found = (
            f"pipeline stages compute {parts} s per step, the longest {diagnosis.stage_imbalance:.2f} times the mean"
        )
        if diagnosis.stage_imbalance > _UNEVEN:
            found += "; set parallel.layer_costs from megaloop bench layers"
            diagnosis.add("warning", "stages", found)
        else:
            diagnosis.add("good", "stages", found)
    offsets = {host: statistics.median(run.clocks[rank] for run in same) for rank, host in enumerate(hosts)}
    wrong = [f"{host} by {seconds:+.1f} s" for host, seconds in offsets.items() if abs(seconds) > _CLOCK]
    if wrong:
        diagnosis.add("warning", "clocks", f"differ from rank 0's: {_few(wrong)}; logs of several hosts do not line up")


def _stacks(diagnosis: Diagnosis, run: Path) -> None:
    """Ranks that hung."""
    hung = [
        printable(path.stem.removeprefix("rank-"), 80)
        for path in sorted((run / STACKS).glob("rank-*.txt"))
        if path.is_file() and "most recent call first" in path.read_text(encoding="utf-8", errors="replace")
    ]
    if hung:
        found = f"a step took longer than faults.step_limit; stacks of rank {_few(hung)} are in {run / STACKS}"
        diagnosis.add("warning", "hangs", found)


# --- values of records, which may be anything ---


def _seconds(record: _Record, key: str) -> float | None:
    """A duration; None where the record has none."""
    value = number(record, key)
    return value if value is not None and 0 <= value <= _LONGEST else None


def _whole_numbers(record: _Record, key: str, count: int) -> list[int] | None:
    values = record.get(key)
    if not isinstance(values, list) or len(values) != count:
        return None
    known = [value for item in values if (value := whole_number({key: item}, key)) is not None]
    return known if len(known) == count else None


def _finite_numbers(record: _Record, key: str, count: int) -> list[float] | None:
    values = record.get(key)
    if not isinstance(values, list) or len(values) != count:
        return None
    known = [value for item in values if (value := number({key: item}, key)) is not None and abs(value) <= _LONGEST]
    return known if len(known) == count else None


def _step_number(record: _Record, key: str = "step") -> str:
    step = whole_number(record, key)
    return "?" if step is None else str(step)


def _step(record: _Record) -> str:
    return f"step {_step_number(record)}"


def _loss(record: _Record) -> str:
    loss = number(record, "loss")
    return "?" if loss is None else f"{loss:.2f}" if abs(loss) < 1e6 else f"{loss:.3g}"


def _seconds_between(earlier: _Record, later: _Record, less: float) -> float:
    """Seconds from one event to ``less`` seconds before another; 0 where their times are not known."""
    times = [_time(earlier), _time(later)]
    if times[0] is None or times[1] is None:
        return 0.0
    return min(max(times[1] - times[0] - less, 0.0), _LONGEST)


def _time(event: _Record) -> float | None:
    try:
        return datetime.fromisoformat(text(event, "time") or "").timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _clock(event: _Record) -> str:
    return printable(text(event, "time") or "at an unknown time", 40)


# --- words ---


def _few(words: Sequence[str], most: int = 5) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
