"""Lines of evaluation.jsonl: written, read back, and passed over where they say what they cannot mean."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaloop.evaluation.records import DIFFICULTY, Record, Subject, append_record, read_records

SUBJECT = Subject(
    task=DIFFICULTY, data="/data/hops", shots=0, loops=2, depth="3-2x2-3", block="3:5", examples=512, seed=0,
    precision="fp32", version=1, step=1500, checkpoint="c", difficulty=8,
)  # fmt: skip
VALUES: dict[str, Any] = {
    "accuracy": 0.75, "accuracy_stderr": 0.01, "last_accuracy": 0.7, "last_accuracy_stderr": 0.02, "floor": 0.5,
    "last_floor": None, "loss": 0.6, "loss_stderr": 0.01, "tokens": 20_000, "seconds": 1.5,
}  # fmt: skip


def _written(path: Path, **changes: Any) -> Path:
    """A file whose one line is that of a difficulty with some values changed."""
    record = {**Record(SUBJECT, VALUES, "2026-01-01T00:00:00+00:00").to_json(), **changes}
    path.write_text(json.dumps({key: value for key, value in record.items() if value != "absent"}) + "\n")
    return path


def test_records_of_difficulties_come_back_as_they_were_written(tmp_path: Path) -> None:
    for difficulty in (0, 8):
        for step in (500, 1500):
            subject = replace(SUBJECT, difficulty=difficulty, step=step)
            append_record(tmp_path / "e.jsonl", Record(subject, VALUES, "2026-01-01T00:00:00+00:00"))
    found = read_records(tmp_path / "e.jsonl")
    assert len(found) == 4
    assert all(record.values == VALUES for record in found.values())
    assert {subject.difficulty for subject in found} == {0, 8}


def test_a_line_of_another_task_has_no_difficulty(tmp_path: Path) -> None:
    subject = replace(SUBJECT, task="validation", difficulty=None)
    append_record(tmp_path / "e.jsonl", Record(subject, {"loss": 2.0}, "2026-01-01T00:00:00+00:00"))
    assert "difficulty" not in (tmp_path / "e.jsonl").read_text()
    assert list(read_records(tmp_path / "e.jsonl")) == [subject]


@pytest.mark.parametrize(
    "changes",
    [
        {"difficulty": "absent"}, {"difficulty": None}, {"difficulty": -1}, {"difficulty": 2.0}, {"difficulty": True},
        {"data": None}, {"task": "validation"}, {"task": "p-hop"}, {"accuracy": "absent"}, {"accuracy": None},
        {"last_accuracy": "0.5"}, {"floor": math.inf}, {"last_floor": [1]}, {"loss": 1e40},
    ],
)  # fmt: skip
def test_a_line_that_makes_no_sense_is_passed_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert len(read_records(_written(tmp_path / "right.jsonl"))) == 1
    assert not read_records(_written(tmp_path / "wrong.jsonl", **changes))
