"""Prompts and answers become samples of which the answers alone are learnt."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megaloop.config import Config, DataConfig, load_config
from megaloop.data import BatchLoader, open_sources, validation_batches
from megaloop.data.sft import FineTuningSet
from megaloop.errors import MegaloopError
from megaloop.tokenizer import load_tokenizer

LENGTH = 64


def examples(count: int = 120, seed: int = 0) -> list[dict[str, str]]:
    """Answers of one to many words."""
    rng = random.Random(seed)
    words = "king day night water stone people house lord hand eye".split()  # noqa: SIM905
    made = []
    for number in range(count):
        asked = " ".join(rng.choices(words, k=rng.randint(1, 6)))
        answer = " ".join(reversed(asked.split())) if number % 3 else "yes"
        made.append({"prompt": f"{asked} ->", "answer": f" {answer}"})
    return made


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _config(path: Path, corpus: Path, **changes: Any) -> DataConfig:
    values = {
        "sources": [{"path": path}],
        "format": "sft",
        "sequence_length": LENGTH,
        "tokenizer": corpus / "tokenizer.model",
    }
    return DataConfig.model_validate({**values, **changes})


def _opened(path: Path, corpus: Path, **changes: Any) -> FineTuningSet:
    (made,) = open_sources(_config(path, corpus, **changes)).datasets
    assert isinstance(made, FineTuningSet)
    return made


def test_answers_and_their_ends_are_learnt_and_nothing_else(corpus: Path, tmp_path: Path) -> None:
    """Read back from the samples: each example once, whole, its answer learnt up to the end-of-text token."""
    lines = examples()
    dataset = _opened(write(tmp_path / "a.jsonl", lines), corpus)
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    found = []
    for name in ("train", "validation"):
        split = dataset.split(name)
        assert sum(split.shard_sizes) == len(split)
        for index in range(len(split)):
            sample = split.sample(index)
            assert sample.loss_mask is not None
            assert len(sample.tokens) == LENGTH + 1
            assert split.loss_mask(index) == sample.loss_mask.sum()
            bounds = [*sample.starts.tolist(), LENGTH + 1]
            for start, stop in pairwise(bounds):
                tokens, loss_mask = sample.tokens[start:stop].tolist(), sample.loss_mask[start - 1 : stop - 1].tolist()
                if not any(loss_mask):
                    assert set(tokens) == {tokenizer.eos_id}  # padding
                    continue
                first, last = loss_mask.index(True), len(loss_mask) - loss_mask[::-1].index(True) - 1
                assert all(loss_mask[first : last + 1])
                assert set(tokens[last:]) == {tokenizer.eos_id}  # the answer's end, and perhaps one token of padding
                prompt, answer = (tokenizer.decode(part) for part in (tokens[:first], tokens[first:last]))
                found.append({"prompt": prompt, "answer": answer})
            assert sample.bytes == len(tokenizer.decode(sample.tokens[1:][sample.loss_mask].tolist()).encode())
    assert sorted(map(str, found)) == sorted(map(str, lines))


def test_samples_are_filled(corpus: Path, tmp_path: Path) -> None:
    dataset = _opened(write(tmp_path / "a.jsonl", examples()), corpus)
    split = dataset.split("train")
    used = sum(int(split.sample(index).starts[-1]) - 1 for index in range(len(split)))
    assert used > 0.6 * LENGTH * len(split)


def test_what_is_held_out_depends_on_the_text_alone(corpus: Path, tmp_path: Path) -> None:
    lines = examples()
    one = _opened(write(tmp_path / "a.jsonl", lines), corpus, validation_fraction=0.2)
    other = _opened(write(tmp_path / "b.jsonl", lines[::-1]), corpus, validation_fraction=0.2)
    assert 10 < one.split("validation").documents < 40
    assert one.split("validation").documents == other.split("validation").documents
    few = _opened(write(tmp_path / "c.jsonl", lines[:4]), corpus, validation_fraction=1e-9)
    assert few.split("validation").documents == 1


@pytest.mark.parametrize("layout", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_weights_make_the_mean_over_all_answers_of_the_global_batch(
    corpus: Path, tmp_path: Path, layout: tuple[int, int]
) -> None:
    """The mean of micro-batches' weighted sums is the mean of the tokens' losses, whatever the replicas and micro-batches."""
    dp, micro_batch = layout
    sources = open_sources(_config(write(tmp_path / "a.jsonl", examples()), corpus))
    order = sources.order(3)
    ranks = []
    for rank in range(dp):
        with BatchLoader(
            sources.datasets, order, global_batch=4, micro_batch=micro_batch, dp_rank=rank, dp_size=dp
        ) as loader:
            ranks.append([next(loader) for _ in range(2 * 4 // dp // micro_batch)])
    for step in range(2):
        count = 4 // dp // micro_batch
        batches = [batch for rank in ranks for batch in rank[step * count : (step + 1) * count]]
        weights = [batch.loss_weights for batch in batches if batch.loss_weights is not None]
        assert sum(float(weight.sum()) for weight in weights) / len(batches) == pytest.approx(1)
        assert len({round(float(weight.max()), 6) for weight in weights}) == 1  # every answer's token counts alike
    held = validation_batches(sources.datasets, samples=4, micro_batch=1)
    assert sum(float(item.loss_weights.sum()) for item in held if item.loss_weights is not None) / len(
        held
    ) == pytest.approx(1)


def test_pretraining_batches_have_no_weights(corpus: Path) -> None:
    sources = open_sources(DataConfig.model_validate({"sources": [{"path": corpus}], "sequence_length": 32}))
    with BatchLoader(sources.datasets, sources.order(0), global_batch=2, micro_batch=2) as loader:
        assert next(loader).loss_weights is None
    assert torch.is_tensor(validation_batches(sources.datasets, samples=2, micro_batch=2)[0].targets)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}', "line 1: no text in field 'answer'"),
        ('{"prompt": "a", "answer": ""}', "line 1: no text in field 'answer'"),
        ('{"prompt": 3, "answer": "b"}', "line 1: no text in field 'prompt'"),
        ("[1]", "line 1: no object of JSON"),
        ('{"question": "a", "reply": "b"}', r"set data.prompt_field to a field that has: question, reply"),
        ('{"prompt": "a\\ud800", "answer": "b"}', "line 1: half a surrogate pair"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ('{\0"\0p\0r\0o\0m\0p\0t\0"\0:\0', "a.jsonl: UTF-16LE, by"),
        ('\n{"prompt": "a", "answer": "b"}\n', "1 examples of at most 64 tokens"),
        (json.dumps({"prompt": "a " * 99, "answer": "b"}) + "\n", r"0 examples of at most 64 tokens \(1 are longer\)"),
    ],
)
def test_what_is_no_example_is_one_line(corpus: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(MegaloopError, match=message):
        _opened(tmp_path / "a.jsonl", corpus)


def test_a_missing_file_and_a_missing_tokenizer_are_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(MegaloopError, match="cannot be read"):
        _opened(tmp_path / "nothing.jsonl", corpus)
    with pytest.raises(MegaloopError, match="no such file; expected a sentencepiece model"):
        _opened(write(tmp_path / "a.jsonl", examples(5)), corpus, tokenizer=tmp_path / "t.model")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{sources: [{path: a}], format: sft}", "no tokenizer; begin with a checkpoint"),
        ("{sources: [{path: a}], prompt_field: q}", "data.prompt_field applies only to data.format sft"),
        ("{sources: [{path: a}], tokenizer: t}", "data.tokenizer applies only to data.format sft"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path: Path, data: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {data}\n", encoding="utf-8")
    with pytest.raises(MegaloopError, match=message):
        load_config(tmp_path / "c.yaml")
    assert isinstance(load_config(tmp_path / "c.yaml", ["data={sources: [{path: a}]}"]), Config)
