"""Results of ``megaloop diagnose``, one JSON object a line in ``diagnosis.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megaloop.analysis.signatures import Signature
from megaloop.errors import MegaloopError
from megaloop.runs import records

__all__ = [
    "DIAGNOSIS",
    "Curve",
    "DiagnosisRecord",
    "Examination",
    "Result",
    "append_result",
    "check_results",
    "curve",
    "read_results",
]

DIAGNOSIS = "diagnosis.jsonl"
_DIGITS = 6
_LARGEST = 1e30
Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
"""What JSON can hold, and sums and pictures of it too."""


class Curve(BaseModel):
    """A number for each place.

    Attributes:
        values: by place; of interventions by where they begin, of exits by how many layers ran (from 1 on).
        errors: standard errors over prompts; None: not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    values: list[Number | None]
    errors: list[Number | None] | None = None


class Result(BaseModel):
    """What a measure found.

    Attributes:
        curves, matrices, numbers: by name; of a matrix of effects the first index is the layer that was skipped, of an attribution the layer.
        by_prompt: for each prompt, what signatures are resampled from.
        labels: names of the places along a matrix: the tokens of a prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    curves: dict[str, Curve] = {}
    matrices: dict[str, list[list[Number]]] = {}
    numbers: dict[str, Number | None] = {}
    by_prompt: dict[str, list[list[Number]]] = {}
    labels: dict[str, list[str]] = {}
    signatures: list[Signature] = []

    def arrays(self, *names: str) -> list[NDArray[np.float64]] | None:
        """Of ``by_prompt``, each [P, ...]; None where one is missing, or they are not of the same prompts: somebody has edited them."""
        found = [self.by_prompt.get(name, []) for name in names]
        widths = [{len(row) for row in rows} for rows in found]
        if len({len(rows) for rows in found}) != 1 or any(len(width) != 1 or 0 in width for width in widths):
            return None
        return [np.array(rows, np.float64) for rows in found]


@dataclass(frozen=True)
class Examination:
    """What was looked at, and how: records of equal ones are of the same measurement.

    Attributes:
        measure: its name.
        prompts, prompts_sha256, count: where the prompts are from, which they are, how many.
        depth: the order of layers that ran.
        block: layers of a block that is repeated, and the period that is looked for.
        step, checkpoint: of the model: its training step and its manifest's checksum (of an import, whose manifest has a date, that of its files).
        precision: fp32 or bf16.
        seed: of boundaries and of the questions of primitives.
        version: of the definitions.
        options: of this measure, as text: a primitive and its shots, the steps of a lens.
    """

    measure: str
    prompts: str
    prompts_sha256: str
    count: int
    depth: str
    block: int
    step: int
    checkpoint: str
    precision: str
    seed: int
    version: int
    options: str = ""


@dataclass(frozen=True)
class DiagnosisRecord:
    """One line.

    Attributes:
        seconds: that it took.
        time: when, in UTC.
    """

    examination: Examination
    result: Result
    seconds: float
    time: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self.examination) | {
            "result": self.result.model_dump(mode="json", exclude_defaults=True),
            "seconds": self.seconds,
            "time": self.time,
        }


def curve(values: Sequence[float] | NDArray[np.float64], errors: NDArray[np.float64] | None = None) -> Curve:
    """Of arrays; what is no finite number is None."""
    return Curve(values=_rounded(values), errors=None if errors is None else _rounded(errors))


def _rounded(values: Sequence[float] | NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None for value in np.asarray(values, np.float64)]


def append_result(path: Path, record: DiagnosisRecord) -> None:
    """Add a line; MegaloopError if it cannot be written."""
    records.append_record(path, record.to_json(), "diagnose")


def check_results(path: Path) -> None:
    """MegaloopError if no line can be added, or the file is one of something else, such as the prompts."""
    records.check_appendable(path, "diagnose")
    lines = list(records.read_lines(path))
    if lines and not any(_is_result(*line) for line in lines):
        raise MegaloopError(
            f"diagnose: {path} has no results of diagnose, but {len(lines)} other lines; name another file with --out"
        )


def _is_result(line: bytes, record: dict[str, Any] | None) -> bool:
    """Damaged and cut off ones too."""
    return "prompts_sha256" in (record or {}) or line.startswith(b'{"measure":')


def read_results(path: Path) -> dict[Examination, DiagnosisRecord]:
    """The last record of each examination; what is no whole record is skipped, and so measured anew."""
    found = (_record(values) for values in records.read_records(path))
    return {record.examination: record for record in found if record is not None}


def _record(values: dict[str, Any]) -> DiagnosisRecord | None:
    texts = {
        name: records.text(values, name)
        for name in ("measure", "prompts", "prompts_sha256", "depth", "checkpoint", "precision", "options")
    }
    counts = {name: records.whole_number(values, name) for name in ("count", "block", "step", "seed", "version")}
    seconds, time = records.number(values, "seconds"), records.text(values, "time")
    if None in texts.values() or None in counts.values() or seconds is None or time is None:
        return None
    try:
        result = Result.model_validate_json(json.dumps(values.get("result")))
    except ValidationError:
        return None
    examination: Any = Examination(**texts, **counts)  # type: ignore[arg-type]
    return DiagnosisRecord(examination, result, seconds, time)
