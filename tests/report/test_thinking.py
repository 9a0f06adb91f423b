"""The page's section on halting: its numbers are those of the records, and other sections do not see them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaloop.evaluation.records import DIFFICULTY, Record, Subject, append_record
from megaloop.report.page import make_report
from tests.report.rundirs import write_run

TEXT = [["<b>", None], ["one", 1], [" \n", 4], ["\x1b[2J" + "z" * 100, 2]]
SUBJECT = Subject(
    task="validation", data="data/hops", shots=0, loops=4, depth="0-2x4-0", block="0:2", examples=100, seed=0, precision="fp32",
    version=2, step=100, checkpoint="c",
)  # fmt: skip
HALTED = {
    ("kl=0.01", "token"): (2.0, 0.70), ("kl=0.001", "token"): (3.0, 0.80), ("kl=0.01", "sequence"): (3.5, 0.74),
    ("oracle", "token"): (1.5, 0.85), ("fixed=2", "token"): (2.0, 0.6),
}  # fmt: skip


def _append(run: Path, subject: Subject, **values: Any) -> None:
    append_record(run / "evaluation.jsonl", Record(subject, values, "2026-01-01T00:00:00+00:00"))


def _held_out(run: Path, shift: float) -> None:
    """A fixed count of 1 and 4 for all, each way of halting, and records that must not be drawn."""
    for count, accuracy in ((1, 0.3), (4, 0.85)):
        subject = replace(SUBJECT, loops=count, depth=f"0-2x{count}-0")
        _append(run, subject, accuracy=accuracy + shift, accuracy_stderr=0.01, loss=1.0, tokens=100)
    for (halt, scope), (mean, accuracy) in HALTED.items():
        subject = replace(SUBJECT, halt=halt, halt_scope=scope)
        text = {"loops_text": TEXT} if halt == "kl=0.01" and scope == "token" else {}
        values = {
            "accuracy": accuracy + shift,
            "accuracy_stderr": 0.01,
            "loss": 0.9,
            "tokens": 100,
            "loops_mean": mean,
        }
        _append(run, subject, **values, loops_histogram=[1, 2, 3, 4], **text)
        _append(run, replace(subject, cache="last"), **values | {"accuracy": 0.01}, cache_bytes=1, cache_bytes_full=4)
        for difficulty in (1, 2):
            own = replace(subject, task=DIFFICULTY, difficulty=difficulty)
            _append(run, own, **values | {"loops_mean": mean + difficulty / 10})
    _append(run, replace(SUBJECT, halt="kl=0.5", step=50), accuracy=0.1, loss=0.9, tokens=100, loops_mean=1.1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, made = tmp_path_factory.mktemp("thinking"), []
    for seed in (0, 1):
        made.append(
            write_run(folder / f"looped-seed{seed}", f"looped-seed{seed}", seed=seed, depth="0-2x4-0", layers=2)
        )
        _held_out(made[-1], shift=0.02 * seed)
    made.append(write_run(folder / "other", "other"))
    return made


def test_curves_are_those_of_the_records(runs: list[Path]) -> None:
    report, page = make_report(runs)
    found = {(one["criterion"], one["setting"]): one for one in report.thinking}
    assert list(found) == [
        ("kl", "kl=0.01"), ("kl", "kl=0.001"), ("kl, prompts as one", "kl=0.01"), ("oracle", "oracle"), ("fixed", "fixed=2"),
        ("all tokens alike", "1"), ("all tokens alike", "4"),
    ]  # fmt: skip
    assert {one["group"] for one in report.thinking} == {"looped"}
    point = found["kl", "kl=0.01"]
    assert (point["metric"], point["loops_mean"], point["value"]) == ("accuracy", 2.0, pytest.approx(0.71))
    assert point["error"] == pytest.approx(0.01)  # of two seeds 0.02 apart
    assert (found["all tokens alike", "4"]["loops_mean"], found["all tokens alike", "1"]["loops_mean"]) == (4.0, 1.0)
    assert "Loops that tokens take" in page


def test_loops_by_difficulty(runs: list[Path]) -> None:
    report, _ = make_report(runs)
    lines = {(one["setting"], one["difficulty"]): one["loops_mean"] for one in report.loops_by_difficulty}
    assert {setting for setting, _ in lines} == {
        "kl=0.01",
        "kl=0.01, prompts as one",
        "oracle",
    }  # the threshold near half; not fixed=2
    assert len(lines) == 2 * 3
    assert lines["kl=0.01, prompts as one", 2] == pytest.approx(3.7)


def test_a_text_is_coloured_by_loops_and_escaped(runs: list[Path]) -> None:
    _, page = make_report(runs)
    assert len(re.findall(r'<p class="loops">', page)) == 2, "one for each run that has one"
    start = page.index('<p class="loops">')
    shown = page[start : page.index("</p>", start)]
    assert "&lt;b&gt;" in shown
    assert 'title="1 of 4 loops">one</span>' in shown
    assert "rgba(213,94,0,0.70)" in shown  # all four
    assert "\x1b" not in shown
    assert "z" * 81 not in shown


def test_other_sections_do_not_see_it(runs: list[Path], tmp_path: Path) -> None:
    plain = [
        write_run(tmp_path / f"looped-seed{seed}", f"looped-seed{seed}", seed=seed, depth="0-2x4-0", layers=2)
        for seed in (0, 1)
    ]
    for seed, run in enumerate(plain):
        for loops, accuracy in ((1, 0.3), (4, 0.85)):
            subject = replace(SUBJECT, loops=loops, depth=f"0-2x{loops}-0")
            _append(run, subject, accuracy=accuracy + 0.02 * seed, accuracy_stderr=0.01, loss=1.0, tokens=100)
    without, page = make_report(plain)
    with_it, _ = make_report(runs[:2])
    assert (with_it.loops, with_it.primitives, with_it.difficulties) == (
        without.loops,
        without.primitives,
        without.difficulties,
    )
    assert not without.thinking
    assert "Loops that tokens take" not in page
