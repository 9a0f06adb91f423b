"""Tasks by difficulty: right by definitions of their own, without shortcuts, the same for a seed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.ladders import (
    NONE,
    TASKS,
    WORDS,
    Addition,
    Chains,
    Draws,
    Ladder,
    PHop,
    blocks,
    parse_difficulties,
    write_ladder,
    write_word_tokenizer,
)
from megaloop.cli.data import Task
from megaloop.data.induction import p_hop
from megaloop.errors import MegaloopError
from megaloop.tokenizer import load_tokenizer
from tests.cli.test_cli import megaloop

ASKED: dict[str, list[int]] = {"p-hop": [1, 2, 5, 8, 12], "addition": [2, 3, 10, 11, 32], "chains": list(range(9))}


def written(folder: Path, task: str, count: int, **options: Any) -> list[dict[str, Any]]:
    """The lines of a file of a task."""
    options = {"difficulties": ASKED[task], **options}
    write_ladder(folder / "a.jsonl", task, count=count, **options)
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def answers(line: dict[str, Any]) -> list[str]:
    return [target for target in line["targets"] if target is not None]


# --- the answers


@pytest.mark.parametrize(
    "options",
    [{}, {"doubles": "none"}, {"alphabet": 4, "length": 96, "difficulties": [1, 16]}, {"alphabet": 26}],
    ids=str,
)
def test_every_target_of_p_hop_is_what_walking_the_text_gives(tmp_path: Path, options: dict[str, Any]) -> None:
    if options.get("alphabet") == 26:
        options = {**options, "difficulties": [1, 2]}
    for line in written(tmp_path, "p-hop", 40, **options):
        hops, letters = int(line["tokens"][0]), line["tokens"][1:]
        assert (line["difficulty"], len(letters) + 1) == (hops, options.get("length", 64))
        assert line["targets"][0] is None
        for place, target in enumerate(line["targets"][1:]):
            assert target == _walk(letters[: place + 1], hops) == p_hop(letters[: place + 1], hops)
        assert line["targets"][-1] is not None
        if options.get("doubles") == "none":
            assert all(one != other for one, other in pairwise(letters))


def _walk(letters: list[str], hops: int) -> str | None:
    """Backwards, a letter at a time."""
    here = len(letters) - 1
    for _ in range(hops):
        back = here - 1
        while back >= 0 and letters[back] != letters[here]:
            back -= 1
        if back < 0:
            return None
        here = back + 1
    return letters[here]


@pytest.mark.parametrize("digits", [1, 2, 4])
def test_every_target_of_addition_is_a_digit_of_the_sum(tmp_path: Path, digits: int) -> None:
    for line in written(tmp_path, "addition", 60, digits=digits):
        tokens = line["tokens"]
        equals = tokens.index("=")
        terms = "".join(tokens[1:equals]).split("+")
        assert len(terms) == line["difficulty"] == int(tokens[0])
        assert {len(term) for term in terms} == {digits}
        assert int("".join(reversed(tokens[equals + 1 :]))) == sum(map(int, terms))
        assert len(tokens) - equals - 1 == len(str(len(terms) * (10**digits - 1)))
        wanted = [None] * equals + tokens[equals + 1 : equals + 1 + digits]
        assert line["targets"] == wanted + [None] * (len(tokens) - len(wanted))


def test_every_target_of_chains_is_what_the_variable_resolves_to(tmp_path: Path) -> None:
    for line in written(tmp_path, "chains", 90):
        tokens, depth = line["tokens"], line["difficulty"]
        said, *asked = " ".join(tokens[1:]).split(" ? ")
        scope: dict[str, str] = dict(part.split() for part in said.removesuffix(" ;").split(" ; "))
        assert (len(scope), int(tokens[0]), len(asked)) == (5 * (depth + 1), depth, 5)
        for name, target in zip(asked, answers(line), strict=True):
            steps = 0
            while name in scope:
                name, steps = scope[name], steps + 1
            assert (name, steps) == (target, depth + 1)
        assert sorted(answers(line)) == sorted(value for value in scope.values() if value not in scope)
        for place, target in enumerate(line["targets"]):  # and it is p-hop induction
            assert target == (p_hop(tokens[: place + 1], depth + 1) if tokens[place - 1] == "?" else None)


# --- no shortcuts


def test_each_difficulty_has_the_same_number_of_lines_in_mixed_order(tmp_path: Path) -> None:
    for task, asked in ASKED.items():
        given = [line["difficulty"] for line in written(tmp_path, task, 100 * len(asked), seed=5)]
        assert Counter(given) == dict.fromkeys(asked, 100)
        turns = [tuple(given[first : first + len(asked)]) for first in range(0, len(given), len(asked))]
        assert all(sorted(turn) == asked for turn in turns)
        assert len(set(turns)) > 50


@pytest.mark.parametrize(
    ("ladder", "count"),
    [(PHop(), 6), (PHop(doubles="none"), 6), (Addition(), 10), (Addition(3), 10), (Chains(), 26)],
    ids=str,
)
def test_at_every_difficulty_the_possible_answers_are_the_same_and_equally_frequent(ladder: Ladder, count: int) -> None:
    for difficulty in ASKED[ladder.name]:
        targets = ladder.draw(Draws(f"answers {difficulty}"), difficulty, 1000).targets
        asks = np.nonzero((targets != NONE).any(axis=0))[0]
        # of p-hop the last place, as neighbouring ones are of one chain; of the others each place
        for place in asks[-1:] if ladder.name == "p-hop" else asks:
            seen = np.unique(targets[:, place], return_counts=True)[1]
            assert len(seen) == count
            expected = 1000 / count
            # chi-square: its mean is count - 1; this is over five standard deviations above
            assert ((seen - expected) ** 2 / expected).sum() < count - 1 + 6 * (2 * (count - 1)) ** 0.5


def test_of_the_letters_seen_in_chains_each_place_is_the_answer_equally_often() -> None:
    """So a guesser who takes the first root, or the one whose name came first again, is right one time in five."""
    for depth in ASKED["chains"]:
        samples = Chains().draw(Draws(f"roots {depth}"), depth, 1000)
        roots = samples.tokens[:, 2 : 2 + 3 * 5 : 3]
        asked = samples.targets[samples.targets != NONE].reshape(1000, 5)
        table = (asked[:, :, None] == roots[:, None, :]).sum(axis=0)
        assert (table.sum(axis=0) == 1000).all()
        assert (abs(table - 200) < 5 * (1000 * 0.2 * 0.8) ** 0.5).all()
        final = np.stack([samples.tokens[:, 1 + 3 * (5 * depth + place)] for place in range(5)], axis=1)
        order = samples.tokens[:, -9::2]  # names in the order in which they are asked
        table = (order[:, :, None] == final[:, None, :]).sum(axis=0)
        assert (abs(table - 200) < 5 * (1000 * 0.2 * 0.8) ** 0.5).all()


def test_a_digit_of_the_sum_says_nothing_of_the_next() -> None:
    for terms in (2, 7, 32):
        targets = Addition().draw(Draws("pairs"), terms, 5000).targets
        first, second = targets[targets != NONE].reshape(5000, 2).T
        seen = np.bincount(10 * first + second, minlength=100)
        assert ((seen - 50) ** 2 / 50).sum() < 99 + 6 * 198**0.5


def test_only_a_doubled_letter_stays_where_it_is() -> None:
    samples = PHop().draw(Draws("doubles"), 8, 500)
    letters, targets = samples.tokens[:, 1:], samples.targets[:, 1:]
    doubled = np.concatenate([np.zeros((500, 1), dtype=bool), letters[:, 1:] == letters[:, :-1]], axis=1)
    assert (targets[doubled] == letters[doubled]).all()
    others = (targets != NONE) & ~doubled
    assert 0.12 < (targets == letters)[others].mean() < 0.22
    unasked = PHop(doubles="text").draw(Draws("doubles"), 8, 500)
    letters = unasked.tokens[:, 1:]
    doubled = letters[:, 1:] == letters[:, :-1]
    assert doubled.mean() > 0.1
    assert (unasked.targets[:, 2:][doubled] == NONE).all()
    assert (unasked.targets[:, -1] != NONE).all()
    assert 0.12 < (unasked.targets == unasked.tokens)[unasked.targets != NONE].mean() < 0.22
    free = PHop(doubles="none").draw(Draws("doubles"), 8, 500)
    asks = free.targets != NONE
    assert 0.12 < (free.targets == free.tokens)[asks].mean() < 0.22


# --- a seed


@pytest.mark.parametrize("task", TASKS)
def test_a_line_depends_on_task_options_difficulties_and_seed_but_not_on_the_number_of_lines(
    task: str, tmp_path: Path
) -> None:
    few = written(tmp_path, task, 30, seed=3)
    assert few == written(tmp_path, task, 1200, seed=3)[:30]
    assert few == written(tmp_path, task, 30, seed=3, difficulties=ASKED[task][::-1])
    other = {json.dumps(line) for line in written(tmp_path, task, 30, seed=4)}
    other |= {json.dumps(line) for line in written(tmp_path, task, 30, seed=3, difficulties=ASKED[task][:-1])}
    assert not {json.dumps(line) for line in few if line["difficulty"] > 2} & other
    assert len({json.dumps(line) for line in written(tmp_path, task, 1200, seed=3)}) > 1190


def test_files_of_a_seed_are_those_of_every_machine_and_version(tmp_path: Path) -> None:
    """Should these change, then on purpose: raise the number in the task's key, and say so in the changelog."""
    digests = {}
    for task, asked in ASKED.items():
        write_ladder(tmp_path / task, task, difficulties=asked, count=50, seed=1)
        digests[task] = hashlib.sha256((tmp_path / task).read_bytes()).hexdigest()[:16]
    assert digests == {"p-hop": "bc8f65312d366574", "addition": "7b33ac0d6caa993e", "chains": "825c374a6c691363"}


def test_samples_without_an_answer_at_the_end_are_drawn_again_and_counted(tmp_path: Path) -> None:
    result = write_ladder(tmp_path / "a.jsonl", "p-hop", difficulties=[12], count=2000)
    # a sixth end in a doubled letter; of the others, where 12 of 61 letters before are the one looked for
    assert 1.2 < result.redrawn / result.documents < 1.5
    lines = (tmp_path / "a.jsonl").read_bytes()
    assert (result.documents, result.longest, result.bytes) == (2000, 64, len(lines))
    assert result.targets == sum(len(answers(json.loads(line))) for line in lines.splitlines())
    [block] = blocks(PHop(), [12], 7, 0)
    assert block.difficulties.tolist() == [12] * 7
    assert block.places.tolist() == list(range(7))


# --- words


def test_one_tokenizer_has_every_word_and_loses_nothing(tmp_path: Path) -> None:
    for task in TASKS:
        lines = written(tmp_path, task, 200)
        tokenizer = load_tokenizer(tmp_path / "tokenizer")
        for line in lines:
            text = " ".join(line["tokens"])
            assert [WORDS[token] for token in tokenizer.encode(text)] == line["tokens"]
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert len(line["targets"]) == len(line["tokens"])
            assert {*answers(line)} <= {*WORDS}
    assert tokenizer.encode(" ".join(WORDS)) == list(range(95))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (96, 95, -1)
    assert tokenizer.encode_prompt("3 a </s>") == [3, 64, 95]
    for text in ("qwertz", "</s>"):  # neither a word that is none nor one that would end a document
        with pytest.raises(MegaloopError, match="cannot encode a text"):
            tokenizer.encode(text)


def test_a_tokenizer_that_is_there_is_kept_and_another_is_not_replaced(tmp_path: Path) -> None:
    path = write_word_tokenizer(tmp_path / "words")
    before = path.stat()
    assert write_word_tokenizer(tmp_path / "words") == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    path.write_text("{}")
    write_ladder(tmp_path / "a.jsonl", "chains", difficulties=[1], count=1)
    with pytest.raises(MegaloopError, match="belongs to another tokenizer"):
        write_ladder(tmp_path / "a.jsonl", "chains", difficulties=[2], count=1, tokenizer=path)
    assert path.read_text() == "{}"
    assert json.loads((tmp_path / "a.jsonl").read_text())["difficulty"] == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl", "tokenizer", "words"]


# --- the command


def test_the_command_line_writes_samples(tmp_path: Path) -> None:
    assert list(Task) == list(TASKS)
    made = megaloop(
        "synthesize", "--task", "p-hop", "--difficulty", "1-3,5", "--documents", "8", "--alphabet", "4", "--length", "32",
        "--doubles", "none", "--seed", "2", "--out", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "words", "--json",
    )  # fmt: skip
    assert json.loads(made.stdout)["tokenizer"] == str(tmp_path / "words/tokenizer.json")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert json.loads(made.stdout)["documents"] == len(lines) == 8
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl", "words"]
    options: dict[str, Any] = {"difficulties": [1, 2, 3, 5], "alphabet": 4, "length": 32, "doubles": "none", "seed": 2}
    assert lines == written(tmp_path, "p-hop", 8, **options)


def test_difficulties_are_numbers_and_ranges() -> None:
    assert parse_difficulties("1-8") == list(range(1, 9))
    assert parse_difficulties("1, 2,4-5,12") == [1, 2, 4, 5, 12]
    for text in ("", "1-", "-1", "8-1", "1,,2", "²", "1-9999999999", "1" * 5000, "a\x1b"):
        with pytest.raises(MegaloopError, match="is no difficulty; give numbers and ranges") as error:
            parse_difficulties(text)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task p-hop", "--task p-hop needs --difficulty"),
        ("--difficulty 1-8", "--difficulty belongs to a task; name one with --task"),
        ("--doubles none", "--doubles belongs to a task"),
        ("--task chains --difficulty 1 --kinds words", "--kinds belongs to text"),
        ("--task chains --difficulty 1 --pairs", "--pairs belongs to text"),
        ("--task chains --difficulty 1 --digits 2", "--digits belongs to --task addition, and this is chains"),
        ("--task chains --difficulty 1 --tokenizer /dev/null", "cannot write the tokenizer to /dev/null"),
    ],
)
def test_options_that_do_not_belong_together_are_refused_in_one_line(words: str, message: str, tmp_path: Path) -> None:
    result = megaloop("synthesize", "--out", tmp_path / "a.jsonl", "--documents", "10", *words.split())
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "difficulties", "options", "message"),
    [
        ("hops", [1], {}, "unknown task hops; choose from p-hop, addition, chains"),
        ("p-hop", [], {}, "no difficulty; give 1 to 32"),
        ("chains", range(10), {}, "chains has no difficulty 9; use 0 to 8"),
        ("addition", [1], {}, "addition has no difficulty 1; use 2 to 32"),
        ("addition", [2], {"doubles": "none"}, "--doubles belongs to --task p-hop, and this is addition"),
        ("addition", [2], {"digits": 10}, "--digits 10 is not possible; use 1 to 9 digits"),
        ("p-hop", [1, 1], {}, "a difficulty stands twice"),
        ("p-hop", range(1, 17), {}, "has 16 hops that each lead further back; use --length 72 or more"),
        ("p-hop", [1], {"alphabet": 1}, "--alphabet 1 is not possible; use 2 to 26 letters"),
        ("p-hop", [1], {"alphabet": 2, "doubles": "none"}, "--alphabet 2 is not possible; use 3 to 26 letters"),
        ("p-hop", [1], {"length": 5000}, "--length 5000 is not possible; use 4 to 4096 tokens"),
    ],
)
def test_what_cannot_be_is_refused(
    task: str, difficulties: Sequence[int], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MegaloopError, match=message) as error:
        write_ladder(tmp_path / "a.jsonl", task, difficulties=difficulties, count=1, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_length_that_is_named_is_enough_and_no_longer_than_needed() -> None:
    for ladder, difficulty in ((PHop(), 15), (PHop(4, 20), 32), (PHop(6, 64, doubles="none"), 32)):
        with pytest.raises(MegaloopError, match="use --length") as error:
            ladder.check(difficulty)
        needed = int(str(error.value).split("use --length ")[1].split()[0])
        longer = replace(ladder, length=needed)
        longer.check(difficulty)
        redrawn = longer.draw(Draws("length"), difficulty, 500).redrawn
        stays = 1 / longer.alphabet if longer.doubles == "learn" else 0.0
        share = stays + (1 - stays) * 0.1  # of draws that end in an answer, at least, and nearly at most
        assert 0.8 * share < 500 / (500 + redrawn.sum()) < 1.4 * share


def test_a_file_where_the_tokenizer_goes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MegaloopError, match="is where the tokenizer goes"):
        write_ladder(tmp_path / "tokenizer.json", "chains", difficulties=[1], count=1, tokenizer=tmp_path)


def test_the_lines_that_the_page_shows_are_what_its_commands_write(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/DATA.md").read_text(encoding="utf-8")
    shown = [json.loads(line) for line in page.splitlines() if line.startswith('    {"tokens"')]
    made = [
        *written(tmp_path, "p-hop", 6, difficulties=[1, 2, 3], alphabet=4, length=18, doubles="none"),
        *written(tmp_path, "addition", 6, difficulties=[2, 3, 4]),
        *written(tmp_path, "chains", 6, difficulties=[0, 1, 2]),
    ]
    assert len(shown) == 3
    assert all(line in made for line in shown)
