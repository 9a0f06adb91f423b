"""Prompts and answers for supervised fine-tuning: jsonl in, samples out whose answers alone are learnt.

A sample is laid out as pretraining lays out documents: each example is a document, its prompt followed by its answer
and by ``</s>``; examples are packed, in the order of the file, into as few samples as that allows, and none is cut.

    tokens    </s> P P P A A </s> P P A A A </s> padding
    learnt          . . . a a  a   . . a a a  a
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from megaloop.config import DataConfig
from megaloop.data.jsonl import BEGINNING, MARK, NotText, field_text, foreign_encoding, read_object
from megaloop.data.split import Sample
from megaloop.errors import MegaloopError
from megaloop.text import printable
from megaloop.tokenizer import Tokenizer, file_sha256

__all__ = ["FineTuningSet", "FineTuningSplit"]

_SHARD = 256
"""Samples are shuffled in blocks of a few times this many."""


@dataclass(frozen=True)
class _Example:
    """Token ids, with the end-of-text token in the answer, and the answer's bytes of text."""

    prompt: list[int]
    answer: list[int]
    bytes: int

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class FineTuningSplit:
    """Samples in memory; what :class:`megaloop.data.split.Split` is to shards.

    Attributes:
        shard_sizes: samples by block of neighbours.
        documents: examples.
    """

    def __init__(self, packed: Sequence[Sequence[_Example]], sequence_length: int, end: int):
        self._samples = [_sample(examples, sequence_length, end) for examples in packed]
        self._learnt = [int(sample.loss_mask.sum()) for sample in self._samples if sample.loss_mask is not None]
        self.documents = sum(map(len, packed))
        count = len(self._samples)
        self.shard_sizes = [min(_SHARD, count - first) for first in range(0, count, _SHARD)]

    def __len__(self) -> int:
        return len(self._samples)

    @cached_property
    def sha256(self) -> str:
        """Of all samples: tokens, and which of them are learnt."""
        digest = hashlib.sha256()
        for sample in self._samples:
            digest.update(sample.tokens.astype("<i8").tobytes())
            digest.update(b"" if sample.loss_mask is None else sample.loss_mask.tobytes())
        return digest.hexdigest()

    @property
    def has_loss_mask(self) -> bool:
        """Not all predicted tokens count."""
        return True

    def sample(self, index: int) -> Sample:
        return self._samples[index]

    def loss_mask(self, index: int) -> int:
        """Tokens of a sample that are learnt."""
        return self._learnt[index]


class FineTuningSet:
    """The examples of a jsonl file; what :class:`megaloop.data.dataset.DataSet` is to shards.

    Attributes:
        path: the file.
        tokenizer: the file that names the tokenizer.
        left_out: examples that are longer than a sample.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, config: DataConfig):
        """Read, tokenize and pack the examples.

        Raises:
            MegaloopError: a file that cannot be read, a line that is no example, or too few of them.
        """
        self.path, self.tokenizer, self.sequence_length = path, tokenizer.path, config.sequence_length
        self.vocab_size, self.tokenizer_sha256 = tokenizer.vocab_size, file_sha256(tokenizer.path)
        if tokenizer.eos_id < 0:
            raise MegaloopError(f"tokenizer {tokenizer.path} has no end-of-text token; answers could not end")
        examples: dict[str, list[tuple[int, _Example]]] = {"train": [], "validation": []}
        hashed: list[tuple[int, _Example]] = []
        self.left_out = 0
        for prompt, answer in _read(path, config):
            made = _Example(
                tokenizer.encode_prompt(prompt), [*tokenizer.encode(answer), tokenizer.eos_id], len(answer.encode())
            )
            if len(made) > config.sequence_length:
                self.left_out += 1
                continue
            hashed.append((_hash(prompt, answer), made))
        if len(hashed) < 2:
            raise MegaloopError(
                f"data {path}: {len(hashed)} examples of at most {config.sequence_length} tokens "
                f"({self.left_out} are longer); at least 2 are needed, one of them held out: "
                "give more, or raise data.sequence_length"
            )
        limit = max(int(config.validation_fraction * 2**64), min(number for number, _ in hashed))
        for number, sample in hashed:
            examples["validation" if number <= limit else "train"].append((number, sample))
        if not examples["train"]:
            raise MegaloopError(f"data {path}: all examples are held out; lower data.validation_fraction")
        self._splits = {
            name: FineTuningSplit(
                list(_packed([sample for _, sample in found], config.sequence_length)),
                config.sequence_length,
                tokenizer.eos_id,
            )
            for name, found in examples.items()
        }

    def split(self, name: Literal["train", "validation"]) -> FineTuningSplit:
        return self._splits[name]

    def sha256(self, split: Literal["train", "validation"]) -> str:
        """What tells the samples of a split apart from others'."""
        return self._splits[split].sha256

    def describe(self) -> str:
        """What there is to train on."""
        train = self._splits["train"]
        loss_mask = sum(train.loss_mask(index) for index in range(len(train)))
        left = f", {self.left_out:,} longer than a sample left out" if self.left_out else ""
        return (
            f"{train.documents:,} examples, {loss_mask:,} tokens of answers, "
            f"{len(train):,} samples of {self.sequence_length}{left}"
        )


def _hash(prompt: str, answer: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{prompt}\0{answer}".encode(), digest_size=8).digest(), "big")


def _read(path: Path, config: DataConfig) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of each line."""
    try:
        with path.open("rb") as file:
            encoding = foreign_encoding(file.read(BEGINNING))
            if encoding is not None:
                raise MegaloopError(f"data {path}: {encoding}")
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(MARK)
                if line.strip():
                    yield _texts(f"data {path}, line {number}", line, config)
    except OSError as error:
        raise MegaloopError(
            f"data {path}: cannot be read ({error.strerror}); data.format sft takes a jsonl file with a prompt and an answer a line"
        ) from None


def _texts(where: str, line: bytes, config: DataConfig) -> tuple[str, str]:
    try:
        fields = read_object(line)
        prompt = field_text(fields, config.prompt_field, "data.prompt_field")
        answer = field_text(fields, config.answer_field, "data.answer_field")
    except NotText as error:
        raise MegaloopError(
            f"{where}: {error}; expected an object of JSON a line, with a prompt and an answer"
        ) from None
    if not answer:
        raise MegaloopError(
            f"{where}: no text in field '{printable(config.answer_field)}'; an answer is learnt, so it can't be empty"
        )
    return prompt, answer


def _packed(examples: Sequence[_Example], length: int) -> Iterator[list[_Example]]:
    """Examples, in order, by the sample that they fill."""
    sample: list[_Example] = []
    room = length
    for example in examples:
        if sample and len(example) > room:
            yield sample
            sample, room = [], length
        sample.append(example)
        room -= len(example)
    if sample:
        yield sample


def _sample(examples: Sequence[_Example], length: int, end: int) -> Sample:
    tokens = np.full(length + 1, end, dtype=np.int64)
    loss_mask = np.zeros(length, dtype=np.bool_)
    starts, at = [], 1
    for example in examples:
        starts.append(at)
        tokens[at : at + len(example)] = [*example.prompt, *example.answer]
        loss_mask[at - 1 + len(example.prompt) : at - 1 + len(example)] = True  # place i predicts token i + 1
        at += len(example)
    if at < length:
        starts.append(at)  # the padding is a document of its own
    kept = [start for start in starts if start < length]
    return Sample(tokens, np.array(kept, dtype=np.int32), sum(example.bytes for example in examples), loss_mask)
