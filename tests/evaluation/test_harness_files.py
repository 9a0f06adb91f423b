"""lm-eval asks the very questions of ``megaloop eval`` with the files that ``megaloop export-tasks`` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megaloop.cli.main import app
from megaloop.evaluation.evaluate import evaluate
from megaloop.evaluation.prompts import encode_pairs, questions
from megaloop.evaluation.tasks import TASKS, examples, shots
from megaloop.huggingface.weights import export_huggingface
from megaloop.inference.load import load_decoder
from tests.evaluation.lm_eval_scores import differences, ours, theirs

COUNT = 12
"""Questions of each task; the test after goes from one block of shots to the next."""


def _export_tasks(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export-tasks", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def _text(settings: dict[str, Any]) -> str:
    return Path(settings["dataset_kwargs"]["data_files"]["test"]).read_text()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))


@pytest.mark.slow
def test_lm_eval_says_the_same_of_the_exported_model(plain_run: Path, tmp_path: Path) -> None:
    export_huggingface(plain_run, tmp_path / "exported")
    found = differences(plain_run, tmp_path / "exported", tmp_path / "tasks", list(TASKS), [0, 5], COUNT)
    assert len(found) == 2 * len(TASKS)
    assert max(likelihood for likelihood, _ in found.values()) < 1.6e-5, found
    assert max(accuracy for _, accuracy in found.values()) == 0, found


@pytest.mark.slow
def test_megaloop_eval_says_it_too_and_so_does_our_adapter(plain_run: Path, tmp_path: Path) -> None:
    name, count = "variables-1-basic", 60
    (record,) = evaluate(plain_run, tasks=[name], shots=[5], examples=count, again=True)
    assert record.values["accuracy"] == ours(plain_run, name, 5, count).accuracy
    assert record.values["chance"] == 0.2
    export_huggingface(plain_run, tmp_path / "exported")
    other = theirs(tmp_path / "exported", tmp_path / "tasks", [name], [5], count)
    assert record.values["accuracy"] == other[f"megaloop-{name}-5shot"].accuracy
    # without shots, where the prompts still fit the 32 tokens that this model was trained with
    (record,) = evaluate(plain_run, tasks=["addition"], shots=[0], examples=count, again=True)
    _export_tasks(tmp_path / "more", "--tasks", "addition", "--shots", 0, "--examples", count)
    arguments = ["--harness", "megaloop-0shot", "--harness-path", str(tmp_path / "more"), "--json"]
    printed = CliRunner().invoke(app, ["eval", str(plain_run), *arguments], catch_exceptions=False).stdout
    assert json.loads(printed.splitlines()[-1])["megaloop-addition-0shot"]["acc,none"] == record.values["accuracy"]


def test_files_hold_the_questions_and_the_shots(tmp_path: Path) -> None:
    printed = json.loads(
        _export_tasks(tmp_path / "x", "--tasks", "p-hop,copy-random", "--shots", "0,2", "--examples", 51, "--json")
    )
    assert printed["tasks"] == [f"megaloop-{name}-{n}shot" for name in ("p-hop", "copy-random") for n in (0, 2)]
    for name in ("p-hop", "copy-random"):
        task = TASKS[name]
        settings = yaml.safe_load((tmp_path / "x" / f"megaloop-{name}-2shot.yaml").read_text())
        assert settings["target_delimiter"] == task.delimiter
        lines = [json.loads(line) for line in _text(settings).splitlines()]
        asked = examples(task, 51, 0)
        assert [line["gold"] for line in lines] == [example.correct for example in asked]
        assert [tuple(line["choices"]) for line in lines] == [example.candidates for example in asked]
        assert all(line["answer"] == task.delimiter + line["choices"][line["gold"]] for line in lines)
        assert lines[49]["prompt"] == task.prompt(shots(task, 2, 0, 0), asked[49])
        assert lines[50]["prompt"] == task.prompt(shots(task, 2, 0, 1), asked[50])
    assert "lm_eval --include_path" in _export_tasks(tmp_path / "x", "--tasks", "p-hop")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "copy-words"], "task copy-words is now called copy-real"),
        (["--shots", "x"], "--shots x: expected whole numbers from 0 on"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["export-tasks", str(tmp_path / "x"), *arguments])
    assert message in str(result.exception)
    assert not (tmp_path / "x").exists()


def test_a_directory_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["export-tasks", str(tmp_path / "file"), "--tasks", "p-hop"])
    assert "export-tasks: cannot write" in str(result.exception)


@pytest.mark.slow  # lm-eval takes seconds to import
@pytest.mark.parametrize("context", ["Answer:", "Answer: ", "a b\n\n", "Sum = ", " x\t "])
def test_pairs_are_encoded_as_lm_eval_does(plain_run: Path, context: str) -> None:
    from megaloop.evaluation.harness import HarnessModel

    model, opened = load_decoder(plain_run)
    tokenizer = opened.open_tokenizer("questions are text")
    harness = HarnessModel(model, tokenizer, 32)
    for continuation in (" 13\n", "\noxw\n", "7", "x y"):
        seen, (after,) = encode_pairs(tokenizer, context, [continuation])
        assert (seen, after) == harness._encode_pair(context, continuation)


@pytest.mark.parametrize("name", TASKS)
def test_what_questions_share_and_their_rests_are_the_prompts(plain_run: Path, name: str) -> None:
    _, opened = load_decoder(plain_run)
    tokenizer = opened.open_tokenizer("questions are text")
    task = TASKS[name]
    asked, solved = examples(task, 50, 0), shots(task, 5, 0, 0)
    beginning, rows = questions(tokenizer, task, solved, asked)
    for example, row in zip(asked, rows, strict=True):
        assert beginning + row.query == tokenizer.encode_prompt(task.prompt(solved, example))
        for candidate, answer in zip(example.candidates, row.answers, strict=True):
            whole = task.prompt(solved, example) + task.delimiter + candidate
            assert beginning + row.query + answer == tokenizer.encode_prompt(whole)
    assert len({row.query[0] for row in rows}) > 1 or min(len(row.query) for row in rows) == 1  # no more is shared
    assert len(beginning) > 5 * min(len(row.query) for row in rows)  # the shots are
    (alone,) = questions(tokenizer, task, solved, asked[:1])[1]
    assert len(alone.query) == 1
