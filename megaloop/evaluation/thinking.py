"""How many iterations of a loop the tokens took that evaluation asks for; S tokens of a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

from torch import Tensor

from megaloop.evaluation.records import MOST_SHOWN
from megaloop.tokenizer import Tokenizer

__all__ = ["TokenClasses", "by_class", "loops_over_text", "spent"]


def spent(loops: Iterable[int], most: int) -> dict[str, Any]:
    """The mean of the iterations of tokens, and how many tokens ran 1, 2, ... up to ``most`` of them."""
    counts = Counter(loops)
    tokens = sum(counts.values())
    mean = sum(number * count for number, count in counts.items()) / tokens
    return {"loops_mean": mean, "loops_histogram": [counts[number] for number in range(1, most + 1)]}


@dataclass
class TokenClasses:
    """What kind of text each token stands for: ``digits``, ``words``, ``punctuation``, ``space``, or ``other``.

    Attributes:
        decode: the tokenizer's.
    """

    decode: Callable[[Sequence[int]], str]
    _known: dict[int, str] = field(default_factory=dict)

    def of(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = _class_of(self.decode([token]))
        return self._known[token]


def _class_of(text: str) -> str:
    """A special token has no text, and a token that is a part of a character's bytes none of its own: ``other``."""
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return "other"
    letters = text.strip()
    if not letters:
        return "space"
    if letters.isdigit():
        return "digits"
    return "words" if any(letter.isalnum() for letter in letters) else "punctuation"


def by_class(classes: TokenClasses, tokens: Iterable[tuple[int, int]]) -> dict[str, list[float | int]]:
    """[mean loops, tokens] of each class.

    Args:
        tokens: what was to be predicted, and in how many iterations.
    """
    found: dict[str, list[int]] = {}
    for token, loops in tokens:
        found.setdefault(classes.of(token), []).append(loops)
    return {name: [fmean(loops), len(loops)] for name, loops in sorted(found.items())}


def loops_over_text(
    tokenizer: Tokenizer, tokens_S: Tensor, documents_S: Tensor, asked_S: Tensor, loops_S: Tensor, *, own_targets: bool
) -> list[list[Any]]:
    """[piece of text, loops] of the first tokens of a sample's first document; None: the token was not predicted.

    Args:
        own_targets: the samples carry some: a piece shows what was spent at its place, not on its prediction.
    """
    inside_S = documents_S == documents_S[0]
    count = min(int(inside_S.sum()), MOST_SHOWN)
    tokens = tokens_S[:count].tolist()
    loops = [
        number if asked else None
        for number, asked in zip(loops_S[:count].tolist(), asked_S[:count].tolist(), strict=True)
    ]
    if not own_targets:
        loops = [None, *loops[:-1]]
    texts = [tokenizer.decode(tokens[:stop]) for stop in range(count + 1)]
    # bytes of a character that is not complete yet are shown with its last one
    shown = [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts[:-1]] + texts[-1:]
    pieces = [after[len(before) :] for before, after in pairwise(shown)]
    return [[piece, number] for piece, number in zip(pieces, loops, strict=True)]
