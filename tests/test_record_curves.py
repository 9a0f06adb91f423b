"""``tools/record_curves.py``: what shows that a refactoring changes no training curve must itself miss nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tools.record_curves import CURVES, FIELDS, RecordingError, compare, main, read_steps


def _record(**curves: Any) -> dict[str, Any]:
    return {"revision": "r", "machine": {"torch": "2"}, "data": {"tiny": "d"}, "curves": curves}


def _curve(steps: int = 3) -> dict[str, Any]:
    return {
        "steps": [
            {"step": n, "loss": (6.0 / n).hex(), "grad_norm": (1.0 / n).hex(), "lr": (0.001).hex(), "val_loss": None}
            for n in range(1, steps + 1)
        ]
    }


def _written(path: Path, record: dict[str, Any]) -> str:
    path.write_text(json.dumps(record), encoding="utf-8")
    return str(path)


def _metrics(path: Path, steps: int = 4, **changes: Any) -> Path:
    """As a run writes it; ``changes`` are those of the third step."""
    lines = [{"step": n, "loss": 6 / n, "grad_norm": 0.1, "lr": 1e-3, "val_loss": None} for n in range(1, steps + 1)]
    lines[-1]["val_loss"] = 5.1
    lines[2] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FIELDS)
def test_the_last_bit_of_any_number_is_a_difference(name: str) -> None:
    first = _record(a=_curve(), b=_curve())
    second = copy.deepcopy(first)
    for record, number in ((first, "0x1.0000000000000p+0"), (second, "0x1.0000000000001p+0")):
        record["curves"]["b"]["steps"][1][name] = number
        record["curves"]["b"]["steps"][2]["loss"] = number  # later: not what differs first
    assert compare(first, second) == {
        "a": None,
        "b": f"step 2 {name}: 1.0 against 1.0000000000000002, relative 2.2e-16",
    }


def test_a_validation_that_only_one_run_made_is_a_difference() -> None:
    first, second = _record(a=_curve()), _record(a=_curve())
    second["curves"]["a"]["steps"][0]["val_loss"] = (5.0).hex()
    assert compare(first, second) == {"a": "step 1 val_loss: none against 0x1.4000000000000p+2"}


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (None, "missing in the second record"),
        ({"error": "python -m megaloop ended with 2:\nno such key"}, "failed in the second record: no such key"),
        (_curve(2), "3 steps against 2"),
    ],
)
def test_a_curve_that_is_not_there_is_a_difference(entry: Any, told: str) -> None:
    second = _record() if entry is None else _record(a=entry)
    assert compare(_record(a=_curve()), second) == {"a": told}


@pytest.mark.parametrize("entry", [{"error": "e"}, {"steps": []}])
def test_two_failures_are_not_the_same_curve(entry: dict[str, Any]) -> None:
    assert compare(_record(a=entry), _record(a=entry))["a"] is not None


def test_other_data_is_told_as_such() -> None:
    first, second = _record(a=_curve()), _record(a=_curve())
    second["data"]["tiny"] = "other"
    assert compare(first, second) == {"data tiny": "the samples or the tokenizer are others", "a": None}


def test_the_command_tells_each_curve_and_fails_where_one_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = _record(a=_curve(), b=_curve()), _record(a=_curve(), b=_curve())
    before = _written(tmp_path / "a.json", first)
    assert main(["--compare", before, before]) == 0
    assert capsys.readouterr().out == "a  identical\nb  identical\nr and r: 2 of 2 identical\n"
    second["curves"]["b"]["steps"][0]["loss"] = (6.5).hex()
    second["machine"]["torch"] = "3"
    assert main(["--compare", before, _written(tmp_path / "b.json", second)]) == 1
    assert capsys.readouterr().out == (
        "note: torch 2 against 3; equal bits can not be expected\n"
        "a  identical\nb  DIFFERS  step 1 loss: 6.0 against 6.5, relative 7.7e-02\nr and r: 1 of 2 identical\n"
    )
    assert main(["--compare", *[_written(tmp_path / "empty.json", _record())] * 2]) == 1, "nothing proves nothing"


def test_records_hold_the_bits_of_metrics(tmp_path: Path) -> None:
    steps = read_steps(_metrics(tmp_path / "metrics.jsonl", loss=0.1), 4)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[2]["loss"] == "0x1.999999999999ap-4"
    assert [step["val_loss"] for step in steps] == [None, None, None, (5.1).hex()]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": None}, "step 3 has no finite loss"),
        ({"grad_norm": None}, "step 3 has no finite grad_norm"),
        ({"step": 2}, "expected steps 1 to 4 once each"),
        ({"step": 4}, "expected steps 1 to 4 once each"),
    ],
)
def test_half_a_curve_is_not_recorded(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    """Nor one of a tree that calls a number otherwise: nothing would be compared."""
    with pytest.raises(RecordingError, match=told):
        read_steps(_metrics(tmp_path / "metrics.jsonl", **changes), 4)


def test_a_curve_without_validation_is_not_recorded(tmp_path: Path) -> None:
    path = _metrics(tmp_path / "metrics.jsonl")
    path.write_text(path.read_text(encoding="utf-8").replace("val_loss", "validation"), encoding="utf-8")
    with pytest.raises(RecordingError, match="no step has a val_loss"):
        read_steps(path, 4)


def test_every_curve_has_its_name_and_what_it_starts_from_comes_before() -> None:
    names = [curve.name for curve in CURVES]
    assert len(set(names)) == len(names)
    assert all(curve.init is None or curve.init in names[: names.index(curve.name)] for curve in CURVES)


def test_a_folder_without_megaloop_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out.json"), "--tree", str(tmp_path), "--only", "loop-pp1"]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
