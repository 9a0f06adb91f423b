"""Prompts that a model is looked at with: held-out samples of a data set, lines of a jsonl file, or problems with a difficulty.

Shape suffixes: B prompts, S positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaloop.data import DataSet, held_out_batch, held_out_places
from megaloop.data.jsonl import MARK, NotText, field_text, read_object
from megaloop.data.targeted import TokenLists, line_difficulty
from megaloop.errors import MegaloopError
from megaloop.text import printable
from megaloop.tokenizer import Tokenizer

__all__ = ["Prompt", "PromptBatch", "Prompts", "held_out_prompts", "read_prompts", "text_prompt", "training_prompts"]

_LONGEST = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        tokens: ids, int64 [S].
        targets: what each position is to predict, int64 [S]; -1 where nothing is to be.
        documents: of each position, where a model's attention stays inside documents; None: it is one.
        difficulty: -1: not given.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: NDArray[np.int32] | None = None
    difficulty: int = -1

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_text(self) -> bool:
        """Every token is to predict the next one, which the last of a text may not have."""
        return bool((self.targets[:-1] >= 0).all())

    def first(self, tokens: int) -> Prompt:
        """Its beginning."""
        documents = None if self.documents is None else self.documents[:tokens]
        return Prompt(self.tokens[:tokens], self.targets[:tokens], documents, self.difficulty)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts filled up at their end to one length.

    Attributes:
        numbers: which of the prompts they are.
        tokens_BS: ids; 0 after a prompt's end.
        targets_BS: -1 where nothing is to be predicted.
        documents_BS: None: each prompt is one.
        valid_BS: which positions are the prompt's.
    """

    numbers: list[int]
    tokens_BS: Tensor
    targets_BS: Tensor
    documents_BS: Tensor | None
    valid_BS: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [int(length) for length in self.valid_BS.sum(1)]


@dataclass(frozen=True)
class Prompts:
    """Some prompts and where they are from.

    Attributes:
        source: the file or the data set.
    """

    source: str
    prompts: Sequence[Prompt]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sha256(self) -> str:
        """Of all that a model reads and is to predict."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            documents = np.zeros(0, np.int32) if prompt.documents is None else prompt.documents
            for array in (np.array([len(prompt), prompt.difficulty]), prompt.tokens, prompt.targets, documents):
                digest.update(array.astype("<i8").tobytes() + b"|")
        return digest.hexdigest()

    @property
    def difficulties(self) -> list[int]:
        """Those that some prompt has, ascending."""
        return sorted({prompt.difficulty for prompt in self.prompts} - {-1})

    def cut(self, tokens: int) -> Prompts:
        """With texts of at most so many tokens; problems, whose targets may come late, stay complete."""
        return Prompts(self.source, [prompt.first(tokens) if prompt.is_text else prompt for prompt in self.prompts])

    def chosen(self, numbers: Sequence[int]) -> Prompts:
        """Some of them."""
        return Prompts(self.source, [self.prompts[number] for number in numbers])

    def require(self, tokens: int, what: str, numbers: Sequence[int] | None = None) -> None:
        """Raise MegaloopError if a prompt has fewer tokens than a measure needs.

        Args:
            numbers: of the prompts that it takes; default: all.
        """
        for number in range(len(self)) if numbers is None else numbers:
            if (found := len(self.prompts[number])) < tokens:
                raise MegaloopError(
                    f"{what}: prompt {number + 1} of {self.source} has {found} tokens; at least {tokens} are needed"
                )

    def together(self, tokens: int) -> list[list[int]]:
        """Numbers of prompts of similar length, which go through together: at most so many tokens of them (or one prompt)."""
        groups: list[list[int]] = []
        for number in sorted(range(len(self.prompts)), key=lambda number: len(self.prompts[number])):
            if not groups or (len(groups[-1]) + 1) * len(self.prompts[number]) > tokens:
                groups.append([])
            groups[-1].append(number)
        return groups

    def batch(self, numbers: Sequence[int], device: torch.device) -> PromptBatch:
        """Some of the prompts together."""
        chosen = [self.prompts[number] for number in numbers]
        shape = len(chosen), max(map(len, chosen))
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        documents, valid = np.full(shape, -1, np.int32), np.zeros(shape, np.bool_)
        for row, prompt in enumerate(chosen):
            inside = slice(0, len(prompt))
            tokens[row, inside], targets[row, inside], valid[row, inside] = prompt.tokens, prompt.targets, True
            documents[row, inside] = 0 if prompt.documents is None else prompt.documents
        several = any(prompt.documents is not None for prompt in chosen)
        arrays = (torch.from_numpy(array).to(device) for array in (tokens, targets, documents, valid))
        tokens_BS, targets_BS, documents_BS, valid_BS = arrays
        return PromptBatch(list(numbers), tokens_BS, targets_BS, documents_BS if several else None, valid_BS)


def text_prompt(tokenizer: Tokenizer, text: str, difficulty: int = -1) -> Prompt:
    """A text, of which each token is to predict the next one."""
    tokens = np.array(tokenizer.encode_prompt(text), np.int64)
    return Prompt(tokens, np.append(tokens[1:], -1), difficulty=difficulty)


def held_out_prompts(dataset: DataSet, count: int, document_masking: bool) -> Prompts:
    """The first ``count`` held-out samples of a data set, those that the held-out loss is over.

    Args:
        document_masking: the model's: its attention stays inside documents.

    Raises:
        MegaloopError: it holds out none.
    """
    if not len(dataset.split("validation")):
        raise MegaloopError(f"data {dataset.path}: no held-out samples; prepare it with --validation-fraction")
    return _samples(dataset, held_out_places([dataset], count), document_masking)


def training_prompts(dataset: DataSet, count: int, document_masking: bool) -> Prompts:
    """The first ``count`` training samples of a data set, which a tuned lens learns from."""
    split = dataset.split("train")
    return _samples(dataset, [(split, index) for index in range(min(count, len(split)))], document_masking)


def _samples(dataset: DataSet, places: Any, document_masking: bool) -> Prompts:
    prompts = []
    for number in range(len(places)):
        read = held_out_batch(places[number : number + 1], [0])  # alone: the weights are of all places that it is given
        targets = read.targets[0] if read.loss_weights is None else read.targets[0].where(read.loss_weights[0] > 0, -1)
        found = set() if read.difficulties is None else set(read.difficulties[0][targets >= 0].tolist())
        documents = read.documents[0].numpy() if document_masking else None
        difficulty = found.pop() if len(found) == 1 else -1
        prompts.append(Prompt(read.inputs[0].numpy(), targets.numpy(), documents, difficulty))
    return Prompts(str(dataset.path), prompts)


def read_prompts(path: Path, tokenizer: Tokenizer, count: int, field: str = "text") -> Prompts:
    """The first ``count`` lines of a jsonl file: a text in a field, or ``tokens`` and ``targets`` as ``megaloop synthesize`` writes them.

    Raises:
        MegaloopError: the file cannot be read, has no line, or one that holds no prompt.
    """
    lists: TokenLists | None = None
    prompts: list[Prompt] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if len(prompts) == count:
                    break
                line = line.removeprefix(MARK) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    fields = read_object(line)
                    if "tokens" in fields:
                        lists = lists or TokenLists(tokenizer, _LONGEST)
                        example = lists.read(line.decode())
                        prompts.append(
                            Prompt(
                                example.tokens.astype(np.int64),
                                example.targets.astype(np.int64),
                                difficulty=example.difficulty,
                            )
                        )
                    else:
                        prompts.append(
                            text_prompt(tokenizer, field_text(fields, field, "--field"), line_difficulty(fields))
                        )
                    if not len(prompts[-1]):
                        raise NotText("a text without tokens")
                except NotText as error:
                    raise MegaloopError(f"prompts {printable(path)}, line {number}: {error}") from None
    except OSError as error:
        raise MegaloopError(f"prompts {printable(path)}: cannot be read ({error.strerror})") from None
    if not prompts:
        raise MegaloopError(f"prompts {printable(path)}: no line with a prompt; expected one JSON object a line")
    return Prompts(str(path), prompts)
