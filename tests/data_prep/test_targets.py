"""Documents that carry their targets: packed whole, read back as they were, and refused where they make no sense."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.ladders import write_word_tokenizer
from data_prep.prepare import prepare
from megaloop.config import DataConfig, SourceConfig
from megaloop.data import BatchLoader, DataSet, held_out_batch, held_out_places, open_sources
from megaloop.data.split import Split
from megaloop.errors import MegaloopError
from megaloop.tokenizer import load_tokenizer
from tests.cli.test_cli import megaloop
from tests.data.targeted import LENGTH, lines, write_targeted


@pytest.fixture(scope="module")
def targeted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_targeted(tmp_path_factory.mktemp("targeted"), corpus)


def _documents(split: Split) -> list[tuple[list[int], list[int], int]]:
    """(tokens, targets, difficulty) of every document of a split, padding left out."""
    found = []
    for index in range(len(split)):
        sample = split.sample(index)
        assert sample.targets is not None
        assert sample.difficulties is not None
        assert sample.loss_mask is not None
        assert split.loss_mask(index) == int((sample.targets >= 0).sum()) == int(sample.loss_mask.sum())
        ends = [*sample.starts[1:].tolist(), LENGTH]
        for start, stop, difficulty in zip(sample.starts.tolist(), ends, sample.difficulties.tolist(), strict=True):
            if difficulty >= 0:
                found.append((sample.tokens[start:stop].tolist(), sample.targets[start:stop].tolist(), difficulty))
            else:
                assert stop == LENGTH
                assert (sample.targets[start:] == -1).all()
    return found


def test_every_document_is_there_once_whole_and_with_its_targets(targeted: Path) -> None:
    dataset = DataSet.open(targeted)
    found = [document for name in ("train", "validation") for document in _documents(dataset.split(name))]
    given = [
        (line["tokens"], [-1 if target is None else target for target in line["targets"]], line["difficulty"])
        for line in lines()
    ]
    assert sorted(found) == sorted(given)
    entry = dataset.description.splits["train"]
    assert entry.documents == len(_documents(dataset.split("train")))
    assert dataset.split("train").targets == sum(sum(t >= 0 for t in d[1]) for d in _documents(dataset.split("train")))
    assert f"{dataset.split('train').targets:,} targets" in dataset.describe()
    assert dataset.description.format_version == 2


def test_words_are_looked_up_and_ids_taken(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    words = {number: word for word, number in tokenizer.vocabulary().items()}
    spelled = [
        {**line, "tokens": [words[t] for t in line["tokens"]], "targets": [words.get(t) for t in line["targets"]]}
        for line in lines(60)
    ]
    made = []
    for name, given in (("ids", lines(60)), ("words", spelled)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
        prepare(
            [tmp_path / f"{name}.jsonl"], tmp_path / name, tokenizer=corpus, sequence_length=LENGTH, targets=True,
            validation_fraction=0.3,
        )  # fmt: skip
        dataset = DataSet.open(tmp_path / name)
        made.append(sorted(_documents(dataset.split("train")) + _documents(dataset.split("validation"))))
    assert made[0] == made[1]


def test_marked_answers_are_the_targets_of_the_places_before_them(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    texts = [f"king and queen {n} [[the lord]] of heaven [[said {n}]]{'.' if n % 2 else ''}" for n in range(40)]
    file = tmp_path / "marked.jsonl"
    file.write_text("".join(json.dumps({"text": text, "difficulty": 4}) + "\n" for text in texts))
    prepare([file], tmp_path / "out", tokenizer=corpus, sequence_length=128, marks="[[ ]]", validation_fraction=0.3)
    split = DataSet.open(tmp_path / "out").split("train")
    seen = 0
    for index in range(len(split)):
        sample = split.sample(index)
        assert sample.targets is not None
        assert sample.difficulties is not None
        ends = [*sample.starts[1:].tolist(), 128]
        for start, stop, difficulty in zip(sample.starts.tolist(), ends, sample.difficulties.tolist(), strict=True):
            if difficulty < 0:
                continue
            seen += 1
            tokens, targets = sample.tokens[start:stop], sample.targets[start:stop]
            text = tokenizer.decode(tokens.tolist())
            number = text.split(" said ")[-1].rstrip(".")
            asked = [target for target in targets.tolist() if target >= 0]
            # the text that ends with an answer is also to end there
            expected = [*tokenizer.encode("the lord"), *tokenizer.encode(f"said {number}")]
            assert asked == expected + ([] if text.endswith(".") else [tokenizer.eos_id])
            assert tokens[0] == tokenizer.eos_id
            inside = np.flatnonzero(targets[:-1] >= 0)
            assert (tokens[inside + 1] == targets[inside]).all()
    assert seen == DataSet.open(tmp_path / "out").description.splits["train"].documents


def test_a_tokenizer_can_be_trained_on_marked_text_without_its_marks(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    texts = [" ".join(rng.choices(words, k=9)) + " <<" + " ".join(rng.choices(words, k=4)) + ">>" for _ in range(200)]
    file = tmp_path / "marked.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = megaloop(
        "prep", file, "--out", tmp_path / "out", "--vocab-size", "300", "--sequence-length", "64",
        "--validation-fraction", "0.2", "--answer-marks", "<< >>", "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    summary, dataset = json.loads(made.stdout), DataSet.open(tmp_path / "out")
    assert summary["targets"] == dataset.split("train").targets
    assert dataset.description.targets is not None
    assert summary["floors"] == {"-1": round(dataset.description.targets.floors[0].accuracy, 4)}
    assert not any(
        "<<" in word or ">" in word
        for word in load_tokenizer(tmp_path / "out").vocabulary()
        if len(word) > 4 and not word.startswith("<")
    )


def test_the_mean_is_over_all_targets_of_the_global_batch_whatever_the_ranks(targeted: Path, corpus: Path) -> None:
    """Also in a mixture with text, of which every token counts."""
    config = DataConfig(sources=(SourceConfig(path=targeted), SourceConfig(path=corpus)), sequence_length=LENGTH)
    sources = open_sources(config)
    order = sources.order(0)
    for dp_size, micro_batch in ((1, 8), (1, 2), (2, 2), (4, 1)):
        batches = []
        for rank in range(dp_size):
            with BatchLoader(
                sources.datasets,
                order,
                global_batch=8,
                micro_batch=micro_batch,
                dp_rank=rank,
                dp_size=dp_size,
                prefetch=0,
            ) as loader:
                batches += [next(loader) for _ in range(8 // dp_size // micro_batch)]
        weights = torch.cat([batch.loss_weights for batch in batches if batch.loss_weights is not None])
        assert len(weights) == 8
        assert float(weights.sum()) / len(batches) == pytest.approx(1, rel=1e-6)
        counted = weights[weights > 0]
        assert counted.unique().numel() == 1
        samples = [sources.datasets[source].split("train").sample(index) for source, index in map(order, range(8))]
        assert len(counted) == sum(
            LENGTH if sample.loss_mask is None else int(sample.loss_mask.sum()) for sample in samples
        )
        assert {sample.loss_mask is None for sample in samples} == {True, False}
        difficulties = torch.cat([batch.difficulties for batch in batches if batch.difficulties is not None])
        assert set(difficulties.unique().tolist()) <= {-1, 0, 1, 2}


def test_a_batch_says_of_each_place_how_hard_its_document_is(targeted: Path) -> None:
    dataset = DataSet.open(targeted)
    places = held_out_places([dataset], 6)
    batch = held_out_batch(places, range(6))
    assert batch.difficulties is not None
    for row, (split, index) in enumerate(places):
        sample = split.sample(index)
        assert sample.difficulties is not None
        for number, difficulty in enumerate(sample.difficulties.tolist()):
            assert set(batch.difficulties[row][batch.documents[row] == number].tolist()) == {difficulty}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tokens": [5, 6], "targets": [5]}, "tokens has 2 and targets has 1; expected two lists of one length"),
        ({"tokens": [5, 6]}, "tokens has 2 and targets is no list"),
        ({"tokens": [], "targets": []}, "tokens has 0"),
        ({"tokens": [5, None], "targets": [5, 6]}, "null among the tokens"),
        ({"tokens": [5, 6], "targets": [None, None]}, "no target"),
        ({"tokens": [5, 400], "targets": [None, 5]}, "400 among the tokens is neither a word of the tokenizer nor an id below 400"),
        ({"tokens": [5, 6], "targets": [None, -1]}, "-1 among the targets is neither"),
        ({"tokens": [5, True], "targets": [None, 5]}, "true among the tokens is neither"),
        ({"tokens": [5, 6], "targets": [None, "nonesuch\u001b"]}, r'"nonesuch\\u001b" among the targets is neither'),
        ({"tokens": [5, [6]], "targets": [None, 5]}, "among the tokens is neither"),
        ({"tokens": [5, 6], "targets": [None, 5], "difficulty": "hard"}, "difficulty hard; expected a whole number"),
        ({"tokens": [5, 6], "targets": [None, 5], "difficulty": 1 << 40}, "expected a whole number"),
        ({"tokens": [5, 6], "targets": [None, 5], "difficulty": -1}, "expected a whole number from 0 on"),
        ({"tokens": [5] * 33, "targets": [6] * 33}, "33 tokens; a sample has 32, so raise --sequence-length"),
        ([1], "no object of JSON"),
    ],
)  # fmt: skip
def test_a_line_that_makes_no_sense_is_named_and_may_be_skipped(
    corpus: Path, tmp_path: Path, line: Any, message: str
) -> None:
    file = tmp_path / "a.jsonl"
    given = lines(60)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in [*given[:2], line, *given[2:]]))
    options: dict[str, Any] = {
        "tokenizer": corpus,
        "sequence_length": LENGTH,
        "validation_fraction": 0.3,
        "targets": True,
    }
    with pytest.raises(MegaloopError, match=f"line 3: .*{message}"):
        prepare([file], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert prepare([file], tmp_path / "out", **options, errors="skip").skipped == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no answer", "no answer: expected text between"),
        ("a [[b", "does not end"),
        ("a [[]] b", "an answer that is empty"),
        ("a [[b [[c]]", "an answer that is empty or does not end"),
        ("a ]] b [[c]]", "does not end"),
        ("a [[b]] c ]]", "without"),
    ],
)
def test_marks_that_do_not_match_are_named(corpus: Path, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    with pytest.raises(MegaloopError, match=f"line 1: .*{message}"):
        prepare([file], tmp_path / "out", tokenizer=corpus, sequence_length=LENGTH, marks="[[ ]]")


def test_options_that_do_not_go_together_are_refused(corpus: Path, tmp_path: Path) -> None:
    text, file = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("some text")
    file.write_text(json.dumps(lines(1)[0]) + "\n")
    for given, options, message in (
        (text, {"tokenizer": corpus, "targets": True}, "--targets reads jsonl alone"),
        (file, {"vocab_size": 300, "targets": True}, "name it with --tokenizer"),
        (file, {"tokenizer": corpus, "targets": True, "marks": "[ ]"}, "give one of them"),
        (file, {"tokenizer": corpus, "marks": "[["}, "expected two different marks"),
        (file, {"tokenizer": corpus, "marks": "| |"}, "expected two different marks"),
    ):
        with pytest.raises(MegaloopError, match=message):
            prepare([given], tmp_path / "out", sequence_length=LENGTH, **options)


def test_samples_with_targets_are_read_whole(targeted: Path) -> None:
    with pytest.raises(
        MegaloopError, match="have 32 tokens and targets of their own, which rest on all that comes before"
    ):
        DataSet.open(targeted, 16)


def test_what_was_altered_is_refused(targeted: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(targeted, tmp_path / "copy"))
    counts = copy / "train" / "targets.u32"
    whole = counts.read_bytes()
    for content in (b"", whole[:-4], b"\1" + whole[1:]):
        counts.write_bytes(content)
        with pytest.raises(MegaloopError, match=r"targets\.u32: altered"):
            DataSet.open(copy).split("train")
    counts.unlink()
    with pytest.raises(MegaloopError, match=r"targets\.u32: cannot be read"):
        DataSet.open(copy).split("train")
    counts.write_bytes(whole)
    description = json.loads((copy / "data.json").read_text())
    changes: tuple[dict[str, Any], ...] = (
        {"format_version": 1},
        {"targets": None},
        {"targets": {"counts": {}, "floors": [{}]}},
    )
    for change in changes:
        (copy / "data.json").write_text(json.dumps(description | change))
        with pytest.raises(MegaloopError, match=r"data\.json is damaged"):
            DataSet.open(copy)


@pytest.mark.parametrize(
    "column",
    [
        {"targets": np.full(LENGTH, 400, "<i4").tobytes()},
        {"targets": np.full(LENGTH, -2, "<i4").tobytes()},
        {"targets": b"\0" * 4},
        {"targets": np.full(LENGTH, -1, "<i4").tobytes()},  # fewer than are counted
        {"difficulties": b""},
        {"difficulties": np.full(40, 1, "<i4").tobytes()},
        {"starts": np.array([3], "<i4").tobytes(), "difficulties": np.array([1], "<i4").tobytes()},
    ],
)
def test_a_sample_that_is_none_is_noticed_when_it_is_read(targeted: Path, column: dict[str, bytes]) -> None:
    """Written to after the shard was hashed: what the reader gives is looked at."""
    split = DataSet.open(targeted).split("train")
    split.verify()
    reader = split._readers[0]
    record = dict(reader[0]) | column
    split._readers[0] = [record]
    with pytest.raises(MegaloopError, match="shard was altered after it was checked"):
        split.sample(0)


def test_a_line_with_a_word_that_the_tokenizer_does_not_have_is_named_and_may_be_skipped(tmp_path: Path) -> None:
    tokenizer, file = write_word_tokenizer(tmp_path / "tokenizer"), tmp_path / "lines.jsonl"
    texts = ["1 + two = [[3]]", *(f"{n} + 1 = [[{n + 1}]]" for n in range(40))]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    options: Any = {"tokenizer": tokenizer, "sequence_length": 8, "marks": "[[ ]]", "validation_fraction": 0.2}
    with pytest.raises(MegaloopError, match=r"lines.jsonl, line 1: .*cannot encode a text"):
        prepare([file], tmp_path / "data", **options)
    assert prepare([file], tmp_path / "data", errors="skip", **options).skipped == 1
