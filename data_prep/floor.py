"""The floor of a difficulty: what a guesser scores that knows the statistics of the data, but not how its tasks are solved.

A score of 50% says little where guessing well gives 45%. In p-hop induction many hops lead to the beginning of the
sequence, whatever it is, so that a guesser who knows how often a hop ends where is right far more often than one time in the
alphabet; with many answers in view, one of them is the right one. Three guessers learn from training documents and are run on
held-out ones; the best of them is the floor:

* ``majority``: the most frequent target at that place of the document;
* ``majority after the token``: the most frequent one after the token that stands there;
* ``vote``: each earlier place j has the weight q_j with which the target at place i stands there, and the token of most weight is
  the guess. If the place is independent of the tokens, no guesser of that knowledge is better: q_j then is the
  probability that the answer is copied from j. It is found from how often the target equals the token at j, less the agreement of
  two independent draws c_j: (P(t_i = x_j) - c_j) / (1 - c_j).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaloop.data.description import FloorEntry
from megaloop.errors import MegaloopError

__all__ = ["Example", "FloorSample", "floors"]

_TRAINING, _HELD_OUT = 4_000, 2_000
"""Documents of each difficulty at most, from which guessers learn and on which they are run."""
_TOKENS = 1 << 20
"""Tokens of them at most: of long documents there are fewer."""
_DIFFICULTIES = 256
"""As many are told apart at most."""
_BUDGET = 1 << 30
"""Comparisons of tokens, about and at most, by which the votes of a difficulty are learnt, and as many by which they are counted."""
_VOTERS = 64
"""Places whose votes are counted, at most: those of most weight."""


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


class FloorSample:
    """Documents of each difficulty, the first ones, until there are enough."""

    def __init__(self) -> None:
        self._kept: dict[bool, dict[int, list[Example]]] = {True: {}, False: {}}
        self._tokens: Counter[tuple[bool, int]] = Counter()

    def add(self, example: Example, held_out: bool) -> None:
        """Take a document, or find that there are enough.

        Raises:
            MegaloopError: there are too many difficulties.
        """
        found = self._kept[held_out]
        if example.difficulty not in found and len(found) == _DIFFICULTIES:
            raise MegaloopError(
                f"prep: more than {_DIFFICULTIES} difficulties (the last: {example.difficulty}); expected a few levels, each of many documents"
            )
        kept, key = found.setdefault(example.difficulty, []), (held_out, example.difficulty)
        if len(kept) < (_HELD_OUT if held_out else _TRAINING) and self._tokens[key] < _TOKENS:
            self._tokens[key] += len(example)
            kept.append(_narrow(example))

    def floors(self) -> list[FloorEntry]:
        """Of each difficulty of which there are documents on both sides."""
        return floors(self._kept[False], self._kept[True])


def _narrow(example: Example) -> Example:
    """In half the memory: of 32 difficulties 50 million tokens are kept."""
    return Example(example.tokens.astype(np.int32), example.targets.astype(np.int32), example.difficulty)


def floors(training: Mapping[int, Sequence[Example]], held_out: Mapping[int, Sequence[Example]]) -> list[FloorEntry]:
    """The floor of each difficulty that both have, in their order; no target on either side: none."""
    found = []
    for difficulty in sorted(set(training) & set(held_out)):
        known, asked = _Documents(training[difficulty]), _Documents(held_out[difficulty])
        if not (known.targets >= 0).any() or not (asked.targets >= 0).any():
            continue
        scores = {name: asked.score(guess(known, asked)) for name, guess in _GUESSERS.items()}
        best, last = (max(scores, key=lambda name: scores[name][which]) for which in (0, 1))
        found.append(
            FloorEntry(
                difficulty=difficulty,
                accuracy=scores[best][0],
                last=scores[last][1],
                documents=len(held_out[difficulty]),
                guesser=best,
                last_guesser=last,
            )
        )
    return found


class _Documents:
    """Documents side by side, [N, L]; beyond the end of one there are no tokens (-1) and no targets."""

    def __init__(self, examples: Sequence[Example]):
        length = max(map(len, examples))
        self.tokens = np.full((len(examples), length), -1)  # int64, as what follows computes with it
        self.targets = np.full((len(examples), length), -1)
        for row, example in enumerate(examples):
            self.tokens[row, : len(example)] = example.tokens
            self.targets[row, : len(example)] = example.targets

    def score(self, guesses: NDArray[np.int64]) -> tuple[float, float]:
        """Shares of right guesses, over all targets and over each document's last."""
        asked = self.targets >= 0
        right = (guesses == self.targets) & asked
        some = asked.any(axis=1)
        last = self.targets.shape[1] - 1 - asked[:, ::-1].argmax(axis=1)
        return float(right.sum() / asked.sum()), float(right[some, last[some]].mean())


def _majority(known: _Documents, asked: _Documents) -> NDArray[np.int64]:
    guesses = np.full(asked.targets.shape, _commonest(known.targets))
    for place in range(min(asked.targets.shape[1], known.targets.shape[1])):
        if (column := known.targets[:, place]).max() >= 0:
            guesses[:, place] = _commonest(column)
    return guesses


def _after_token(known: _Documents, asked: _Documents) -> NDArray[np.int64]:
    places = known.targets >= 0
    pairs, counts = np.unique(
        np.stack([known.tokens[places], known.targets[places]], axis=1), axis=0, return_counts=True
    )
    order = np.argsort(counts, kind="stable")
    best = dict(pairs[order].tolist())  # of a token's pairs the last one stays: the most frequent
    commonest = _commonest(known.targets)
    tokens, where = np.unique(asked.tokens, return_inverse=True)
    guesses = np.array([best.get(token, commonest) for token in tokens.tolist()])
    return guesses[where].reshape(asked.tokens.shape)


def _vote(known: _Documents, asked: _Documents) -> NDArray[np.int64]:
    guesses = _majority(known, asked)
    places = np.flatnonzero((asked.targets >= 0).any(axis=0))
    places = places[places < known.targets.shape[1]]
    rows = max(_BUDGET // max(int(places.sum()) + len(places), 1), 64)
    voters = min(max(int((_BUDGET / max(len(asked.tokens) * len(places), 1)) ** 0.5), 4), _VOTERS)
    for place in places:
        weights = _weights(known, int(place), rows)
        sources = np.argsort(-weights, kind="stable")[:voters]
        sources = sources[weights[sources] > 0]
        if not len(sources):
            continue
        tokens_NK = asked.tokens[:, sources]
        weights_NK = np.where(tokens_NK >= 0, weights[sources], 0.0)  # -1: beyond a document's end
        votes_NK = ((tokens_NK[:, :, None] == tokens_NK[:, None, :]) * weights_NK[:, None, :]).sum(axis=2)
        best_N = votes_NK.argmax(axis=1)
        chosen_N = tokens_NK[np.arange(len(best_N)), best_N]
        guesses[:, place] = np.where(chosen_N >= 0, chosen_N, guesses[:, place])
    return guesses


def _weights(known: _Documents, place: int, rows: int) -> NDArray[np.float64]:
    """q_j of the places up to ``place``; what might be chance (two standard errors) has none."""
    has = np.flatnonzero(known.targets[:, place] >= 0)[:rows]
    if not len(has):
        return np.zeros(0)
    targets, tokens = known.targets[has, place], known.tokens[has, : place + 1]
    agreement = (tokens == targets[:, None]).mean(axis=0)
    shares = np.bincount(targets, minlength=int(tokens.max()) + 1) / len(has)
    by_chance = shares[tokens].mean(axis=0)
    noise = 2 * np.sqrt(by_chance * (1 - by_chance) / len(has))
    excess = agreement - by_chance
    return np.where(excess > noise, excess / np.maximum(1 - by_chance, 1e-9), 0.0)


def _commonest(targets: NDArray[np.int64]) -> int:
    return int(np.bincount(targets[targets >= 0]).argmax())


_GUESSERS: dict[str, Callable[[_Documents, _Documents], NDArray[np.int64]]] = {
    "majority": _majority,
    "majority after the token": _after_token,
    "vote": _vote,
}
