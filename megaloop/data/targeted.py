"""Documents that carry their targets: what is to be predicted at each place, or nothing.

Two forms of a line of jsonl, both with an optional whole number ``difficulty``:

* tokens and targets, of one length, as words of the tokenizer's vocabulary or as ids; null: no target::

      {"tokens": ["2", "a", "b", "a"], "targets": [null, null, null, "b"], "difficulty": 2}

* text with marked answers (``--answer-marks "[[ ]]"``), whose tokens are the targets of the places before them::

      {"text": "3 + 4 = [[7]]"}

Targets of the first form stand where they are predicted: nothing is shifted by a place.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaloop.data.jsonl import NotText, read_object
from megaloop.errors import MegaloopError
from megaloop.text import printable
from megaloop.tokenizer import Tokenizer

__all__ = ["Example", "ExampleReader", "MarkedText", "TokenLists", "answer_marks", "line_difficulty"]

_HARDEST = 1 << 31
"""Difficulties are smaller."""


@dataclass(frozen=True)
class Example:
    """A document whose places have targets.

    Attributes:
        tokens: its ids.
        targets: what each place is to predict; -1: nothing.
        difficulty: -1: not given.
    """

    tokens: NDArray[np.integer[Any]]
    targets: NDArray[np.integer[Any]]
    difficulty: int

    def __len__(self) -> int:
        return len(self.tokens)


class ExampleReader(ABC):
    """Reads examples from lines of jsonl; the two forms say how.

    Args:
        tokenizer: whose ids; None while it is still to be trained: lines are then checked without it.
        longest: tokens of an example at most.
    """

    def __init__(self, tokenizer: Tokenizer | None, longest: int):
        self._tokenizer, self._longest = tokenizer, longest
        self._read: tuple[str, Example] | None = None  # the last line: it is checked first, and then read

    def check(self, line: str) -> None:
        """Whether :meth:`read` will take the line.

        Raises:
            NotText: it will not.
        """
        self.read(line)

    def read(self, line: str) -> Example:
        """The example of a line.

        Raises:
            NotText: there is none in it, or one that is too long.
        """
        if self._read is not None and self._read[0] is line:
            return self._read[1]
        fields = read_object(line.encode())
        example = self._example(fields, line_difficulty(fields))
        if len(example) > self._longest:
            raise NotText(f"{len(example):,} tokens; a sample has {self._longest:,}, so raise --sequence-length")
        self._read = line, example
        return example

    @abstractmethod
    def _example(self, fields: dict[str, Any], difficulty: int) -> Example:
        """The example of a line's fields; NotText as :meth:`read`."""


def line_difficulty(fields: dict[str, Any]) -> int:
    """A line's difficulty; -1: it gives none."""
    difficulty = fields.get("difficulty")
    if difficulty is None:
        return -1
    if type(difficulty) is not int or not 0 <= difficulty < _HARDEST:
        raise NotText(f"difficulty {printable(difficulty, 40)}; expected a whole number from 0 on")
    return difficulty


class TokenLists(ExampleReader):
    """Lines with ``tokens`` and ``targets``."""

    def __init__(self, tokenizer: Tokenizer, longest: int):
        super().__init__(tokenizer, longest)
        self._vocab_size = tokenizer.vocab_size
        self._ids: dict[str | None, int] = {None: -1}
        self._ids.update(tokenizer.vocabulary())

    def _example(self, fields: dict[str, Any], difficulty: int) -> Example:
        tokens, targets = fields.get("tokens"), fields.get("targets")
        if not isinstance(tokens, list) or not isinstance(targets, list) or not tokens or len(tokens) != len(targets):
            shown = [f"{name} {_count(value)}" for name, value in (("tokens", tokens), ("targets", targets))]
            raise NotText(
                f"{' and '.join(shown)}; expected two lists of one length, with null where there is no target"
            )
        if None in tokens:
            raise NotText("null among the tokens; only targets can be")
        token_ids, target_ids = self._look_up(tokens, "tokens"), self._look_up(targets, "targets")
        if not any(target >= 0 for target in target_ids):
            raise NotText("no target")
        return Example(np.array(token_ids, np.int64), np.array(target_ids, np.int64), difficulty)

    def _look_up(self, words: Sequence[Any], name: str) -> list[int]:
        try:
            return [self._ids[word] for word in words]
        except (KeyError, TypeError):  # an id, a word that is none, or something else
            return [self._id(word, name) for word in words]

    def _id(self, word: Any, name: str) -> int:
        if type(word) is int and 0 <= word < self._vocab_size:
            return word
        found = self._ids.get(word) if word is None or isinstance(word, str) else None
        if found is None:
            raise NotText(
                f"{printable(json.dumps(word), 40)} among the {name} is neither a word of the tokenizer nor an id below {self._vocab_size}"
            )
        return found


def _count(value: Any) -> str:
    return f"has {len(value):,}" if isinstance(value, list) else "is no list"


class MarkedText(ExampleReader):
    """Lines whose text has marked answers.

    An example begins with the token of a document's end, as training lays out documents, so that its first token may be
    an answer's; where the text ends with an answer, its end is a target as well.

    Args:
        marks: what stands before and after each answer.
        text_of: the text of a line's fields.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        longest: int,
        marks: tuple[str, str],
        text_of: Callable[[dict[str, Any]], str],
    ):
        super().__init__(tokenizer, longest)
        self._marks, self._text_of = marks, text_of

    def plain(self, line: str) -> str:
        """A line's text without the marks, which a tokenizer is trained on."""
        return "".join(text for text, _ in self._parts(self._text_of(read_object(line.encode()))))

    def check(self, line: str) -> None:
        if self._tokenizer is None:
            fields = read_object(line.encode())
            self._parts(self._text_of(fields))
            line_difficulty(fields)
        else:
            super().check(line)

    def _parts(self, text: str) -> list[tuple[str, bool]]:
        """(text, whether it is an answer), in order."""
        opening, closing = self._marks
        parts: list[tuple[str, bool]] = []
        rest = text
        while opening in rest:
            before, _, rest = rest.partition(opening)
            answer, ends, rest = rest.partition(closing)
            if not ends or not answer or opening in answer or closing in before:
                raise NotText(f"an answer that is empty or does not end: expected text between {opening} and {closing}")
            parts += [(before, False), (answer, True)]
        if closing in rest:
            raise NotText(f"{closing} without {opening} before it")
        if not parts:
            raise NotText(f"no answer: expected text between {opening} and {closing}")
        return [*parts, (rest, False)]

    def _example(self, fields: dict[str, Any], difficulty: int) -> Example:
        assert self._tokenizer is not None
        end = self._tokenizer.eos_id
        tokens = [end, *self._tokenizer.prefix_ids]
        answers = [False] * len(tokens)
        for text, is_answer in self._parts(self._text_of(fields)):
            try:
                ids = self._tokenizer.encode(text)
            except (
                MegaloopError
            ) as error:  # one of words alone, and this is none: the line's fault, and it may be skipped
                raise NotText(str(error)) from None
            tokens += ids
            answers += [is_answer] * len(ids)
        following = [*tokens[1:], end]
        learnt = [*answers[1:], answers[-1]]
        targets = [token if is_answer else -1 for token, is_answer in zip(following, learnt, strict=True)]
        if max(targets) < 0:
            raise NotText("no target: the tokenizer makes nothing of its answers")
        return Example(np.array(tokens, np.int64), np.array(targets, np.int64), difficulty)


def answer_marks(text: str) -> tuple[str, str]:
    """What stands before and after an answer: ``"[[ ]]"``.

    Raises:
        MegaloopError: these are no two different marks.
    """
    marks = text.split()
    if len(marks) != 2 or marks[0] in marks[1] or marks[1] in marks[0]:
        raise MegaloopError(
            f"--answer-marks {printable(json.dumps(text), 60)}: expected two different marks with a space between, such as '[[ ]]'"
        )
    return marks[0], marks[1]
