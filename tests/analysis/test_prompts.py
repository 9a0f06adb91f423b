"""Prompts are read from files and data sets as they are, and what a model sees of one does not depend on its neighbours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.ladders import write_word_tokenizer
from megaloop.analysis.contributions import contributions
from megaloop.analysis.lens import lens
from megaloop.analysis.prompts import Prompts, held_out_prompts, read_prompts
from megaloop.analysis.trace import trace
from megaloop.data import DataSet
from megaloop.errors import MegaloopError
from megaloop.tokenizer import Tokenizer, load_tokenizer
from tests.analysis.models import CPU, decoder, random_prompts
from tests.data.targeted import LENGTH, write_targeted


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_word_tokenizer(tmp_path_factory.mktemp("words")))


def _write(path: Path, *lines: Any) -> Path:
    texts = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def test_batches_hold_every_prompt_once_with_its_number() -> None:
    prompts = random_prompts((13, 30, 21, 5, 30, 7))
    groups = prompts.together(60)
    assert groups == [[3, 5, 0], [2, 1], [4]]
    for batch in (prompts.batch(numbers, CPU) for numbers in groups):
        assert batch.tokens_BS.numel() <= 60
        assert batch.documents_BS is None
        assert batch.lengths == [len(prompts.prompts[number]) for number in batch.numbers]
        for row, number in enumerate(batch.numbers):
            prompt, inside = prompts.prompts[number], batch.valid_BS[row]
            assert batch.tokens_BS[row, inside].tolist() == prompt.tokens.tolist()
            assert batch.targets_BS[row, inside].tolist() == prompt.targets.tolist()
            assert (batch.targets_BS[row, ~inside] == -1).all()
    # a prompt that is longer than a batch may be has one of its own
    assert prompts.together(1) == [[3], [5], [0], [2], [1], [4]]


@pytest.mark.parametrize("several_documents", [False, True])
def test_filling_up_changes_no_result(several_documents: bool) -> None:
    model, prompts = decoder("1-2x2-1"), random_prompts((13, 30, 21))
    if several_documents:
        parts = [
            type(one)(one.tokens, one.targets, (np.arange(len(one)) // 6).astype(np.int32)) for one in prompts.prompts
        ]
        prompts = Prompts("parts", [parts[0], prompts.prompts[1], parts[2]])
    together = prompts.batch([0, 1, 2], CPU)
    assert (together.documents_BS is not None) == several_documents
    traced = trace(model, together.tokens_BS, together.documents_BS)
    found = contributions(traced, together), lens(model, traced, together).tokens_BLK
    for number in range(3):
        alone = prompts.batch([number], CPU)
        traced = trace(model, alone.tokens_BS, alone.documents_BS)
        expected = contributions(traced, alone)[0], lens(model, traced, alone).tokens_BLK[0]
        for one, other in zip((part[number] for part in found), expected, strict=True):
            # sums over tokens, of norms up to 20; 1.2e-5 measured
            assert float((one - other).abs().max()) < 2.4e-5


def test_lines_of_text_and_lines_of_tokens(words: Tokenizer, tmp_path: Path) -> None:
    file = _write(
        tmp_path / "prompts.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"text": "1 + 2", "difficulty": 4}).encode(),
        b"   ",
        {"tokens": ["a", "b", 3], "targets": [None, "a", 7], "difficulty": 2},
        {"tokens": [1, 2], "targets": [None, 1]},
        {"text": "a b"},
        {"text": "b"},
    )
    prompts = read_prompts(file, words, 4)
    ids = words.vocabulary()
    assert len(prompts) == 4
    assert prompts.source == str(file)
    first, second, third, fourth = prompts.prompts
    assert first.tokens.tolist() == [ids[word] for word in ["1", "+", "2"]]
    assert first.targets.tolist() == [ids["+"], ids["2"], -1]
    assert second.tokens.tolist() == [ids["a"], ids["b"], 3]
    assert second.targets.tolist() == [-1, ids["a"], 7]
    assert third.targets.tolist() == [-1, 1]
    assert fourth.tokens.tolist() == [ids["a"], ids["b"]]
    assert [prompt.difficulty for prompt in prompts.prompts] == [4, 2, -1, -1]
    assert prompts.difficulties == [2, 4]
    _write(tmp_path / "other.jsonl", {"question": "1 + 2", "text": 3})
    assert (
        read_prompts(tmp_path / "other.jsonl", words, 9, "question").prompts[0].tokens.tolist() == first.tokens.tolist()
    )


def test_the_checksum_is_of_all_that_a_model_reads_and_is_to_predict() -> None:
    first = random_prompts().prompts[0]
    other, changed = first.targets.copy(), first.tokens.copy()
    other[3], changed[0] = 50, 51
    kind = type(first)
    variants = [
        first, kind(first.tokens, other), kind(changed, first.targets), kind(first.tokens, first.targets, difficulty=1),
        kind(first.tokens, first.targets, np.zeros(len(first), np.int32)), kind(first.tokens[:-1], first.targets[:-1]),
    ]  # fmt: skip
    sums = [Prompts("one", [variant]).sha256 for variant in variants]
    assert len(set(sums)) == len(variants)
    assert Prompts("another place", [first]).sha256 == sums[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3: not JSON"),
        (b"[1]", "line 3: no object of JSON"),
        (b'{"text": "\xff"}', "line 3: byte 0xff is not UTF-8"),
        ({"txt": "1"}, "line 3: no text in field 'text' .set --field to a field that has: txt"),
        ({"text": 7}, "line 3: no text in field 'text' .no field has any"),
        ({"text": "  "}, "line 3: a text without tokens"),
        ({"tokens": [1], "targets": []}, "line 3: tokens has 1 and targets has 0; expected two lists"),
        ({"tokens": [1, 2], "targets": [None, None]}, "line 3: no target"),
        ({"tokens": [1, 999], "targets": [None, 1]}, "line 3: 999 among the tokens"),
        ({"tokens": [1], "targets": [1], "difficulty": -1}, "line 3: difficulty -1; expected a whole number"),
    ],
)
def test_a_bad_line_is_one_clear_error(words: Tokenizer, tmp_path: Path, line: Any, message: str) -> None:
    file = _write(tmp_path / "prompts.jsonl", {"text": "1"}, {"text": "2"}, line)
    with pytest.raises(MegaloopError, match=message) as caught:
        read_prompts(file, words, 10)
    assert str(caught.value).startswith(f"prompts {file}, line 3: ")
    assert "\n" not in str(caught.value)
    assert len(read_prompts(file, words, 2)) == 2  # what is not asked for is not read


def test_a_file_without_prompts_or_none_is_refused(words: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(MegaloopError, match="no line with a prompt"):
        read_prompts(_write(tmp_path / "empty.jsonl", b"", b" "), words, 10)
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(MegaloopError, match="cannot be read"):
            read_prompts(path, words, 10)


def test_a_measure_says_which_prompt_is_too_short() -> None:
    prompts = random_prompts((13, 12, 21))
    prompts.require(12, "future effects")
    with pytest.raises(MegaloopError, match="future effects: prompt 2 of random has 12 tokens; at least 13 are needed"):
        prompts.require(13, "future effects")


@pytest.mark.parametrize("document_masking", [False, True])
def test_held_out_samples_come_with_targets_documents_and_difficulty(targeted: DataSet, document_masking: bool) -> None:
    split = targeted.split("validation")
    prompts = held_out_prompts(targeted, 5, document_masking)
    assert len(prompts) == 5
    for index, prompt in enumerate(prompts.prompts):
        sample = split.sample(index)
        assert sample.targets is not None
        assert sample.difficulties is not None
        assert len(prompt) == LENGTH
        assert prompt.tokens.tolist() == sample.tokens[:LENGTH].tolist()
        assert prompt.targets.tolist() == sample.targets.tolist()
        levels = set(sample.difficulties[sample.difficulties >= 0].tolist())
        assert prompt.difficulty == (levels.pop() if len(levels) == 1 else -1)
        assert (prompt.documents is not None) == document_masking
        if prompt.documents is not None:
            starts = [place for place in range(LENGTH) if place == 0 or np.diff(prompt.documents)[place - 1]]
            assert starts == sample.starts.tolist()
    assert held_out_prompts(targeted, 10**6, document_masking).sha256 != prompts.sha256
    assert len(held_out_prompts(targeted, 10**6, document_masking)) == len(split)


@pytest.fixture(scope="module")
def targeted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return DataSet.open(write_targeted(tmp_path_factory.mktemp("targeted"), corpus, 120))


def test_without_targets_each_token_predicts_the_next(corpus: Path) -> None:
    dataset = DataSet.open(corpus)
    sample = dataset.split("validation").sample(0)
    (prompt,) = held_out_prompts(dataset, 1, False).prompts
    assert prompt.tokens.tolist() == sample.tokens[:-1].tolist()
    assert prompt.targets.tolist() == sample.tokens[1:].tolist()


def test_texts_are_cut_and_problems_stay_complete() -> None:
    problem, other = random_prompts((30, 30)).prompts
    parts = (np.arange(30) // 6).astype(np.int32)
    text = replace(other, targets=np.append(other.tokens[1:], -1), documents=parts)
    cut, complete = Prompts("both", [text, problem]).cut(16).prompts
    assert complete is problem
    assert cut.tokens.tolist() == text.tokens[:16].tolist()
    assert cut.targets.tolist() == text.targets[:16].tolist()
    assert cut.documents is not None
    assert cut.documents.tolist() == parts[:16].tolist()
