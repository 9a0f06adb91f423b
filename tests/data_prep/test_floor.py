"""The floor: what guessing scores that knows the statistics of the data."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.floor import FloorSample, floors
from data_prep.ladders import Draws, PHop
from data_prep.prepare import prepare
from megaloop.data.targeted import Example
from megaloop.errors import MegaloopError
from tests.data.targeted import LENGTH, lines


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


def test_a_floor_does_not_rest_on_the_few_documents_that_are_held_out() -> None:
    """Of ten digits, each as likely: on eight documents the best of four guessers scores anything from 0 to 60%."""
    for seed in range(5):
        rng, sample = np.random.default_rng(seed), FloorSample()
        for number in range(2400):
            targets = np.array([-1] * 6 + [*rng.integers(0, 10, 2)])
            sample.add(Example(rng.integers(0, 10, 8), targets, 0), held_out=number % 300 == 0)
        (entry,) = sample.floors()
        assert entry.documents == 500
        assert entry.accuracy == pytest.approx(0.1, abs=0.026)
        assert entry.last == pytest.approx(0.1, abs=0.052)


def test_documents_kept_for_the_floor_take_eight_bytes_a_token() -> None:
    """Of many difficulties with long documents there are tens of millions of tokens."""
    sample = FloorSample()
    for number in range(8):
        sample.add(Example(np.arange(6) + number, np.arange(6), difficulty=1), held_out=number % 2 == 0)
    kept = [example for side in sample._kept.values() for drawn in side.values() for example in drawn.documents]
    assert len(kept) == 8
    assert {example.tokens.nbytes + example.targets.nbytes for example in kept} == {8 * 6}
    assert [entry.accuracy for entry in sample.floors()] == [1.0]
