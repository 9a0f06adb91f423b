"""The floor of a difficulty: what a guesser scores that knows the statistics of the data, but not how its tasks are solved.

A score of 50% says little where guessing well gives 45%. In p-hop induction many hops lead to the beginning of the
sequence, whatever it is, so that a guesser who knows how often a hop ends where is right far more often than one time in the
alphabet; with many answers in view, one of them is the right one. Four guessers learn from training documents and are run on
held-out ones (and where those are few on training documents that they have not learnt from); the best of them is the floor:

* ``majority``: the most frequent target at that place of the document;
* ``majority after the token``: the most frequent one after the token that stands there;
* ``vote``: each earlier place j has the weight q_j with which the target at place i stands there, and the token of most weight is
  the guess. If the place is independent of the tokens, q_j is the probability that the answer is copied from j. It is found from
  a_j, how often the target equals the token at j, less c_j, the agreement of two independent draws: (a_j - c_j) / (1 - c_j);
* ``odds``: each earlier place adds the log of the odds a_j / (1 - a_j) over those of c_j to its token, and the target's own frequency counts
  as well (naive Bayes). This one also knows what the answer is *not*: at one hop, for instance, never the letter just read.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megaloop.data.description import FloorEntry
from megaloop.data.targeted import Example
from megaloop.errors import MegaloopError

__all__ = ["FloorSample", "floors"]

_TRAINING, _HELD_OUT = 4_000, 2_000
"""Documents of each difficulty at most, from which guessers learn and on which they are run."""
_ENOUGH, _SPARED = 500, 4
"""Where fewer are held out, so many are asked: at most one in four of the training documents, from which guessers then do not learn. On a handful
of documents a floor is a lottery (of ten equally likely digits, 18 places once gave 6%)."""
_TOKENS = 1 << 20
"""Tokens of them at most: of long documents there are fewer."""
_DIFFICULTIES = 256
"""As many are told apart at most."""
_BUDGET = 1 << 28
"""Comparisons of tokens, about and at most, by which the votes of a difficulty are learnt, and as many by which they are counted."""
_VOTERS = 64
"""Places whose votes are counted, at most: those of most weight."""
_COMMON = 16
"""Tokens that ``odds`` considers besides those that stand at these places."""


class FloorSample:
    """Documents of each difficulty, drawn evenly from all of them by a hash of their tokens, as many as are enough."""

    def __init__(self) -> None:
        self._kept: dict[bool, dict[int, _Drawn]] = {True: {}, False: {}}

    def add(self, example: Example, held_out: bool) -> None:
        """Take a document, or find that others go before it.

        Raises:
            MegaloopError: there are too many difficulties.
        """
        found = self._kept[held_out]
        if example.difficulty not in found and len(found) == _DIFFICULTIES:
            raise MegaloopError(
                f"prep: more than {_DIFFICULTIES} difficulties (the last: {example.difficulty}); expected a few levels, each of many documents"
            )
        found.setdefault(example.difficulty, _Drawn(_HELD_OUT if held_out else _TRAINING)).add(example)

    def floors(self) -> list[FloorEntry]:
        """Of each difficulty of which there are documents on both sides."""
        training, held_out = (
            {key: drawn.documents for key, drawn in self._kept[side].items()} for side in (False, True)
        )
        for difficulty in set(training) & set(held_out):
            training[difficulty], held_out[difficulty] = _enough(training[difficulty], held_out[difficulty])
        return floors(training, held_out)


def _enough(known: list[Example], asked: list[Example]) -> tuple[list[Example], list[Example]]:
    """Training and held-out documents of a difficulty, some of the first among the second where those are too few."""
    spared = min(min(_ENOUGH, _HELD_OUT) - len(asked), len(known) // _SPARED)
    if spared <= 0:
        return known, asked
    places = set(range(0, len(known), len(known) // spared)[:spared])
    asked = [*asked, *(known[place] for place in sorted(places))]
    return [example for place, example in enumerate(known) if place not in places], asked


class _Drawn:
    """The documents of smallest hash among those that came: at most so many, and not many more tokens than are enough."""

    def __init__(self, most: int):
        self._most, self._tokens, self._count = most, 0, 0
        self._heap: list[tuple[int, int, Example]] = []  # the largest hash first

    def add(self, example: Example) -> None:
        digest = hashlib.blake2b(example.tokens.tobytes(), digest_size=8, salt=b"floor").digest()
        entry = (-int.from_bytes(digest, "big"), self._count, _narrow(example))
        self._count += 1
        if self._full and entry < self._heap[0]:
            return
        heapq.heappush(self._heap, entry)
        self._tokens += len(example)
        while len(self._heap) > self._most or self._tokens - len(self._heap[0][2]) >= _TOKENS:
            self._tokens -= len(heapq.heappop(self._heap)[2])

    @property
    def _full(self) -> bool:
        return len(self._heap) >= self._most or self._tokens >= _TOKENS

    @property
    def documents(self) -> list[Example]:
        """In the order in which they came."""
        return [example for _, _, example in sorted(self._heap, key=lambda entry: entry[1])]


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
    def guess(place: int, rows: int, voters: int) -> NDArray[np.int64] | None:
        agreement, by_chance, noise, _ = _agreement(known, place, rows)
        weights = np.where(
            agreement - by_chance > noise, (agreement - by_chance) / np.maximum(1 - by_chance, 1e-9), 0.0
        )
        sources = _heaviest(weights, voters)
        tokens_NK = asked.tokens[:, sources]
        return _most_voted(tokens_NK, tokens_NK, weights[sources], 0.0) if len(sources) else None

    return _by_place(known, asked, guess)


def _odds(known: _Documents, asked: _Documents) -> NDArray[np.int64]:
    def guess(place: int, rows: int, voters: int) -> NDArray[np.int64] | None:
        agreement, by_chance, noise, targets = _agreement(known, place, rows)
        if not len(targets):
            return None
        least = 0.5 / len(targets)
        a, c = (np.clip(share, least, 1 - least) for share in (agreement, by_chance))
        weights = np.where(np.abs(agreement - by_chance) > noise, np.log(a * (1 - c) / (c * (1 - a))), 0.0)
        sources = _heaviest(weights, voters)
        tokens, counts = np.unique(targets, return_counts=True)
        common = tokens[np.argsort(-counts, kind="stable")[:_COMMON]]
        tokens_NK = asked.tokens[:, sources]
        candidates_NC = np.concatenate([np.tile(common, (len(tokens_NK), 1)), tokens_NK], axis=1)
        frequent = dict(zip(tokens.tolist(), np.log(counts / len(targets)).tolist(), strict=True))
        seen, where = np.unique(candidates_NC, return_inverse=True)
        prior_NC = np.array([frequent.get(token, np.log(least)) for token in seen.tolist()])[where].reshape(
            candidates_NC.shape
        )
        return _most_voted(candidates_NC, tokens_NK, weights[sources], prior_NC)

    return _by_place(known, asked, guess)


def _by_place(
    known: _Documents, asked: _Documents, guess: Callable[[int, int, int], NDArray[np.int64] | None]
) -> NDArray[np.int64]:
    """What ``guess(place, rows, voters)`` says of each place that is asked; elsewhere, and for -1, the majority."""
    guesses = _majority(known, asked)
    places = np.flatnonzero((asked.targets >= 0).any(axis=0))
    places = places[places < known.targets.shape[1]]
    rows = max(_BUDGET // max(int(places.sum()) + len(places), 1), 64)
    voters = min(max(int((_BUDGET / max(len(asked.tokens) * len(places), 1)) ** 0.5), 4), _VOTERS)
    for place in places.tolist():
        chosen_N = guess(place, rows, voters)
        if chosen_N is not None:
            guesses[:, place] = np.where(chosen_N >= 0, chosen_N, guesses[:, place])
    return guesses


def _most_voted(
    candidates_NC: NDArray[np.int64],
    tokens_NK: NDArray[np.int64],
    weights_K: NDArray[np.float64],
    prior_NC: NDArray[np.float64] | float,
) -> NDArray[np.int64]:
    """Of each row's candidates the one that its tokens give most weight; -1, what stands beyond a document's end, is none."""
    votes_NC = ((candidates_NC[:, :, None] == tokens_NK[:, None, :]) * weights_K).sum(axis=2) + prior_NC
    best_N = np.where(candidates_NC >= 0, votes_NC, -np.inf).argmax(axis=1)
    chosen_N: NDArray[np.int64] = candidates_NC[np.arange(len(best_N)), best_N]
    return chosen_N


def _agreement(
    known: _Documents, place: int, rows: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Of the places up to ``place``: how often the target is the token there, how often by chance, two standard errors; and the targets."""
    has = np.flatnonzero(known.targets[:, place] >= 0)[:rows]
    targets, tokens = known.targets[has, place], known.tokens[has, : place + 1]
    if not len(has):
        none = np.zeros(0)
        return none, none, none, targets
    shares = np.bincount(targets, minlength=int(tokens.max()) + 1) / len(has)
    by_chance = shares[tokens].mean(axis=0)
    noise = 2 * np.sqrt(by_chance * (1 - by_chance) / len(has))
    return (tokens == targets[:, None]).mean(axis=0), by_chance, noise, targets


def _heaviest(weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Places of the largest weights, whatever their sign; those without any are left out."""
    chosen = np.argsort(-np.abs(weights), kind="stable")[:count]
    return chosen[weights[chosen] != 0]


def _commonest(targets: NDArray[np.int64]) -> int:
    return int(np.bincount(targets[targets >= 0]).argmax())


_GUESSERS: dict[str, Callable[[_Documents, _Documents], NDArray[np.int64]]] = {
    "majority": _majority,
    "majority after the token": _after_token,
    "vote": _vote,
    "odds": _odds,
}
