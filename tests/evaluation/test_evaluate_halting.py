"""Halting and caches as axes of evaluation: what records say, and what is remembered and shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megaloop.cli.main import app
from megaloop.errors import MegaloopError
from megaloop.evaluation.evaluate import evaluate
from megaloop.evaluation.records import Record, read_records
from megaloop.inference.caches import CachePolicy
from megaloop.inference.halting import Halting
from tests.distributed import run_ranks

TASKS: dict[str, Any] = {"tasks": ["copy-real", "validation"], "examples": 30, "shots": [1], "samples": 6, "loops": [4]}
HALTS = [Halting.parse("latent=0.2"), Halting.parse("fixed=2"), Halting("oracle")]


@pytest.fixture(scope="module")
def run(looped_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(looped_run, tmp_path_factory.mktemp("halting") / "run")


@pytest.fixture(scope="module")
def measured(run: Path) -> list[Record]:
    return evaluate(run, **TASKS, halts=HALTS, caches=[CachePolicy(1)])


def of(records: list[Record], task: str, halt: str | None, cache: str = "full") -> dict[str, Any]:
    (record,) = (
        one for one in records if (one.subject.task, one.subject.halt, one.subject.cache) == (task, halt, cache)
    )
    return record.values


def test_every_criterion_is_measured_with_every_cache(measured: list[Record]) -> None:
    asked = [(record.subject.halt, record.subject.cache, record.subject.task) for record in measured]
    assert asked == [
        (str(halting), cache, task)
        for halting in HALTS
        for cache in ("full", "last")
        for task in ("validation", "copy-real")
    ]
    for record in measured:
        values, counts = record.values, record.values["loops_histogram"]
        assert len(counts) == 4
        assert values["loops_mean"] == pytest.approx(
            sum(count * loops for loops, count in enumerate(counts, start=1)) / sum(counts)
        )
        assert ("cache_bytes" in values) is (record.subject.cache == "last")
        if record.subject.task == "validation":
            assert sum(counts) == values["tokens"] == 6 * 32
    fixed = of(measured, "validation", "fixed=2")
    assert fixed["loops_histogram"] == [0, fixed["tokens"], 0, 0]
    last = of(measured, "copy-real", "fixed=2", "last")
    assert last["cache_bytes"] * 2 == last["cache_bytes_full"]  # 3 of 6 executed layers keep theirs


def test_the_oracle_is_as_right_as_all_iterations(run: Path, measured: list[Record]) -> None:
    plain = evaluate(run, **TASKS)
    task, held = of(measured, "copy-real", "oracle"), of(measured, "validation", "oracle")
    assert task["accuracy"] == of(plain, "copy-real", None)["accuracy"]
    assert held["loss"] == pytest.approx(of(plain, "validation", None)["loss"], abs=1e-5)
    assert 1 <= held["loops_mean"] < 4
    assert "loops_mean" not in of(plain, "validation", None)


def test_a_depth_without_a_loop_is_measured_as_it_runs_beside_others(plain_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(plain_run, tmp_path / "run")
    notes: list[str] = []
    axes: dict[str, Any] = {"tasks": ["validation"], "samples": 6, "halts": HALTS[:2], "caches": [CachePolicy(1)]}
    records = evaluate(run, **axes, loops=[1, 3], on_note=notes.append)
    asked = [(record.subject.loops, record.subject.halt, record.subject.cache) for record in records]
    assert asked == [
        (1, None, "full"),
        *((3, str(halting), cache) for halting in HALTS[:2] for cache in ("full", "last")),
    ]
    assert "loops_mean" not in records[0].values
    assert len(notes) == 1
    assert notes[0].startswith("--loops 1: nothing loops there")
    with pytest.raises(MegaloopError, match="the model runs without a loop"):
        evaluate(run, **axes, loops=[1])


def test_loops_by_kind_of_token_and_over_a_text(measured: list[Record]) -> None:
    held = of(measured, "validation", "latent=0.2")
    classes = held["loops_by_class"]
    assert sum(tokens for _, tokens in classes.values()) == held["tokens"]
    mean = sum(mean * tokens for mean, tokens in classes.values()) / held["tokens"]
    assert mean == pytest.approx(held["loops_mean"])
    assert "words" in classes
    pieces = held["loops_text"]
    assert pieces[0][1] is None
    assert {loops for _, loops in pieces[1:]} <= {1, 2, 3, 4}
    assert "".join(piece for piece, _ in pieces).strip()


def test_it_is_remembered_by_criterion_and_cache(run: Path, measured: list[Record]) -> None:
    asked: list[str] = []
    again = evaluate(
        run, **TASKS, halts=HALTS, caches=[CachePolicy(1)], on_step=lambda what, done, total: asked.append(what)
    )
    assert again == measured
    assert not asked
    other = [Halting.parse("fixed=2", minimum=2), Halting.parse("fixed=2", scope="sequence")]
    more = evaluate(run, **TASKS, halts=other, on_step=lambda what, done, total: asked.append(what))
    assert set(asked) == {"validation, 4 loops, fixed=2", "copy-real, 1 shots, 4 loops, fixed=2"}
    assert not {record.subject for record in more} & {record.subject for record in measured}
    found = read_records(run / "evaluation.jsonl")
    assert all(found[record.subject] == record for record in [*measured, *more])


def _on_ranks(run: Path, out: Path) -> None:
    evaluate(run, **TASKS, halts=HALTS[:1], out=out)


def test_ranks_share_it(run: Path, measured: list[Record], tmp_path: Path) -> None:
    run_ranks(2, _on_ranks, run, tmp_path / "two.jsonl")
    for subject, record in read_records(tmp_path / "two.jsonl").items():
        (alone,) = (one for one in measured if one.subject == subject)
        for name in set(alone.values) - {"seconds"}:
            value = alone.values[name]
            assert record.values[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value)


def _eval(*words: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def test_the_tables_show_loops_and_what_fewer_caches_cost(run: Path, measured: list[Record]) -> None:
    words = (run, "--tasks", "copy-real,validation", "--examples", 30, "--shots", 1, "--samples", 6, "--loops", 4)
    result = _eval(*words, "--halt", "latent=0.2,fixed=2", "--cache", "last")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    first = lines[0].split()
    assert first[:6] == ["task", "depth", "halt", "cache", "loops", "shots"]
    assert any("fixed=2" in line and "last" in line and "2.00" in line for line in lines)
    assert sum("50%" in line for line in lines) == 4  # two criteria, each on a task and on held-out text
    difference = of(measured, "validation", "fixed=2", "last")["loss"] - of(measured, "validation", "fixed=2")["loss"]
    assert f"{difference:+.4f}" in result.stdout
    assert any(line.startswith("loops for") and "words" in line for line in lines)
    shown = json.loads(_eval(*words, "--halt", "fixed=2", "--json").stdout)["records"]
    assert [value["halt"] for value in shown] == ["fixed=2", "fixed=2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--halt", "never"], "--halt never: no such criterion; choose from kl"),
        (["--halt", "kl=-1"], "--halt kl=-1: expected kl=THRESHOLD"),
        (["--cache", "half"], "--cache half: expected full, last or shared=N"),
        (["--min-loops", "2"], "--min-loops, --halt-scope and --halt-decay belong to --halt"),
        (["--halt", "kl=1e-3", "--min-loops", "3"], "--min-loops 3: the loop runs 2 times at most"),
        (["--halt", "kl=1e-3", "--halt-decay", "4"], "--halt-decay is of CALM's confidence"),
        (["--halt", "kl=1e-3,fixed=1", "--harness", "x"], "one block, one --halt, one --cache"),
        (["--loops", "1,2", "--harness", "x"], "takes one number of shots and of loops"),
        (["--shots", "1,5", "--harness", "x"], "takes one number of shots and of loops"),
        (["--out", "x.jsonl", "--harness", "x"], "--out is not for --harness"),
        (["--halt", ""], "--halt: nothing is named; give a value"),
        (["--cache", ","], "--cache: nothing is named; give a value"),
    ],
)
def test_what_makes_no_sense_is_one_line(run: Path, options: list[str], message: str) -> None:
    result = _eval(run, *options)
    assert isinstance(result.exception, MegaloopError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_model_without_a_loop_says_how_to_get_one(plain_run: Path) -> None:
    with pytest.raises(MegaloopError, match=r"the model runs without a loop .* give it one with"):
        evaluate(plain_run, tasks=["validation"], halts=HALTS[:1])
