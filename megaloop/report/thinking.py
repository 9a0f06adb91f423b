"""What the page's section *Loops that tokens take* shows: quality against mean loops, by criterion of halting, as ``megaloop eval --halt`` measured it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pvariance
from typing import Any

from megaloop.evaluation.records import DIFFICULTY, Record, Subject
from megaloop.evaluation.tasks import TASKS
from megaloop.report.read import Run
from megaloop.report.savings import Group, Spread
from megaloop.runs.records import number
from megaloop.text import printable

__all__ = ["FIXED", "ORACLE", "Curve", "Ladder", "Picture", "Point", "Text", "ladders", "pictures", "texts"]

FIXED = "all tokens alike"
"""Every token of every sequence runs so many iterations: what ``--loops`` sets."""
ORACLE = "oracle"
_LONGEST_PIECE = 80


@dataclass(frozen=True)
class Point:
    """One threshold.

    Attributes:
        setting: as ``--halt`` takes it; of :data:`FIXED` the number of loops.
        loops: mean iterations of the tokens that were asked for.
        value: accuracy, or loss in nats per token.
        error: over several seeds the standard error of their mean, else that of the examples; None: not known.
    """

    setting: str
    loops: float
    value: float
    error: float | None


@dataclass(frozen=True)
class Curve:
    """One criterion, its points by mean loops."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Picture:
    """Of one group and what it was asked.

    Attributes:
        metric: ``accuracy`` or ``loss``.
    """

    group: str
    asked: str
    metric: str
    curves: tuple[Curve, ...]

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"group": self.group, "asked": self.asked, "metric": self.metric, "criterion": curve.name, "setting": point.setting,
             "loops_mean": point.loops, "value": point.value, "error": point.error}
            for curve in self.curves
            for point in curve.points
        ]  # fmt: skip


@dataclass(frozen=True)
class Ladder:
    """Mean loops by difficulty of a data set: of each criterion the threshold whose tokens take about half the loops."""

    group: str
    data: str
    lines: dict[str, dict[int, float]]

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"group": self.group, "data": self.data, "setting": setting, "difficulty": difficulty, "loops_mean": loops}
            for setting, line in self.lines.items()
            for difficulty, loops in line.items()
        ]


@dataclass(frozen=True)
class Text:
    """A held-out text of one run, piece by piece.

    Attributes:
        pieces: text, loops (None: not predicted), and how dark that is, from 0 to 1.
    """

    run: str
    data: str
    setting: str
    most: int
    pieces: list[tuple[str, int | None, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Measured:
    loops: float
    value: float
    error: float


def pictures(groups: Sequence[Group]) -> list[Picture]:
    """A picture for each group and data set, and one of its primitives; nothing where no token halted."""
    made = []
    for group in groups:
        thought = [record.subject for run in group.runs for record in run.thinking]
        for data in dict.fromkeys(subject.data for subject in thought if subject.task == "validation"):
            made += _picture(group, f"held out of {printable(data, 80)}", _held_out(group, str(data)))
        tasks = [task for task in TASKS if any(subject.task == task for subject in thought)]
        for shots in sorted({subject.shots for subject in thought if subject.task in TASKS}):
            made += _picture(group, f"primitives, {shots} shots", _primitives(group, tasks, shots))
    return made


_Values = dict[tuple[str, str], list[_Measured]]
"""Of each run that has them, by (criterion, setting)."""


def _picture(group: Group, asked: str, found: tuple[str, _Values]) -> list[Picture]:
    metric, values = found
    by_name: dict[str, list[Point]] = {}
    for (name, setting), measured in values.items():
        spread = Spread.of([one.value for one in measured])
        error = measured[0].error if spread.deviation is None else spread.deviation / math.sqrt(spread.count)
        point = Point(setting, fmean(one.loops for one in measured), spread.mean, None if math.isnan(error) else error)
        by_name.setdefault(name, []).append(point)
    curves = [Curve(name, tuple(sorted(points, key=lambda point: point.loops))) for name, points in by_name.items()]
    return [Picture(group.label, asked, metric, tuple(curves))] if any(curve.name != FIXED for curve in curves) else []


def _held_out(group: Group, data: str) -> tuple[str, _Values]:
    """Accuracy where the samples carry targets, else the loss."""

    def is_it(subject: Subject) -> bool:
        return subject.task == "validation" and subject.data == data

    records = [record for run in group.runs for record in _records(run, is_it)]
    metric = "accuracy" if any(number(record.values, "accuracy") is not None for record in records) else "loss"
    values: _Values = {}
    for record in records:
        measured = _measured([record], metric)
        if measured is not None:
            values.setdefault(_way(record, records), []).append(measured)
    return metric, values


def _primitives(group: Group, tasks: Sequence[str], shots: int) -> tuple[str, _Values]:
    """The mean over tasks, where a run has them all."""
    values: _Values = {}
    for run in group.runs:
        records = _records(run, lambda subject: subject.task in tasks and subject.shots == shots)
        ways: dict[tuple[str, str], dict[str, Record]] = {}
        for record in records:
            ways.setdefault(_way(record, records), {})[record.subject.task] = record
        for way, of_task in ways.items():
            measured = _measured(list(of_task.values()), "accuracy") if len(of_task) == len(tasks) else None
            if measured is not None:
                values.setdefault(way, []).append(measured)
    return "accuracy", values


def _records(run: Run, is_it: Callable[[Subject], bool]) -> list[Record]:
    """Those in which tokens halt, and those that ran the same loop in full on the same checkpoint and examples."""
    thought = [record for record in run.thinking if is_it(record.subject)]
    alike = {_apart_from_loops(record.subject) for record in thought}
    full = [
        record for record in run.evaluations if is_it(record.subject) and _apart_from_loops(record.subject) in alike
    ]
    return [*thought, *full]


def _apart_from_loops(subject: Subject) -> tuple[Any, ...]:
    return (
        subject.task,
        subject.data,
        subject.shots,
        subject.block,
        subject.examples,
        subject.seed,
        subject.precision,
        subject.checkpoint,
    )


def _way(record: Record, records: Iterable[Record]) -> tuple[str, str]:
    """(criterion, setting) under which a record is drawn."""
    subject = record.subject
    if subject.halt is None:
        return FIXED, str(subject.loops)
    name = printable(subject.halt.partition("=")[0], 40)
    return name + _details(subject, records), printable(subject.halt, 40)


def _details(subject: Subject, records: Iterable[Record]) -> str:
    """What else tells how tokens halted, where it is not as by default; the most loops where records differ in it."""
    several = len({record.subject.loops for record in records if record.subject.halt is not None}) > 1
    said = [f"at most {subject.loops}"] if several else []
    said += [f"at least {subject.min_loops}"] if subject.min_loops > 1 else []
    said += ["prompts as one"] if subject.halt_scope == "sequence" else []
    said += [f"decay {subject.halt_decay:g}"] if subject.halt_decay is not None else []
    return "".join(f", {text}" for text in said)


def _measured(records: Sequence[Record], metric: str) -> _Measured | None:
    """The mean over records; None where one does not say."""
    loops = [float(r.subject.loops) if r.subject.halt is None else number(r.values, "loops_mean") for r in records]
    values = [number(record.values, metric) for record in records]
    if None in loops or None in values:
        return None
    errors = [number(record.values, f"{metric}_stderr") for record in records]
    known = [math.nan if error is None else error for error in errors]
    return _Measured(
        fmean(one for one in loops if one is not None),
        fmean(one for one in values if one is not None),
        math.sqrt(sum(error**2 for error in known)) / len(known),
    )


def ladders(groups: Sequence[Group]) -> list[Ladder]:
    """Mean loops by difficulty, the mean over a group's runs."""
    made = []
    for group in groups:
        records = [r for run in group.runs for r in run.thinking if r.subject.task == DIFFICULTY]
        for data in dict.fromkeys(str(record.subject.data) for record in records):
            found: dict[str, dict[int, list[float]]] = {}
            own = [record for record in records if record.subject.data == data]
            for record in own:
                loops = number(record.values, "loops_mean")
                if loops is not None and record.subject.difficulty is not None and not _is_fixed(record.subject):
                    setting = printable(record.subject.halt, 40) + _details(record.subject, own)
                    found.setdefault(setting, {}).setdefault(record.subject.difficulty, []).append(loops)
            lines = {
                setting: {difficulty: fmean(line[difficulty]) for difficulty in sorted(line)}
                for setting, line in found.items()
            }
            half = (1 + max((record.subject.loops for record in own), default=1)) / 2
            chosen = _nearest({setting: fmean(line.values()) for setting, line in lines.items()}, half)
            if chosen:
                shown = {setting: line for setting, line in lines.items() if setting in chosen}
                made.append(Ladder(group.label, printable(data, 80), shown))
    return made


def _is_fixed(subject: Subject) -> bool:
    return (subject.halt or "").startswith("fixed")


def _nearest(loops: dict[str, float], half: float) -> set[str]:
    """Of each criterion the setting whose mean loops are nearest to ``half``."""
    best: dict[str, str] = {}
    for setting, mean in loops.items():
        criterion, _, rest = setting.partition("=")
        name = criterion + "".join(rest.partition(",")[1:])
        if name not in best or abs(mean - half) < abs(loops[best[name]] - half):
            best[name] = setting
    return set(best.values())


def texts(groups: Sequence[Group]) -> list[Text]:
    """Of each run a text under the setting by which its tokens differ most."""
    made = []
    for run in (run for group in groups for run in group.runs):
        shown = [record for record in run.thinking if record.values.get("loops_text")]
        if not shown:
            continue
        record = max(shown, key=lambda record: pvariance(_counts(record) or [0]))
        most = max(record.subject.loops, 1)
        pieces = [
            (_shown(piece), loops, 0.0 if loops is None else min(loops / most, 1.0))
            for piece, loops in record.values["loops_text"]
        ]
        setting = printable(record.subject.halt, 40)
        made.append(Text(run.name, printable(record.subject.data, 80), setting, most, pieces))
    return made


def _counts(record: Record) -> list[int]:
    return [loops for _, loops in record.values["loops_text"] if loops is not None]


def _shown(piece: str) -> str:
    """Line ends stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in piece[:_LONGEST_PIECE])
