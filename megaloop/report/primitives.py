"""The evaluations of groups: primitives as trained, by shots, and by loops at inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from megaloop.evaluation.records import Record
from megaloop.evaluation.tasks import RENAMED, TASKS
from megaloop.report.read import Run
from megaloop.report.savings import Group, Spread, at_trained_depth
from megaloop.runs.records import number

__all__ = [
    "MEAN",
    "Cell",
    "Held",
    "by_loops",
    "by_shots",
    "cells",
    "chance_of",
    "held_out",
    "of_one_version",
    "shots_shown",
    "tasks_of",
]

MEAN = "mean"
"""The mean of a group's tasks, where it has all of them."""
_TASKS = (*TASKS, *RENAMED)
_EARLIER_CHANCE = 0.2
"""Of records that do not say: tasks had five candidates then."""
Metric = Callable[[Record], float | None]


@dataclass(frozen=True)
class Cell:
    """A value of a group.

    Attributes:
        value: mean over seeds.
        error: over several seeds the standard error of their mean, else that of the examples; None: not known.
        seeds: how many.
    """

    value: float
    error: float | None
    seeds: int


@dataclass(frozen=True)
class Held:
    """Held-out loss on a data set, nats per token."""

    data: str
    loss: Cell


def accuracy(record: Record) -> float | None:
    value = record.values.get("accuracy")
    return float(value) if isinstance(value, int | float) else None


def exact_match(record: Record) -> float | None:
    value = record.values.get("exact_match")
    return float(value) if isinstance(value, int | float) else None


def _loss(record: Record) -> float | None:
    value = record.values.get("loss")
    return float(value) if isinstance(value, int | float) else None


def _error(record: Record) -> float:
    for key in ("accuracy_stderr", "loss_stderr"):
        value = record.values.get(key)
        if isinstance(value, int | float):
            return float(value)
    return math.nan


def of_one_version(runs: Sequence[Run]) -> tuple[list[Run], int | None]:
    """Runs without primitives of an earlier version than the newest among them: a task's name stood for other questions then.

    Returns:
        The runs, and the version whose primitives are left; None where there were no others.
    """
    versions = {record.subject.version for run in runs for record in run.evaluations if record.subject.task in _TASKS}
    newest = max(versions, default=0)
    kept = [
        replace(
            run,
            evaluations=tuple(
                record
                for record in run.evaluations
                if record.subject.task not in _TASKS or record.subject.version == newest
            ),
        )
        for run in runs
    ]
    return kept, newest if len(versions) > 1 else None


def chance_of(groups: Sequence[Group], task: str) -> float:
    """What a guesser scores; of ``mean``, over the tasks that were evaluated."""
    if task == MEAN:
        return fmean(chance_of(groups, name) for name in tasks_of(groups))
    written = (
        number(record.values, "chance")
        for group in groups
        for run in group.runs
        for record in run.evaluations
        if record.subject.task == task
    )
    return next((value for value in written if value is not None), _EARLIER_CHANCE)


def tasks_of(groups: Sequence[Group]) -> list[str]:
    """The primitives that were evaluated, in their own order."""
    found = {record.subject.task for group in groups for run in group.runs for record in run.evaluations}
    return [task for task in _TASKS if task in found]


def shots_shown(groups: Sequence[Group]) -> int:
    """The number of shots of the table: 5, or the most there are."""
    found = {
        record.subject.shots
        for group in groups
        for run in group.runs
        for record in run.evaluations
        if record.subject.task in _TASKS
    }
    return 5 if 5 in found else max(found, default=5)


def _cell(group: Group, task: str, keep: Callable[[Run, Record], bool], metric: Metric) -> Cell | None:
    """A task's value; of ``mean`` that over all tasks that every run of the group has."""
    names = [task] if task != MEAN else [name for name in _TASKS if _cell(group, name, keep, metric) is not None]
    values, errors = [], []
    for run in group.runs:
        found = {record.subject.task: record for record in run.evaluations if keep(run, record)}
        measured = [metric(found[name]) for name in names if name in found]
        known = [value for value in measured if value is not None]
        if not known or len(known) < len(names):
            continue
        values.append(fmean(known))
        # tasks have questions of their own: their errors are independent
        errors.append(math.sqrt(sum(_error(found[name]) ** 2 for name in names)) / len(names))
    if not values:
        return None
    spread = Spread.of(values)
    error = errors[0] if spread.deviation is None else spread.deviation / math.sqrt(spread.count)
    return Cell(spread.mean, None if math.isnan(error) else error, spread.count)


def cells(groups: Sequence[Group], task: str, shots: int, metric: Metric = accuracy) -> list[Cell | None]:
    """A task's value in each group, as trained."""
    return [
        _cell(
            group,
            task,
            lambda run, record: (
                record.subject.shots == shots and record.subject.task in _TASKS and at_trained_depth(record, run)
            ),
            metric,
        )
        for group in groups
    ]


def by_shots(group: Group, task: str) -> dict[int, Cell]:
    """A task's accuracy, as trained, by number of shots."""
    counts = sorted({r.subject.shots for run in group.runs for r in run.evaluations if r.subject.task in _TASKS})
    found = {count: cells([group], task, count)[0] for count in counts}
    return {count: cell for count, cell in found.items() if cell is not None}


def by_loops(group: Group, task: str, shots: int) -> dict[int, Cell]:
    """A task's accuracy by how often the block ran."""

    def keep(loops: int) -> Callable[[Run, Record], bool]:
        return lambda _, record: (
            record.subject.loops == loops and record.subject.shots == shots and record.subject.task in _TASKS
        )

    found = {loops: _cell(group, task, keep(loops), accuracy) for loops in _loops(group)}
    return {loops: cell for loops, cell in found.items() if cell is not None}


def _loops(group: Group) -> list[int]:
    return sorted({record.subject.loops for run in group.runs for record in run.evaluations})


def _of_several_blocks(group: Group, data: str, loops: int) -> bool:
    blocks = {
        record.subject.block
        for run in group.runs
        for record in run.evaluations
        if record.subject.loops == loops and str(record.subject.data) == data and _loss(record) is not None
    }
    return len(blocks) > 1


def held_out(group: Group, loops: int | None = None) -> list[Held]:
    """Held-out loss on each data set; as trained, or with that number of loops (of one block: several have a picture of their own)."""
    names = dict.fromkeys(
        str(record.subject.data) for run in group.runs for record in run.evaluations if _loss(record) is not None
    )
    made = []
    for name in names:
        if loops is not None and _of_several_blocks(group, name, loops):
            continue
        values, errors = [], []
        for run in group.runs:
            for record in run.evaluations:
                loss = _loss(record)
                wanted = at_trained_depth(record, run) if loops is None else record.subject.loops == loops
                if loss is not None and str(record.subject.data) == name and wanted:
                    values.append(loss)
                    errors.append(_error(record))
                    break
        if values:
            spread = Spread.of(values)
            error = errors[0] if spread.deviation is None else spread.deviation / math.sqrt(spread.count)
            made.append(Held(name, Cell(spread.mean, None if math.isnan(error) else error, spread.count)))
    return made
