"""Documents that carry their targets: packed whole, read back as they were, and refused where they make no sense."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.floor import Example, FloorSample, floors
from data_prep.ladders import Draws, PHop, write_word_tokenizer
from data_prep.prepare import prepare
from megaloop.config import DataConfig, SourceConfig
from megaloop.data import BatchLoader, DataSet, held_out_batch, held_out_places, open_sources
from megaloop.data.dataset import Split
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


# --- the floor


def _copying(rng: np.random.Generator, count: int, places: list[float]) -> list[Example]:
    """Each last token's target is the token at a place drawn with these probabilities."""
    made = []
    for _ in range(count):
        tokens = rng.integers(0, 6, len(places))
        targets = np.full(len(places), -1)
        targets[-1] = tokens[rng.choice(len(places), p=places)]
        made.append(Example(tokens, targets, 0))
    return made


def test_the_floor_is_that_of_the_best_guesser_of_places() -> None:
    """Against the posterior of the true probabilities, which no guesser of places can beat."""
    rng = np.random.default_rng(0)
    places = [0.4, 0.3, 0.1, 0.1, 0.05, 0.05]
    training, held_out = _copying(rng, 4000, places), _copying(rng, 2000, places)
    (entry,) = floors({0: training}, {0: held_out})
    right = 0
    for example in held_out:
        votes = np.zeros(6)
        np.add.at(votes, example.tokens, places)
        right += int(votes.argmax() == example.targets[-1])
    assert entry.guesser == "vote"
    assert entry.accuracy == entry.last == pytest.approx(right / 2000, abs=0.01)
    assert entry.accuracy > 0.4 + 0.6 / 6 - 0.05  # what the likeliest place alone gives


def test_the_floor_of_skewed_answers_is_their_majority() -> None:
    rng = np.random.default_rng(0)

    def skewed(count: int) -> list[Example]:
        return [
            Example(
                rng.integers(0, 6, 4), np.array([-1, rng.choice(6, p=[0.7, 0.1, 0.05, 0.05, 0.05, 0.05]), -1, 3]), 7
            )
            for _ in range(count)
        ]

    (entry,) = floors({7: skewed(2000)}, {7: skewed(1000), 8: skewed(3)})
    assert (entry.difficulty, entry.guesser) == (7, "majority")
    assert entry.accuracy == pytest.approx((0.7 + 1) / 2, abs=0.02)
    assert entry.last == 1


def test_the_floor_of_answers_that_follow_a_token_is_known() -> None:
    rng = np.random.default_rng(0)

    def following(count: int) -> list[Example]:
        return [Example(tokens, (tokens + 1) % 6, 0) for tokens in rng.integers(0, 6, (count, 8))]

    (entry,) = floors({0: following(200)}, {0: following(100)})
    assert (entry.accuracy, entry.guesser) == (1, "majority after the token")


def test_random_answers_have_the_floor_of_one_in_their_number() -> None:
    rng = np.random.default_rng(0)

    def noise(count: int) -> list[Example]:
        return [Example(rng.integers(0, 6, 12), rng.integers(0, 6, 12), 0) for _ in range(count)]

    (entry,) = floors({0: noise(3000)}, {0: noise(2000)})
    assert entry.accuracy == pytest.approx(1 / 6, abs=0.01)


def test_the_floor_of_hops_is_that_of_a_guesser_who_knows_where_they_end() -> None:
    """The true shares of the places where hops end, from walking; the floor finds them from tokens and targets alone."""
    ladder, length = PHop(length=32, doubles="none"), 32

    def walked(name: str, count: int) -> tuple[list[Example], np.ndarray[Any, Any]]:
        samples = ladder.draw(Draws(name), 4, count)
        ends = np.full((count, length), -1)
        for row, letters in enumerate(samples.tokens[:, 1:].tolist()):
            for place in range(len(letters)):
                at: int | None = place
                for _ in range(4):
                    before = None if at is None else [j for j in range(at) if letters[j] == letters[at]]
                    at = before[-1] + 1 if before else None
                ends[row, place + 1] = -1 if at is None else at + 1
        assert ((ends >= 0) == (samples.targets >= 0)).all()
        return [Example(a, b, 4) for a, b in zip(samples.tokens, samples.targets, strict=True)], ends

    training, ends = walked("training", 3000)
    held_out, _ = walked("held out", 1000)
    right = asked = 0
    for place in range(length):
        shares = np.bincount(ends[ends[:, place] >= 0, place], minlength=length)
        for example in held_out:
            if example.targets[place] >= 0:
                votes = np.bincount(example.tokens, weights=shares)
                right, asked = right + int(votes.argmax() == example.targets[place]), asked + 1
    (entry,) = floors({4: training}, {4: held_out})
    assert entry.accuracy == pytest.approx(right / asked, abs=0.02)
    assert 0.2 < entry.accuracy < 0.35


def test_floors_of_long_documents_and_many_words_take_little_time_and_memory() -> None:
    rng = np.random.default_rng(0)

    def long(count: int) -> list[Example]:
        return [
            Example(tokens, np.where(np.arange(1500) % 3 == 0, tokens[0], -1), 1)
            for tokens in rng.integers(0, 49_000, (count, 1500))
        ]

    tracemalloc.start()
    (entry,) = floors({1: long(60)}, {1: long(30)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (entry.accuracy, entry.guesser) == (1, "vote")
    assert peak < 200e6


def test_more_difficulties_than_levels_are_refused(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line | {"difficulty": n}) + "\n" for n, line in enumerate(lines(600))))
    with pytest.raises(MegaloopError, match="more than 256 difficulties"):
        prepare([file], tmp_path / "out", tokenizer=corpus, sequence_length=LENGTH, targets=True)


def test_the_floor_knows_what_the_answer_is_not() -> None:
    """Never the token just read: one of five, where the other guessers see one of six."""
    rng = np.random.default_rng(0)

    def another(count: int) -> list[Example]:
        return [Example(tokens, (tokens + rng.integers(1, 6, 8)) % 6, 0) for tokens in rng.integers(0, 6, (count, 8))]

    (entry,) = floors({0: another(4000)}, {0: another(4000)})
    assert entry.accuracy == pytest.approx(1 / 5, abs=0.01)


def test_documents_for_the_floor_come_from_the_whole_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file whose first half has random answers and whose second always the same: half and half."""
    monkeypatch.setattr("data_prep.floor._TRAINING", 200)
    monkeypatch.setattr("data_prep.floor._HELD_OUT", 200)
    rng, sample = np.random.default_rng(0), FloorSample()
    for number in range(8000):
        answer = rng.integers(0, 6) if number < 4000 else 3
        sample.add(Example(rng.integers(0, 6, 8), np.array([-1] * 7 + [answer]), 0), held_out=number % 4 == 0)
    (entry,) = sample.floors()
    assert entry.documents == 200
    assert entry.accuracy == pytest.approx((1 + 1 / 6) / 2, abs=0.1)


def test_documents_kept_for_the_floor_take_eight_bytes_a_token() -> None:
    """Of many difficulties with long documents there are tens of millions of tokens."""
    sample = FloorSample()
    for number in range(8):
        sample.add(Example(np.arange(6) + number, np.arange(6), difficulty=1), held_out=number % 2 == 0)
    kept = [example for side in sample._kept.values() for drawn in side.values() for example in drawn.documents]
    assert len(kept) == 8
    assert {example.tokens.nbytes + example.targets.nbytes for example in kept} == {8 * 6}
    assert [entry.accuracy for entry in sample.floors()] == [1.0]


def test_a_line_with_a_word_that_the_tokenizer_does_not_have_is_named_and_may_be_skipped(tmp_path: Path) -> None:
    tokenizer, file = write_word_tokenizer(tmp_path / "tokenizer"), tmp_path / "lines.jsonl"
    texts = ["1 + two = [[3]]", *(f"{n} + 1 = [[{n + 1}]]" for n in range(40))]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    options: Any = {"tokenizer": tokenizer, "sequence_length": 8, "marks": "[[ ]]", "validation_fraction": 0.2}
    with pytest.raises(MegaloopError, match=r"lines.jsonl, line 1: .*cannot encode a text"):
        prepare([file], tmp_path / "data", **options)
    assert prepare([file], tmp_path / "data", errors="skip", **options).skipped == 1
