"""Held-out loss and prompts are those of training, also where attention stays inside documents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megaloop.config import ModelConfig
from megaloop.data import DataSet, held_out_batch, held_out_places, validation_batches
from megaloop.depth import DepthPlan
from megaloop.evaluation.evaluate import evaluate
from megaloop.evaluation.harness import HarnessModel
from megaloop.evaluation.records import read_records
from megaloop.evaluation.scoring import Question, score
from megaloop.inference.generate import Generation, generate_text, generate_tokens
from megaloop.inference.load import load_decoder
from megaloop.inference.sampling import Sampling
from megaloop.model import Decoder, vocab_parallel_cross_entropy
from megaloop.tokenizer import load_tokenizer
from tests.train.runs import metrics


def test_the_loss_of_a_model_with_document_masking_is_that_of_training(masked_run: Path) -> None:
    """Across documents, which is what evaluation measured once, it is another."""
    (record,) = evaluate(masked_run, tasks=["validation"], samples=16, again=True)
    last = metrics(masked_run)[-1]
    assert record.values["loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    assert record.values["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-6)
    model, checkpoint = load_decoder(masked_run)
    dataset = DataSet.open(Path(checkpoint.manifest.config["data"]["sources"][0]["path"]), 32)
    batch = held_out_batch(held_out_places([dataset], 16), range(16))
    with torch.no_grad():
        across = float(vocab_parallel_cross_entropy(model(batch.inputs), batch.targets, model.tp))
    assert abs(across - last["val_loss"]) > 0.01
    one = validation_batches([dataset], samples=16, micro_batch=16)[0]
    assert torch.equal(one.documents, batch.documents)


def _older(run: Path, out: Path, tasks: list[str], **values: float) -> None:
    """Records as the version before wrote them, with values that no model has."""
    evaluate(run, tasks=tasks, samples=4, examples=25, out=out, again=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        del line["document_masking"]
        line |= {name: value for name, value in values.items() if name in line}
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_was_measured_across_documents_is_measured_anew(masked_run: Path, plain_run: Path, tmp_path: Path) -> None:
    """And what needed no correction stays remembered."""
    tasks = ["validation", "copy-real"]
    options: dict[str, Any] = {"tasks": tasks, "samples": 4, "examples": 25}
    for run, out in ((masked_run, tmp_path / "masked.jsonl"), (plain_run, tmp_path / "plain.jsonl")):
        _older(run, out, tasks, loss=99.0, accuracy=0.99)
        found = [
            record.values.get("loss", record.values.get("accuracy")) for record in evaluate(run, **options, out=out)
        ]
        assert (found == [99.0, 0.99]) is (run == plain_run)
        assert len(out.read_text().splitlines()) == (2 if run == plain_run else 4)


def test_a_line_that_was_tampered_with_is_no_record(plain_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.jsonl"
    (record,) = evaluate(plain_run, tasks=["copy-real"], examples=25, out=out, again=True)
    whole = record.to_json()
    kinds = {name: (int, float) if isinstance(value, float) else type(value) for name, value in whole.items()}
    kinds |= dict.fromkeys(("data", "block"), str)
    values: list[Any] = [None, True, "x", -1, 1.5, math.nan, 10**40, [], {}, [[[]]]]
    for wrong in values:
        lines = [{**whole, name: wrong} for name in whole]
        out.write_text("[1]\n1\nnull\n{}\n" + "".join(json.dumps(line) + "\n" for line in lines))
        for found in read_records(out).values():
            for name, value in found.to_json().items():
                assert value is None or isinstance(value, kinds[name]), name
    out.write_bytes(b"\xff\xfe" + b"[" * 100_000 + b"\n" + json.dumps(whole).encode())
    assert read_records(out) == {record.subject: record}


def test_a_single_example_has_no_error_of_its_own(plain_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.jsonl"
    (record,) = evaluate(plain_run, tasks=["copy-real"], examples=1, out=out)
    assert record.values["accuracy_stderr"] is None
    assert "NaN" not in out.read_text()
    assert evaluate(plain_run, tasks=["copy-real"], examples=1, out=out) == [record]


def test_a_model_with_document_masking_is_asked_as_it_was_trained(masked_run: Path) -> None:
    """A document of a sample has the logits that it has alone; what ends another would change them."""
    model, checkpoint = load_decoder(masked_run)
    assert checkpoint.tokenizer is not None
    end = load_tokenizer(checkpoint.tokenizer).eos_id
    dataset = DataSet.open(Path(checkpoint.manifest.config["data"]["sources"][0]["path"]), 32)
    batch = held_out_batch(held_out_places([dataset], 1), [0])
    inputs, _ = batch.for_model(True)
    with torch.no_grad():
        packed_SV = model(*inputs)[0].log_softmax(-1)
    places = (batch.documents[0] == 1).nonzero().flatten().tolist()
    document = batch.inputs[0, places].tolist()
    assert document[-1] == end
    expected = sum(float(packed_SV[place, token]) for place, token in zip(places, document[1:], strict=False))
    found, other = (
        score(model, beginning, [Question(document[:1], [document[1:]])])[0].log_likelihoods[0]
        for beginning in ([], [end])
    )
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(other - expected) > 1e-3


def _decoder(document_masking: bool) -> Decoder:
    config = ModelConfig(
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=64,
        document_masking=document_masking,
        vocab_size=128,
        tied_embeddings=False,
    )
    model = Decoder(config, 128, DepthPlan.plain(2))
    model.initialise(0)
    return model.eval()


@pytest.mark.parametrize("document_masking", [False, True])
def test_a_text_without_prompt_begins_after_the_end_of_another(document_masking: bool) -> None:
    """With document masking, its second token no longer sees that end."""
    model = _decoder(document_masking)
    found = list(generate_tokens(model, [], 6, end_id=2))
    first = next(generate_tokens(model, [2], 1))
    seen = [] if document_masking else [2]
    rest = list(generate_tokens(model, [*seen, first], 5))
    assert found == [first, *rest]


def test_generation_without_prompt_is_what_follows_a_document(plain_run: Path) -> None:
    model, checkpoint = load_decoder(plain_run)
    assert checkpoint.tokenizer is not None
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    tokens = list(generate_tokens(model, [tokenizer.eos_id], 8, vocab_size=tokenizer.vocab_size))
    assert tokenizer.eos_id not in tokens
    assert generate_text(plain_run, "", Generation(8, Sampling())).text == tokenizer.decode(tokens)


@pytest.mark.parametrize("document_masking", [False, True])
def test_the_harness_asks_for_a_text_without_context_as_training_did(document_masking: bool) -> None:
    class Tokens:
        eos_id, vocab_size = 2, 128

    model = _decoder(document_masking)
    harness = HarnessModel(model, Tokens(), 32)  # type: ignore[arg-type]
    ((likelihood, _),) = harness._loglikelihood_tokens([(None, [2], [5, 6, 7])])
    with torch.no_grad():
        inputs = torch.tensor([[2, 5, 6]])
        # with masking, the end of the document before belongs to that document
        logits_SV = model(inputs, torch.tensor([[0, 1, 1]]) if document_masking else None)[0].log_softmax(-1)
    assert likelihood == pytest.approx(float(logits_SV[range(3), [5, 6, 7]].sum()), abs=1e-4)
    assert harness._loglikelihood_tokens([(None, [2], []), (None, [2], [5])])[0] == (0.0, True)
