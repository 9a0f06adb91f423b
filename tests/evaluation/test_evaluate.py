"""Evaluating a checkpoint: what is measured, at which depth, how it is remembered, and on how many ranks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megaloop.data import DataSet
from megaloop.errors import MegaloopError
from megaloop.evaluation.evaluate import evaluate
from megaloop.evaluation.records import Record, clustered, read_records
from megaloop.inference.load import load_decoder
from megaloop.inference.loops import Block, EveryBlock, with_loops
from tests.cli.test_cli import megaloop
from tests.train.runs import metrics

QUICK: dict[str, Any] = {"tasks": ["variables-0-math", "copy-real"], "examples": 60, "shots": [2]}


def _values(records: list[Record]) -> list[dict[str, Any]]:
    """Without what differs from measurement to measurement."""
    return [{k: v for k, v in record.to_json().items() if k not in ("seconds", "time")} for record in records]


def _logits(run: Path, loops: int | None, block: Block | None = None) -> torch.Tensor:
    model, _ = load_decoder(run)
    with torch.no_grad():
        return model(torch.arange(60).reshape(2, 30), calls=with_loops(model.plan, loops, block).calls)


def test_one_loop_of_a_plain_model_changes_nothing_bit_for_bit(plain_run: Path) -> None:
    model, _ = load_decoder(plain_run)
    with torch.no_grad():
        plain = model(torch.arange(60).reshape(2, 30))
    assert torch.equal(_logits(plain_run, 1), plain)
    assert torch.equal(_logits(plain_run, None), plain)
    assert not torch.equal(_logits(plain_run, 2, Block(1, 2)), plain)
    default, one = (evaluate(plain_run, loops=[loops], out=None, again=True, **QUICK) for loops in (None, 1))
    assert _values(default) == _values(one)


def test_a_looped_model_at_its_training_depth_gives_the_logits_of_training(looped_run: Path) -> None:
    """And the loss that training has written down for its held-out samples."""
    model, _ = load_decoder(looped_run)
    with torch.no_grad():
        trained = model(torch.arange(60).reshape(2, 30))
    assert torch.equal(_logits(looped_run, 2), trained)
    assert not torch.equal(_logits(looped_run, 3), trained)
    records = evaluate(looped_run, tasks=["validation"], samples=4, loops=[None, 2, 3], again=True)
    assert [record.subject.depth for record in records] == ["1-1x2-1", "1-1x3-1"]
    assert records[0].values["loss"] == pytest.approx(metrics(looped_run)[-1]["val_loss"], abs=2e-6)
    assert records[0].values["bits_per_byte"] == pytest.approx(metrics(looped_run)[-1]["val_bits_per_byte"], rel=1e-5)
    assert records[1].values["loss"] != records[0].values["loss"]


def test_held_out_loss_is_that_of_the_samples(plain_run: Path) -> None:
    model, checkpoint = load_decoder(plain_run)
    (record,) = evaluate(plain_run, tasks=["validation"], samples=10, again=True)
    split = DataSet.open(Path(checkpoint.manifest.config["data"]["sources"][0]["path"]), 32).split("validation")
    tokens = torch.stack([torch.from_numpy(split.sample(index).tokens) for index in range(10)])
    with torch.no_grad():
        losses = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    assert record.values["loss"] == pytest.approx(float(losses.mean()), abs=1e-6)
    assert record.values["loss_stderr"] == pytest.approx(float(losses.std() / 10**0.5), rel=1e-4)
    size = sum(split.sample(index).bytes for index in range(10))
    assert record.values["bits_per_byte"] == pytest.approx(float(losses.mean()) * 320 / math.log(2) / size, rel=1e-6)


def test_what_was_measured_is_remembered_until_the_model_changes(plain_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(plain_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.jsonl"))
    asked: list[str] = []
    first = evaluate(run, **QUICK, on_step=lambda what, done, total: asked.append(what))
    assert asked
    file = run / "evaluation.jsonl"
    content = file.read_bytes()
    file.write_bytes(content + b'{"torn')  # as a killed evaluation leaves it
    asked.clear()
    assert evaluate(run, **QUICK, on_step=lambda what, done, total: asked.append(what)) == first
    assert not asked
    more = evaluate(run, **{**QUICK, "shots": [2, 0]}, on_step=lambda what, done, total: asked.append(what))
    assert set(asked) == {"variables-0-math, 0 shots", "copy-real, 0 shots"}
    assert more[:2] == first
    again = evaluate(run, **QUICK, again=True)
    assert _values(again) == _values(first)
    assert set(read_records(file)) == {record.subject for record in [*more, *again]}
    older = run / "checkpoints" / "step-00000010"
    assert evaluate(older, **QUICK)[0].subject.step == 10


def test_more_examples_narrow_the_error_and_keep_the_first(plain_run: Path) -> None:
    few, many = (evaluate(plain_run, tasks=["addition"], examples=count, again=True)[0].values for count in (100, 1000))
    assert 0 < many["accuracy_stderr"] < few["accuracy_stderr"] < 0.1
    assert many["accuracy"] == pytest.approx(0.2, abs=0.06)  # it has never seen a number


def test_errors_of_clusters_are_those_of_their_sums() -> None:
    values = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert clustered(values, range(6)).error == pytest.approx(float(torch.tensor(values).std()) / 6**0.5)
    assert clustered(values, [0, 0, 1, 1, 2, 2]).error == pytest.approx(
        float(torch.tensor([1.0, 0.0, 1.0]).std()) / 3**0.5
    )
    assert clustered(values, [0] * 6) == clustered(values, range(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["nothing"]}, "unknown task 'nothing'"),
        ({"tasks": ["hellaswag"]}, "tasks of EleutherAI's lm-eval go to megaloop eval --harness hellaswag"),
        ({"loops": [2], "blocks": [Block(2, 5)]}, "--block 2:5: the model has 3 layers"),
        ({"loops": [2], "blocks": [EveryBlock(4)]}, "--block every:4: the model has 3 layers"),
        ({"data": [Path("nowhere")]}, "data nowhere: no data.json there"),
    ],
)
def test_what_does_not_fit_is_one_line(plain_run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MegaloopError) as caught:
        evaluate(plain_run, **{**QUICK, **options})
    assert message in str(caught.value)


def test_a_trained_loop_stays_where_it_is(looped_run: Path) -> None:
    with pytest.raises(MegaloopError, match="was trained with a loop over 1:2"):
        evaluate(looped_run, **QUICK, loops=[3], blocks=[Block(0, 1)])
    with pytest.raises(MegaloopError, match="expected FIRST:STOP"):
        Block.parse("3")
    assert EveryBlock.parse("every:2") == EveryBlock(2)
    assert EveryBlock.parse("1:3") == Block(1, 3)
    for text in ("every:", "every:0", "every:two"):
        with pytest.raises(MegaloopError, match="expected every:N"):
            EveryBlock.parse(text)


def test_data_of_another_tokenizer_is_refused(plain_run: Path, tmp_path: Path) -> None:
    from data_prep.prepare import prepare

    texts = [{"text": f"{number} bottles of beer on the wall. " * 9} for number in range(80)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    prepare([tmp_path / "text.jsonl"], tmp_path / "other", vocab_size=290, sequence_length=32, validation_fraction=0.3)
    with pytest.raises(
        MegaloopError,
        match=r"has another tokenizer \(SHA-256 .*than checkpoint .*prepare the data again with --tokenizer",
    ):
        evaluate(plain_run, tasks=["validation"], data=[tmp_path / "other"])


@pytest.mark.slow
def test_the_command_line_shows_and_remembers_and_shares_over_ranks(plain_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(plain_run, tmp_path / "run")
    arguments = ("eval", run, "--tasks", "p-hop,validation", "--examples", "110", "--shots", "0,1", "--json")
    shared = megaloop(*arguments, "--loops", "1,2", "--block", "1:2", "--ranks", "2", "--out", tmp_path / "two.jsonl")
    assert shared.returncode == 0, shared.stderr
    alone = megaloop(*arguments, "--loops", "1,2", "--block", "1:2")
    assert alone.returncode == 0, alone.stderr
    one, two = (json.loads(result.stdout)["records"] for result in (alone, shared))
    assert len(one) == 6  # two depths, each with validation and two numbers of shots
    for mine, theirs in zip(one, two, strict=True):
        for name in set(mine) - {"seconds", "time"}:
            expected = pytest.approx(mine[name], abs=1e-6) if isinstance(mine[name], float) else mine[name]
            assert theirs[name] == expected
    table = megaloop("eval", run, "--tasks", "p-hop", "--examples", "110", "--shots", "0")
    assert "p-hop" in table.stdout
    assert "20 %" in table.stdout
    assert "p-hop" not in table.stderr  # it was remembered
    for wrong, message in (
        (("--shots", "x"), "--shots x: expected whole numbers from 0 on"),
        (("--loops", "0"), "--loops 0: expected whole numbers from 1 on"),
        (("--block", "1:2"), "say how often with --loops"),
        (("--loops", "\N{SUPERSCRIPT TWO}"), "expected whole numbers from 1 on"),
    ):
        result = megaloop("eval", run, *wrong)
        assert (result.returncode, message in result.stderr) == (2, True)
