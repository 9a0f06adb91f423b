"""What the page's section *Signatures* shows: how the runs of each group use their depth, as ``megaloop diagnose`` measured it.

Runs compare where they were asked with the same prompts in the same way. Of each run the newest step that was diagnosed counts; where runs were asked
with different prompts, those that most of them share are shown, of equals those that most was asked with (a look at a few prompts does
not hide a whole diagnosis), and then, as of several blocks in a group, those that were asked last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaloop.analysis.results import DIAGNOSIS, Curve, DiagnosisRecord, Examination, Result, read_results
from megaloop.analysis.signature_table import signature_table
from megaloop.analysis.signatures import Signature
from megaloop.report.savings import Group

__all__ = ["DepthUse", "Row", "depth_use", "signature_rows"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DepthUse:
    """Of one group.

    Attributes:
        number: of the group on the page, which its colour follows.
        runs: of each diagnosed run its results by measure (:func:`_name`).
        block: layers of a block.
    """

    number: int
    label: str
    runs: tuple[dict[str, Result], ...]
    block: int

    def curve(self, measure: str, name: str) -> Array | None:
        """[runs, places]; None where no run has it. NaN where a value is not known."""
        return _rows([one.values for one in self._curves(measure, name)])

    def errors(self, measure: str, name: str) -> Array | None:
        """Standard errors of the same; no places, where they are not known."""
        return _rows([one.errors or [] for one in self._curves(measure, name)])

    def matrix(self, measure: str, name: str) -> Array | None:
        """[layer skipped, later layer], or [layer, token], the mean over runs; None where no run has it, or they differ in shape or in tokens."""
        results = [result for result in self._results(measure) if name in result.matrices]
        found = [result.matrices[name] for result in results]
        shapes = {(len(one), len(row)) for one in found for row in one}
        if (
            len(shapes) != 1
            or not all(*shapes)
            or not all(found)
            or any(r.labels != results[0].labels for r in results)
        ):
            return None
        return np.array(found, np.float64).mean(0)

    def mean(self, measure: str, name: str) -> float | None:
        """The mean over runs; None where no run has it."""
        found = [value for r in self._results(measure) if (value := r.numbers.get(name)) is not None]
        return float(np.mean(found)) if found else None

    def labels(self, measure: str, name: str) -> list[str]:
        """Of the places along a matrix, which its runs share; nothing where a measure has none."""
        return next((result.labels[name] for result in self._results(measure) if name in result.labels), [])

    def _curves(self, measure: str, name: str) -> list[Curve]:
        return [result.curves[name] for result in self._results(measure) if name in result.curves]

    def _results(self, measure: str) -> list[Result]:
        return [run[measure] for run in self.runs if measure in run]

    @cached_property
    def signatures(self) -> list[dict[str, Signature]]:
        """Of each run, by name."""
        return [{row.name: row for row in signature_table(run, self.block)} for run in self.runs]


def _rows(found: Sequence[Sequence[float | None]]) -> Array | None:
    """NaN for None; None where there are no rows, or not of one length."""
    if len({len(row) for row in found}) != 1:
        return None
    return np.array([[np.nan if value is None else value for value in row] for row in found])


@dataclass(frozen=True)
class Row:
    """One signature of one group.

    Attributes:
        mean: over the runs that have a number; None where none has.
        low, high: of one run its interval; of several the smallest and the largest of their numbers.
        verdicts: how many runs have which; of numbers that are not judged, nothing.
        why: what stands in the way of a number, or of a clear verdict.
    """

    mean: float | None
    low: float | None
    high: float | None
    verdicts: dict[str, int]
    why: str = ""


def depth_use(groups: Sequence[Group]) -> list[DepthUse]:
    """The groups that have diagnosed runs; a line that is damaged is as if it were not there."""
    current = {run.path: _newest(read_results(run.path / DIAGNOSIS)) for group in groups for run in group.runs}
    shared = Counter(how for found in current.values() for how in dict.fromkeys(_how(record) for record in found))
    if not shared:
        return []
    times = {_how(record): record.time for record in sorted(_all(current.values()), key=_time)}
    asked = Counter(_how(record) for record in _all(current.values()))
    chosen = max(shared, key=lambda how: (shared[how], asked[how], times[how]))
    made = []
    for number, group in enumerate(groups):
        found = [[record for record in current[run.path] if _how(record) == chosen] for run in group.runs]
        if any(found):
            block = max(reversed(_all(found)), key=_time).examination.block
            runs = [
                {_name(r.examination): r.result for r in records if r.examination.block == block} for records in found
            ]
            made.append(DepthUse(number, group.label, tuple(run for run in runs if run), block))
    return made


def _newest(found: Mapping[Examination, DiagnosisRecord]) -> list[DiagnosisRecord]:
    """Of the newest step, and of what was last measured there: a step that was trained again is another checkpoint. The oldest first."""
    records = sorted(found.values(), key=_time)
    if not records:
        return []
    last = max(reversed(records), key=lambda record: (record.examination.step, record.time)).examination
    return [
        record
        for record in records
        if (record.examination.step, record.examination.checkpoint) == (last.step, last.checkpoint)
    ]


def _time(record: DiagnosisRecord) -> str:
    return record.time


def _all(records: Iterable[Iterable[DiagnosisRecord]]) -> list[DiagnosisRecord]:
    return [record for some in records for record in some]


def _name(key: Examination) -> str:
    """A measure's name; of interventions that a primitive scores with how it was asked, of attributions with the prompt.

    "swap on copy-real, 5 shots, 250 questions, version 3", "erasure of prompt 3": what was asked in other ways is another measure, so
    that no mean is taken over both.
    """
    if "questions" in key.options:
        return f"{key.measure} on {key.options}"
    return f"{key.measure} of {key.options}" if key.options.startswith("prompt ") else key.measure


def _how(record: DiagnosisRecord) -> tuple[Any, ...]:
    """What must be the same for results to compare."""
    key = record.examination
    return key.prompts_sha256, key.count, key.precision, key.seed, key.version


def signature_rows(found: Sequence[DepthUse]) -> list[tuple[str, list[Row | None]]]:
    """Each signature's name, and a row for each group; None where it was not measured."""
    names = list(dict.fromkeys(_shown_name(name) for use in found for run in use.signatures for name in run))
    return [(name, [_row(use, name) for use in found]) for name in names]


def _shown_name(name: str) -> str:
    """Periods of blocks of different sizes are one line."""
    return "period of the block" if name.startswith("period of ") else name


def _row(use: DepthUse, name: str) -> Row | None:
    rows = [row for run in use.signatures for own, row in run.items() if _shown_name(own) == name]
    if not rows:
        return None
    known = [row for row in rows if row.value is not None]
    values = [row.value for row in known if row.value is not None]
    if not values:
        return Row(None, None, None, {}, rows[0].why)
    verdicts: Counter[str] = Counter(row.verdict for row in known if row.verdict != "-")
    low, high = (known[0].low, known[0].high) if len(known) == 1 else (min(values), max(values))
    return Row(float(np.mean(values)), low, high, dict(verdicts), next((row.why for row in known if row.why), ""))
