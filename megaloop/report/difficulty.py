"""Accuracy by difficulty: which data sets make a ladder, and what runs and groups reach on its rungs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from statistics import fmean

import numpy as np

from megaloop.depth import DepthSpec
from megaloop.depth.flops import flops_per_token, parameters
from megaloop.errors import MegaloopError
from megaloop.evaluation.records import Record
from megaloop.report.read import Run
from megaloop.report.savings import Group, executed_layers, model_of
from megaloop.report.statistics import Interval, interval
from megaloop.runs.records import number
from megaloop.text import parse_whole, printable

__all__ = ["ACCURACY", "LAST", "Board", "Ladder", "Level", "Loop", "Rung", "boards"]

ACCURACY, LAST = "accuracy", "last_accuracy"
"""Over all places with a target; on the last one of each sample."""
_DEEPEST = 100_000


@dataclass(frozen=True)
class Rung:
    """One difficulty of a data set (its path, resolved)."""

    data: str
    difficulty: int


@dataclass(frozen=True)
class Ladder:
    """A task by difficulty.

    Attributes:
        name: the data set that was trained on, and the one that asks where that is another, fit to be shown.
        trained: its difficulties, ascending: as a data set asks them that was not trained on and has them all, else on held-out
            samples of its own.
        beyond: difficulties of data sets of the task that were not trained on, ascending; those of ``trained`` are left out.
    """

    name: str
    trained: tuple[Rung, ...]
    beyond: tuple[Rung, ...]

    @property
    def rungs(self) -> tuple[Rung, ...]:
        return tuple(sorted((*self.trained, *self.beyond), key=lambda rung: rung.difficulty))

    @property
    def hardest(self) -> tuple[Rung, ...]:
        """The hardest trained difficulty, alone; nothing where none was trained."""
        return self.trained[-1:]

    @property
    def ends(self) -> float | None:
        """Where training's difficulties end, halfway to the next; None where nothing lies beyond."""
        last = max((rung.difficulty for rung in self.trained), default=math.inf)
        further = [rung.difficulty for rung in self.beyond if rung.difficulty > last]
        return (last + further[0]) / 2 if further else None


@dataclass(frozen=True)
class Level:
    """What a group reaches.

    Attributes:
        over_seeds: the mean and its interval.
        error: of a single seed the standard error over its examples; None where not known.
    """

    over_seeds: Interval
    error: float | None

    @property
    def mean(self) -> float:
        return self.over_seeds.mean

    @property
    def margin(self) -> float | None:
        """Half the interval over seeds; of a single seed the standard error."""
        return self.error if self.over_seeds.count == 1 else self.over_seeds.margin


@dataclass(frozen=True, order=True)
class Loop:
    """A loop at inference: the block of layers [start, stop) runs ``extra`` times more than once."""

    extra: int
    start: int
    stop: int


Found = Mapping[Rung, Record]


@dataclass(frozen=True)
class _Results:
    """A run's records of single difficulties.

    Attributes:
        trained: as trained by step; where several numbers of samples were asked, those of the most.
        loops: by loop at inference, at the newest step.
        beside: as trained at the newest step, by the number of samples asked: what loops are compared with.
    """

    trained: Mapping[int, Found]
    loops: Mapping[Loop, Found]
    beside: Mapping[int, Found]

    def beside_loop(self, loop: Loop, rungs: Sequence[Rung]) -> Found:
        """As trained, on the samples that a loop was asked with; nothing where it was not, or with several numbers of them."""
        asked = {record.subject.examples for rung, record in self.loops.get(loop, {}).items() if rung in rungs}
        return self.beside.get(asked.pop(), {}) if len(asked) == 1 else {}

    @property
    def newest(self) -> Found:
        return self.trained[max(self.trained)] if self.trained else {}


def boards(groups: Sequence[Group]) -> list[Board]:
    """A board for each ladder, in the order in which its data is configured; nothing where no difficulty was measured."""
    if not any(run.by_step for group in groups for run in group.runs):
        return []
    results = {run.path: _results(run) for group in groups for run in group.runs}
    return [Board(ladder, tuple(groups), results) for ladder in _ladders(groups)]


@dataclass(frozen=True)
class Board:
    """What groups reach on one ladder."""

    ladder: Ladder
    groups: tuple[Group, ...]
    results: Mapping[Path, _Results]

    def level(self, group: Group, rungs: Sequence[Rung], metric: str = ACCURACY) -> Level | None:
        """The mean over rungs, as trained, at each run's newest step; of the runs that have them all."""
        return _level([self.results[run.path].newest for run in group.runs], rungs, metric)

    def by_seed(self, group: Group, rungs: Sequence[Rung]) -> dict[int, float]:
        """The mean over rungs of each seed whose run is finished and was evaluated at its last step."""
        found = {}
        for run in self.complete(group):
            value = _mean(self.results[run.path].newest, rungs, ACCURACY)
            if value is not None and run.seed is not None:
                found[run.seed] = value[0]
        return found

    def complete(self, group: Group) -> list[Run]:
        """Runs that are finished and were evaluated at their last step."""
        return [run for run in group.runs if run.finished and int(run.step[-1]) in self.results[run.path].trained]

    def floor(self, rung: Rung, metric: str = ACCURACY) -> float | None:
        """What the best guesser scores; None where no record says so."""
        key = "floor" if metric == ACCURACY else "last_floor"
        for found in (found for results in self.results.values() for found in results.trained.values()):
            value = number(found[rung].values, key) if rung in found else None
            if value is not None and 0 <= value <= 1:
                return value
        return None

    def over_flops(self, group: Group, rungs: Sequence[Rung]) -> list[tuple[int, float, Level]]:
        """(step, training FLOPs so far, level) of every step that was evaluated, as trained."""
        steps = sorted({step for run in group.runs for step in self.results[run.path].trained})
        made = []
        for step in steps:
            level = _level([self.results[run.path].trained.get(step, {}) for run in group.runs], rungs, ACCURACY)
            spent = [flops for run in group.runs if (flops := _flops_at(run, step)) is not None]
            if level is not None and spent:
                made.append((step, fmean(spent), level))
        return made

    def loops(self, group: Group) -> list[Loop]:
        """Loops at inference over different blocks of one size (the most frequent), by extra times and start.

        A model that was trained with a loop has a single block to loop, and nothing here.
        """
        found = {loop for run in group.runs for loop in self.results[run.path].loops}
        sizes = [loop.stop - loop.start for loop in found]
        size = max(set(sizes), key=lambda size: (sizes.count(size), -size), default=0)
        kept = sorted(loop for loop in found if loop.stop - loop.start == size)
        return kept if len({loop.start for loop in kept}) > 1 else []

    def looped(self, group: Group, loop: Loop, rungs: Sequence[Rung]) -> Level | None:
        """As :meth:`level`, with a loop at inference."""
        return _level([self.results[run.path].loops.get(loop, {}) for run in group.runs], rungs, ACCURACY)

    def beside_loops(self, group: Group, rungs: Sequence[Rung]) -> Level | None:
        """As trained, on the samples that loops at inference were asked with, which may be fewer than those of :meth:`level`."""
        wanted = self.loops(group)[:1]
        return _level(
            [self.results[run.path].beside_loop(loop, rungs) for run in group.runs for loop in wanted], rungs, ACCURACY
        )

    def gains(self, group: Group, rungs: Sequence[Rung]) -> dict[int, dict[Loop, float]]:
        """What each loop at inference adds to the model as trained, by seed, on the same samples; of complete runs."""
        found: dict[int, dict[Loop, float]] = {}
        wanted = self.loops(group)
        for run in self.complete(group):
            results = self.results[run.path]
            for loop in wanted:
                looped = results.loops.get(loop, {})
                base, value = _mean(results.beside_loop(loop, rungs), rungs, ACCURACY), _mean(looped, rungs, ACCURACY)
                if base is not None and value is not None and run.seed is not None:
                    found.setdefault(run.seed, {})[loop] = value[0] - base[0]
        return found

    def inference_flops(self, group: Group) -> int | None:
        """FLOPs of one token's forward pass, as trained, of the last run that says what it takes."""
        counted = (_inference_flops(run, self.results[run.path].newest) for run in reversed(group.runs))
        return next((flops for flops in counted if flops is not None), None)


def _level(found: Iterable[Found], rungs: Sequence[Rung], metric: str) -> Level | None:
    means = [mean for results in found if (mean := _mean(results, rungs, metric)) is not None]
    if not means:
        return None
    return Level(interval([value for value, _ in means]), means[0][1] if len(means) == 1 else None)


def _mean(found: Found, rungs: Sequence[Rung], metric: str) -> tuple[float, float | None] | None:
    """Over rungs, with the standard error of the examples; None where there are none, or one is missing."""
    values = [number(found[rung].values, metric) for rung in rungs if rung in found]
    known = [value for value in values if value is not None and 0 <= value <= 1]
    if not known or len(known) < len(rungs):
        return None
    errors = [number(found[rung].values, f"{metric}_stderr") for rung in rungs]
    squares = [error**2 for error in errors if error is not None]
    # rungs have samples of their own: their errors are independent
    return fmean(known), math.sqrt(sum(squares)) / len(rungs) if len(squares) == len(rungs) else None


# --- a run's records


def _results(run: Run) -> _Results:
    trained: dict[int, dict[Rung, Record]] = {}
    loops: dict[Loop, dict[Rung, Record]] = {}
    beside: dict[int, dict[Rung, Record]] = {}
    newest = max((record.subject.step for record in run.by_step), default=0)
    for record in run.by_step:
        subject = record.subject
        assert subject.difficulty is not None
        assert subject.data is not None
        rung, loop = Rung(_resolved(subject.data), subject.difficulty), _loop(record)
        if subject.block is None or executed_layers(subject.depth) in _executed_around(run, subject.step):
            at_step = trained.setdefault(subject.step, {})
            if rung not in at_step or at_step[rung].subject.examples <= subject.examples:
                at_step[rung] = record
            if subject.step == newest:
                beside.setdefault(subject.examples, {})[rung] = record
        elif loop is not None and subject.step == newest:
            loops.setdefault(loop, {})[rung] = record
    return _Results(trained, loops, beside)


def _loop(record: Record) -> Loop | None:
    """None where a record's block makes no sense, or runs once."""
    first, _, last = (record.subject.block or "").partition(":")
    start, stop = parse_whole(first), parse_whole(last)
    if start is None or stop is None or not start < stop <= _DEEPEST or record.subject.loops < 2:
        return None
    return Loop(record.subject.loops - 1, start, stop)


def _executed_around(run: Run, step: int) -> set[float]:
    """Layers that ran in a step, and in the next: a checkpoint between them may be of either."""
    at = int(np.searchsorted(run.step, step))
    return set(run.executed[at : at + 2])


def _flops_at(run: Run, step: int) -> float | None:
    at = np.flatnonzero(run.step == step)
    return float(run.flops[at[-1]]) if len(at) and math.isfinite(run.flops[at[-1]]) else None


def _inference_flops(run: Run, found: Found) -> int | None:
    """By the depth of its records; the rows of the head follow from the number of parameters."""
    model = model_of(run)
    length = _number_in(run.config.get("data"), "sequence_length")
    if not found or model is None or not length or run.plan is None or run.parameters is None:
        return None
    tables = 1 if model.tied_embeddings else 2
    rows, rest = divmod(run.parameters - parameters(run.plan.plan, model, vocab_size=0), tables * model.hidden_size)
    try:
        plan = DepthSpec.parse(next(iter(found.values())).subject.depth).plan
    except MegaloopError:
        return None
    return flops_per_token(plan, model, length, vocab_size=rows).forward if rows > 0 and not rest else None


def _number_in(section: object, key: str) -> int | None:
    value = section.get(key) if isinstance(section, dict) else None
    return value if type(value) is int and value > 0 else None


# --- ladders


def _ladders(groups: Sequence[Group]) -> list[Ladder]:
    runs = [run for group in groups for run in group.runs]
    found: dict[str, set[int]] = {}
    for run in runs:
        for record in run.by_step:
            found.setdefault(_resolved(str(record.subject.data)), set()).add(record.subject.difficulty or 0)
    sources = dict.fromkeys(path for run in runs for path in _sources(run))
    trained = [path for path in sources if path in found]
    further: dict[str, list[str]] = {path: [] for path in trained}
    for path in sorted(set(found) - set(trained)):
        if trained:  # of several tasks, that whose path is most alike
            further[max(trained, key=lambda own: _alike(own, path))].append(path)
        else:
            further[path] = [path]
    return [
        _ladder(own, found.get(own, set()) if own in trained else set(), others, found)
        for own, others in further.items()
    ]


def _alike(path: str, other: str) -> int:
    """Characters that two paths begin with, both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, other, strict=False)))


def _ladder(own: str, difficulties: set[int], others: Sequence[str], found: Mapping[str, set[int]]) -> Ladder:
    asks = next((path for path in others if difficulties and found[path] >= difficulties), own)
    beyond: dict[int, Rung] = {}
    for path in others:
        for difficulty in found[path] - difficulties:
            beyond.setdefault(difficulty, Rung(path, difficulty))
    name = printable(Path(own).name or own, 80)
    return Ladder(
        name if asks == own else f"{name}, as {printable(Path(asks).name or asks, 80)} asks it",
        tuple(Rung(asks, difficulty) for difficulty in sorted(difficulties)),
        tuple(beyond[difficulty] for difficulty in sorted(beyond)),
    )


def _sources(run: Run) -> list[str]:
    data = run.config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    listed = [source.get("path") for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    return [_resolved(path) for path in listed if isinstance(path, str)]


@lru_cache(maxsize=1024)
def _resolved(path: str) -> str:
    """As both configurations and records may name it from another directory, or through links."""
    try:
        return str(Path(path).resolve())
    except (OSError, RuntimeError, ValueError):  # no path: it holds a null character, or links in a circle
        return path
