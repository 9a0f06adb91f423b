"""Results of evaluation, one JSON object per line in ``evaluation.jsonl``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaloop.errors import MegaloopError

__all__ = ["EVALUATION", "Measured", "Record", "Subject", "append_record", "clustered", "read_records"]

EVALUATION = "evaluation.jsonl"


@dataclass(frozen=True)
class Subject:
    """What was evaluated, and how: records of equal subjects are of the same measurement.

    Attributes:
        task: a primitive's name, or ``validation``.
        data: of validation: the data set.
        shots: solved examples before each question.
        loops: how often the looped block runs; 1 in a model without loops.
        depth: the order of layers that ran.
        block: the layers that the loop runs, as ``first:stop`` by place; None without loop.
        examples: questions; of validation: samples.
        seed: of the examples.
        precision: fp32 or bf16.
        version: of tasks and prompts.
        step: of the checkpoint.
        checkpoint: its manifest's checksum.
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


@dataclass(frozen=True)
class Measured:
    """A mean over examples and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Record:
    """One line.

    Attributes:
        subject: what it is of.
        values: of a primitive: accuracy, accuracy_stderr, exact_match, exact_match_stderr, chance; of validation: loss and
            loss_stderr (nats per token), bits_per_byte, tokens; of both: seconds.
        time: when it was measured, in UTC.
    """

    subject: Subject
    values: dict[str, Any]
    time: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.subject), **self.values, "time": self.time}


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
    variance = math.fsum(each**2 for each in sums.values()) * count / (count - 1)
    return Measured(mean, math.sqrt(variance) / len(values))


def append_record(path: Path, record: Record) -> None:
    """Add a line, in one write: several evaluations may write to a file at a time.

    Raises:
        MegaloopError: it cannot be written.
    """
    line = json.dumps(record.to_json()).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell() and not _ends_a_line(path):
                line = b"\n" + line  # after a line that was torn
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MegaloopError(f"eval: cannot write {path} ({error.strerror})") from None


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_records(path: Path) -> dict[Subject, Record]:
    """The lines of a file, the last one of each subject; lines that are not whole, or of another format, are passed over."""
    records: dict[Subject, Record] = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise MegaloopError(f"eval: cannot read {path} ({error.strerror})") from None
    names = list(Subject.__dataclass_fields__)
    for line in lines:
        try:
            values = json.loads(line)
            subject = Subject(**{name: values.pop(name) for name in names})
            records[subject] = Record(subject, values, values.pop("time"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return records
