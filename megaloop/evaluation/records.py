"""Results of evaluation, one JSON object per line in ``evaluation.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaloop.runs import records

__all__ = [
    "DIFFICULTY",
    "EVALUATION",
    "Measured",
    "Record",
    "Subject",
    "append_record",
    "clustered",
    "ratio",
    "read_records",
]

EVALUATION = "evaluation.jsonl"
DIFFICULTY = "difficulty"
"""The task of records that are of one difficulty of a data set with targets."""
_LARGEST = 1e30
_VALUES = (
    "accuracy",
    "accuracy_stderr",
    "exact_match",
    "exact_match_stderr",
    "chance",
    "loss",
    "loss_stderr",
    "bits_per_byte",
    "last_accuracy",
    "last_accuracy_stderr",
    "floor",
    "last_floor",
    "tokens",
    "seconds",
)


@dataclass(frozen=True)
class Subject:
    """What was evaluated, and how: records of equal subjects are of the same measurement.

    Attributes:
        task: a primitive's name, ``validation``, or ``difficulty``.
        data: of validation and difficulty: the data set.
        shots: solved examples before each question.
        loops: how often the looped block runs; 1 in a model without loops.
        depth: the order of layers that ran.
        block: the layers that the loop runs, as ``first:stop`` by place; None without loop.
        examples: questions; of validation and difficulty: held-out samples asked for.
        seed: of the examples.
        precision: fp32 or bf16.
        version: of tasks and prompts.
        step: of the checkpoint.
        checkpoint: its manifest's checksum.
        document_masking: the model's attention stays inside documents. Records without this key are of models of which
            that is not so: until it came, such models were measured with attention across documents.
        difficulty: of the samples, from 0 on; of records of the task ``difficulty`` alone, which all have it.
        data_sha256: of validation and difficulty: of the held-out split's index, which tells what lay at the path; None in records that are
            older than it. It makes no other subject: what is measured when other data lies there takes the place of what was.
    """

    task: str
    data: str | None
    shots: int
    loops: int
    depth: str
    block: str | None
    examples: int
    seed: int
    precision: str
    version: int
    step: int
    checkpoint: str
    document_masking: bool = False
    difficulty: int | None = None
    data_sha256: str | None = field(default=None, compare=False)

    def is_of_same_data(self, other: Subject) -> bool:
        """Whether two equal subjects are of the same data, as far as is known."""
        return None in (self.data_sha256, other.data_sha256) or self.data_sha256 == other.data_sha256


@dataclass(frozen=True)
class Measured:
    """A mean over examples and its standard error."""

    mean: float
    error: float

    @property
    def known_error(self) -> float | None:
        """None where a single example says nothing of it."""
        return None if math.isnan(self.error) else self.error


@dataclass(frozen=True)
class Record:
    """One line.

    Attributes:
        subject: what it is of.
        values: of a primitive: accuracy, accuracy_stderr, exact_match, exact_match_stderr, chance; of validation: loss and
            loss_stderr (nats per token), bits_per_byte, tokens; of a difficulty: accuracy and accuracy_stderr over all
            places with a target, last_accuracy and last_accuracy_stderr over the last one of each sample, floor and
            last_floor (what the best guesser scores; None where not known), loss and loss_stderr (nats per target), tokens
            (targets); of all: seconds.
        time: when it was measured, in UTC.
    """

    subject: Subject
    values: dict[str, Any]
    time: str

    def to_json(self) -> dict[str, Any]:
        subject = asdict(self.subject)
        for name in ("difficulty", "data_sha256"):
            if subject[name] is None:
                del subject[name]  # lines of other tasks are as they were before there were these keys
        return {**subject, **self.values, "time": self.time}


def clustered(values: Sequence[float], clusters: Sequence[int]) -> Measured:
    """The mean, and its standard error where values of a cluster (shared shots) are not independent.

    The sandwich estimator with the usual G / (G - 1) for G clusters; values that are each a cluster of their own give the plain
    standard error. With a single cluster its values count as independent.
    """
    mean = math.fsum(values) / len(values)
    if len(set(clusters)) < 2:
        clusters = range(len(values))
    sums: dict[int, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    count = len(sums)
    if count < 2:
        return Measured(mean, math.nan)
    variance = math.fsum(total**2 for total in sums.values()) * count / (count - 1)
    return Measured(mean, math.sqrt(variance) / len(values))


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Measured:
    """A mean over items of clusters of different sizes, and its standard error: :func:`clustered`, from each cluster's sum and size."""
    total = sum(counts)
    mean = math.fsum(sums) / total
    if len(sums) < 2:
        return Measured(mean, math.nan)
    squares = math.fsum((part - mean * count) ** 2 for part, count in zip(sums, counts, strict=True))
    return Measured(mean, math.sqrt(squares * len(sums) / (len(sums) - 1)) / total)


def append_record(path: Path, record: Record) -> None:
    """Add a line; MegaloopError if it cannot be written."""
    records.append_record(path, record.to_json(), "eval")


def read_records(path: Path) -> dict[Subject, Record]:
    """The last record of each subject; lines that are no whole records are skipped, so that their subject is measured anew."""
    found = (_record(values) for values in records.read_records(path))
    return {record.subject: record for record in found if record is not None}


def _record(values: dict[str, Any]) -> Record | None:
    """What a line says; None where a value has another type than it should."""
    words = {name: records.text(values, name) for name in ("task", "depth", "precision", "checkpoint", "time")}
    options = {name: records.text(values, name) for name in ("data", "block", "data_sha256")}
    counts = {
        name: records.whole_number(values, name) for name in ("shots", "loops", "examples", "seed", "version", "step")
    }
    masking = values.get("document_masking", False)  # older records are of models without, or of a wrong loss
    wrong = [name for name, value in options.items() if value is None and values.get(name) is not None]
    difficulty = records.whole_number(values, "difficulty")
    if words["task"] == DIFFICULTY:
        wrong += [name for name, value in (("difficulty", difficulty), ("data", options["data"])) if value is None]
    elif values.get("difficulty") is not None:  # it would be of another measurement than its task says
        wrong.append("difficulty")
    if None in words.values() or None in counts.values() or not isinstance(masking, bool) or wrong:
        return None
    measured = {name: None if _unknown(values[name]) else values[name] for name in _VALUES if name in values}
    numbers = {name: records.number(measured, name) for name, value in measured.items() if value is not None}
    if any(value is None or abs(value) > _LARGEST for value in numbers.values()):
        return None
    if measured.get("loss" if words["task"] == "validation" else "accuracy") is None:
        return None
    time = words.pop("time")
    subject: Any = Subject(**words, **options, **counts, document_masking=masking, difficulty=difficulty)  # type: ignore[arg-type]
    return Record(subject, measured, str(time))


def _unknown(value: Any) -> bool:
    """No number, and none was meant: older versions wrote the error of a single example as NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))
