"""What ``megaloop eval`` prints."""

from __future__ import annotations

from typing import Any

import pytest

from megaloop.cli.evaluation_tables import print_records
from megaloop.evaluation.records import Record, Subject


def _record(task: str, step: int, difficulty: int | None, **values: Any) -> Record:
    subject = Subject(task, "hops", 0, 1, "4", None, 9, 0, "fp32", 2, step, "c", False, difficulty)
    return Record(subject, {"loss": 1.0, "loss_stderr": 0.1, "tokens": 9, **values}, "2026-11-25T00:00:00+00:00")


def test_accuracy_is_shown_over_all_too_and_documents_need_no_difficulty(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"accuracy": 0.625, "accuracy_stderr": 0.01, "last_accuracy": 0.5, "last_accuracy_stderr": 0.02}
    print_records([_record("validation", 8, None, **measured)], False)
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:3] == ["hops", "all", "4"]
    assert "62.5" in line
    print_records([_record("validation", 8, None, **measured), _record("difficulty", 8, 0, **measured)], False)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[-2:]] == ["all", "0"]


def test_losses_of_several_checkpoints_say_of_which(capsys: pytest.CaptureFixture[str]) -> None:
    print_records([_record("validation", step, None, bits_per_byte=2.0) for step in (4, 8)], False)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["task", "step", "depth"]
    assert [line.split()[4] for line in lines[:2]] == ["4", "8"]
