"""Results of evaluation, one JSON object per line in ``evaluation.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megaloop.runs import records

__all__ = [
    "DIFFICULTY",
    "EVALUATION",
    "MOST_SHOWN",
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
MOST_SHOWN = 200
"""Tokens of a text that a record shows with their loops."""
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
    "loops_mean",
    "cache_bytes",
    "cache_bytes_full",
    "seconds",
)
"""Numbers."""
_OPTIONAL = ("difficulty", "data_sha256", "halt", "cache", "min_loops", "halt_scope", "halt_decay")
"""Keys that lines have only where they say something: other lines are as they were before there were these keys."""


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
        halt: the criterion by which tokens left the loop, with its threshold; None: all iterations ran (so in lines without this key).
        min_loops, halt_scope, halt_decay: see :class:`megaloop.inference.halting.Halting`.
        cache: which iterations kept keys and values.
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
    halt: str | None = None
    min_loops: int = 1
    halt_scope: str = "token"
    halt_decay: float | None = None
    cache: str = "full"

    @property
    def is_plain(self) -> bool:
        """Every token ran all iterations on caches of its own: a forward pass of the model."""
        return self.halt is None and self.cache == "full"

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
            (targets); of all: seconds. With ``halt``: loops_mean and loops_histogram (tokens that ran 1, 2, ... iterations) of the tokens whose
            predictions count, of validation also loops_by_class ([mean loops, tokens] by what was predicted) and loops_text
            ([piece, loops]). With a ``cache`` other than full: cache_bytes and cache_bytes_full, per token.
        time: when it was measured, in UTC.
    """

    subject: Subject
    values: dict[str, Any]
    time: str

    def to_json(self) -> dict[str, Any]:
        subject = asdict(self.subject)
        without = {one.name: one.default for one in fields(Subject)}
        for name in _OPTIONAL:
            if subject[name] == without[name]:
                del subject[name]
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
    thought = _thought(values)
    measured = {name: None if _unknown(values[name]) else values[name] for name in _VALUES if name in values}
    numbers = {name: records.number(measured, name) for name, value in measured.items() if value is not None}
    if any(value is None or abs(value) > _LARGEST for value in numbers.values()):
        return None
    shaped = {name: values[name] for name in _SHAPES if name in values}
    if thought is None or not all(_SHAPES[name](value) for name, value in shaped.items()):
        return None
    if measured.get("loss" if words["task"] == "validation" else "accuracy") is None:
        return None
    time = words.pop("time")
    subject: Any = Subject(**words, **options, **counts, **thought, document_masking=masking, difficulty=difficulty)  # type: ignore[arg-type]
    return Record(subject, measured | shaped, str(time))


def _thought(values: dict[str, Any]) -> dict[str, Any] | None:
    """What a line says of halting and caches; None where a value has another type than it should."""
    plain = {one.name: one.default for one in fields(Subject)}
    found = {
        "halt": records.text(values, "halt"),
        "halt_scope": records.text(values, "halt_scope"),
        "cache": records.text(values, "cache"),
        "min_loops": records.whole_number(values, "min_loops"),
        "halt_decay": records.number(values, "halt_decay"),
    }
    if any(value is None and values.get(name) is not None for name, value in found.items()):
        return None
    return {name: plain[name] if value is None else value for name, value in found.items()}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_histogram(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_by_class(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(one, list) and len(one) == 2 and records.number({"": one[0]}, "") is not None and _is_count(one[1])
        for one in value.values()
    )


def _is_loops_text(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_SHOWN
        and all(
            isinstance(one, list)
            and len(one) == 2
            and isinstance(one[0], str)
            and (one[1] is None or _is_count(one[1]))
            for one in value
        )
    )


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "loops_histogram": _is_histogram,
    "loops_by_class": _is_by_class,
    "loops_text": _is_loops_text,
}
"""Values that are no numbers, and whether they are what they should be."""


def _unknown(value: Any) -> bool:
    """No number, and none was meant: older versions wrote the error of a single example as NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))
