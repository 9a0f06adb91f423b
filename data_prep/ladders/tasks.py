"""Samples of a task at a difficulty, as arrays of ids (places in :data:`data_prep.ladders.words.WORDS`).

A sample begins with its difficulty. ``targets[i]`` is what is to be predicted having read ``tokens[0..i]``, :data:`NONE` where nothing
is. At every difficulty of a task the targets come from the same number of possible answers, so that a harder question is not
easier to guess, nor an easier one.

Shapes: B samples, S tokens of a sample, P places of letters, T terms, D digits, L levels, R roots.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.ladders.words import LETTERS, NUMBERS, WORDS
from megaloop.errors import MegaloopError

__all__ = ["NONE", "TASKS", "Addition", "Chains", "Doubles", "Draws", "Ladder", "PHop", "Samples"]

NONE = -1
"""No target at a place."""
_A = WORDS.index("a")
_PLUS, _EQUALS, _STOP, _ASK = map(WORDS.index, "+=;?")
_RAREST = 0.1
"""Where fewer chains than this are long enough, samples would be long looked for, or be nearly all of another kind."""
Ints = NDArray[np.int64]
Doubles = Literal["learn", "text", "none"]


class Draws:
    """Random numbers that a text determines, on every machine and with every version of numpy.

    They are made from the words of a Philox stream (Salmon et al., SC 2011), which numpy promises to keep; of how ``Generator`` makes
    numbers of them it does not (NEP 19).
    """

    def __init__(self, text: str):
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self._stream = np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64))

    def _words(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        return np.asarray(self._stream.random_raw(int(np.prod(shape))), dtype=np.uint64).reshape(shape)

    def below(self, end: int, shape: tuple[int, ...]) -> Ints:
        """Whole numbers of range(end), end < 2^31; their chances differ by less than end / 2^32 of themselves."""
        return ((self._words(shape) >> np.uint64(32)) * np.uint64(end) >> np.uint64(32)).astype(np.int64)

    def orders(self, rows: tuple[int, ...], size: int) -> Ints:
        """Permutations of range(size), [*rows, size]."""
        return np.argsort(self._words((*rows, size)), axis=-1, kind="stable")


@dataclass(frozen=True)
class Samples:
    """Samples of one difficulty.

    Attributes:
        tokens: ids, [B, S].
        targets: ids or :data:`NONE`, [B, S].
        redrawn: how often each was drawn before it was one that asks something at its end, [B].
    """

    tokens: Ints
    targets: Ints
    redrawn: Ints


class Ladder(Protocol):
    """A task with its options.

    Attributes:
        name: what ``--task`` calls it.
        lowest, highest: the difficulties it has.
    """

    name: ClassVar[str]
    lowest: ClassVar[int]
    highest: ClassVar[int]

    @property
    def key(self) -> str:
        """Name and options as text, from which random numbers are made; it changes when the samples of a seed do."""

    def check(self, difficulty: int) -> None:
        """Whether there are samples of a difficulty between lowest and highest; MegaloopError if not."""

    def draw(self, draws: Draws, difficulty: int, count: int) -> Samples:
        """So many samples."""


@dataclass(frozen=True)
class PHop:
    """p-hop induction (arXiv 2502.17416, section 3; 2402.09268): the number p, then letters, each drawn evenly.

    The target of a letter is the p-hop of the letters up to and including it (:func:`megaloop.data.induction.p_hop`), if
    there is one. There always is at the last place: other samples are drawn again.

    A letter after its like is its own p-hop, whatever p: the latest earlier place is the one before, and what follows that is the letter itself.
    Such a doubled letter is a shortcut: one place in ``alphabet``, and a larger share of the targets the larger p is, because from other places some chains
    leave the text (of an alphabet of 6 and a length of 64: 18% of the targets at p = 1, 43% at 8, 76% at 12). Chains that begin elsewhere
    never meet one: a hop leads to what follows the *latest* place of a letter, so to another letter. ``doubles="text"`` leaves such places in the text but asks nothing there; ``"none"`` draws each letter from
    those that the one before is not; then every target is p hops away, and at p = 1 it is never the letter just read.

    Attributes:
        alphabet: letters to draw from, which are the possible answers at every p.
        length: tokens of a sample, p included.
        doubles: a letter after its like has a target as others (``learn``), has none (``text``), or does not occur (``none``).
    """

    name: ClassVar[str] = "p-hop"
    lowest: ClassVar[int] = 1
    highest: ClassVar[int] = 32
    alphabet: int = 6
    length: int = 64
    doubles: Doubles = "learn"

    def __post_init__(self) -> None:
        _within("--alphabet", self.alphabet, 3 if self.doubles == "none" else 2, len(LETTERS), "letters")
        _within("--length", self.length, 4, 4096, "tokens")

    @property
    def key(self) -> str:
        return f"{self.name} 1, alphabet {self.alphabet}, length {self.length}, doubles {self.doubles}"

    def length_for(self, difficulty: int) -> int:
        """``length``, or where that is too short for so many hops the shortest that is not."""
        needed = self.length
        while self._share(difficulty, needed) < _RAREST:
            needed += 1
        return needed

    def check(self, difficulty: int) -> None:
        if (needed := self.length_for(difficulty)) > self.length:
            raise MegaloopError(
                f"synthesize: with --length {self.length} and --alphabet {self.alphabet}, fewer than one chain in ten has {difficulty} "
                f"hops that each lead further back; use --length {needed} or more, or a smaller --difficulty"
            )

    def _share(self, hops: int, length: int) -> float:
        """Of the chains from the last place, if that is not doubled: those that can go so many hops.

        A hop goes back by at least one place, and by one more for each of the letters before the one hopped over that is not the one looked for. So the
        length of a hop is geometric, and ``hops`` of them fit where ``hops`` of the letters before are successes.
        """
        places, chance = length - 3, 1 / (self.alphabet - (self.doubles == "none"))
        if places < hops:
            return 0.0
        return 1 - sum(math.comb(places, k) * chance**k * (1 - chance) ** (places - k) for k in range(hops))

    def draw(self, draws: Draws, difficulty: int, count: int) -> Samples:
        places = self.length - 1
        letters_BP = np.empty((count, places), dtype=np.int64)
        hops_BP = np.empty((count, places + 1), dtype=np.int64)
        redrawn = np.zeros(count, dtype=np.int64)
        wanted = np.arange(count)
        while len(wanted):  # it ends soon: see check
            drawn_BP = self._letters(draws, len(wanted), places)
            onward_BP = _hops(drawn_BP, self.alphabet)
            at = np.full(len(wanted), places - 1)
            for _ in range(difficulty):
                at = onward_BP[np.arange(len(wanted)), at]
            good = at < places
            if self.doubles == "text":
                good &= drawn_BP[:, -1] != drawn_BP[:, -2]
            letters_BP[wanted[good]], hops_BP[wanted[good]] = drawn_BP[good], onward_BP[good]
            wanted = wanted[~good]
            redrawn[wanted] += 1
        at_BP = np.tile(np.arange(places), (count, 1))
        for _ in range(difficulty):
            at_BP = np.take_along_axis(hops_BP, at_BP, axis=1)
        ends_BP = np.concatenate([letters_BP + _A, np.full((count, 1), NONE)], axis=1)
        targets_BP = np.take_along_axis(ends_BP, at_BP, axis=1)
        if self.doubles == "text":
            targets_BP[:, 1:][letters_BP[:, 1:] == letters_BP[:, :-1]] = NONE
        return Samples(_after(difficulty, letters_BP + _A), _after(NONE, targets_BP), redrawn)

    def _letters(self, draws: Draws, count: int, places: int) -> Ints:
        if self.doubles != "none":
            return draws.below(self.alphabet, (count, places))
        first, steps = draws.below(self.alphabet, (count, 1)), draws.below(self.alphabet - 1, (count, places - 1)) + 1
        return np.cumsum(np.concatenate([first, steps], axis=1), axis=1) % self.alphabet


def _hops(letters_BP: Ints, alphabet: int) -> Ints:
    """Where a hop from each place leads, [B, P + 1]: P, a place after all others that leads to itself, stands for nowhere."""
    count, places = letters_BP.shape
    hops_BP = np.full((count, places + 1), places)
    after_BA = np.full((count, alphabet), places)  # the place after the latest of each letter so far
    rows = np.arange(count)
    for place in range(places):
        hops_BP[:, place] = after_BA[rows, letters_BP[:, place]]
        after_BA[rows, letters_BP[:, place]] = place + 1
    return hops_BP


@dataclass(frozen=True)
class Addition:
    """n-ary addition (arXiv 2502.17416, section 3): n, n terms in a fixed width, their sum with the least digit first.

    The sum is written in the width of the largest one of n terms. Its ``digits`` least digits are targets: that of the place of ``=``, then
    those of the digits written so far. Each of the ten is equally likely there, whatever n and the digits before, so a guesser who has not added is right one
    time in ten. Of the one or two digits above that is not so: of two terms of two digits the third is 0 in 50.5% of samples, of 32 the
    fourth is 1 in more than 99%. A guesser would score with them, and at some n more than at others, so they are no targets.
    What remains is that the first digit needs no carry: a model that adds each column alone is right there, and in the second place in 55% of
    samples of two terms.

    Attributes:
        digits: of each term, leading zeros included.
    """

    name: ClassVar[str] = "addition"
    lowest: ClassVar[int] = 2
    highest: ClassVar[int] = 32
    digits: int = 2

    def __post_init__(self) -> None:
        _within("--digits", self.digits, 1, 9, "digits")

    @property
    def key(self) -> str:
        return f"{self.name} 1, digits {self.digits}"

    def check(self, difficulty: int) -> None:
        pass

    def draw(self, draws: Draws, difficulty: int, count: int) -> Samples:
        terms, digits = difficulty, self.digits
        digits_BTD = draws.below(10, (count, terms, digits))  # 0 to 9 are the first ten words
        sums = (digits_BTD @ 10 ** np.arange(digits)[::-1]).sum(axis=1)
        width = len(str(terms * (10**digits - 1)))
        answer_BW = sums[:, None] // 10 ** np.arange(width) % 10
        signs = np.full((count, terms, 1), _PLUS)
        signs[:, -1] = _EQUALS
        question = np.concatenate([digits_BTD, signs], axis=2).reshape(count, -1)
        tokens = _after(terms, np.concatenate([question, answer_BW], axis=1))
        targets = np.full_like(tokens, NONE)
        equals = question.shape[1]
        targets[:, equals : equals + digits] = answer_BW[:, :digits]
        return Samples(tokens, targets, np.zeros(count, dtype=np.int64))


@dataclass(frozen=True)
class Chains:
    """Variables that stand for others (arXiv 2409.19044; "variables" of 2512.08819): the depth, assignments, questions.

    ``12 c ;`` makes variable 12 the letter c, ``40 12 ;`` variable 40 what 12 is. Five roots have letters, all different; at depth d there are d
    levels of five aliases over them, in which each variable of the level below has one. Levels come in their order, assignments within one in any. Then each
    variable of the last level is asked, in any order: the target of ``40`` in ``? 40`` is its letter. So the answers of a sample are its five
    letters, each once: a guesser among the letters seen is right one time in five at every depth, and one who has
    not looked at them one time in 26. The answers are not in the text; after four of them the fifth would be known.

    What a variable is follows its name without a sign between, so that to answer at depth d is p-hop induction with p = d + 1 (the latest earlier place of a
    name that is read or asked is where it was assigned): what p-hop trains is what is needed here.
    """

    name: ClassVar[str] = "chains"
    lowest: ClassVar[int] = 0
    highest: ClassVar[int] = 8
    roots: ClassVar[int] = 5

    @property
    def key(self) -> str:
        return f"{self.name} 1"

    def check(self, difficulty: int) -> None:
        pass

    def draw(self, draws: Draws, difficulty: int, count: int) -> Samples:
        roots, levels = self.roots, difficulty + 1
        names_BLR = draws.orders((count,), len(NUMBERS))[:, : levels * roots].reshape(count, levels, roots)
        values_BR = draws.orders((count,), len(LETTERS))[:, :roots] + _A
        # alias r of a level stands for variable r of the level below, as names are in any order; what is shuffled is where that is said
        what_BLR = np.concatenate([values_BR[:, None], names_BLR[:, :-1]], axis=1)
        order_BLR = draws.orders((count, levels), roots)
        said = [np.take_along_axis(part, order_BLR, axis=2) for part in (names_BLR, what_BLR)]
        assigned = np.stack([*said, np.full_like(names_BLR, _STOP)], axis=3).reshape(count, -1)
        asked_BR = draws.orders((count,), roots)
        asked = np.take_along_axis(names_BLR[:, -1], asked_BR, axis=1)
        questions = np.stack([np.full_like(asked, _ASK), asked], axis=2).reshape(count, -1)
        tokens = _after(difficulty, np.concatenate([assigned, questions], axis=1))
        targets = np.full_like(tokens, NONE)
        targets[:, assigned.shape[1] + 2 :: 2] = np.take_along_axis(values_BR, asked_BR, axis=1)
        return Samples(tokens, targets, np.zeros(count, dtype=np.int64))


TASKS: dict[str, type[PHop] | type[Addition] | type[Chains]] = {task.name: task for task in (PHop, Addition, Chains)}
"""By the name that ``--task`` has for it."""


def _after(first: int, rest: Ints) -> Ints:
    """[B, 1 + S]: a column in front of others. A number's id is the number itself."""
    return np.concatenate([np.full((len(rest), 1), first), rest], axis=1)


def _within(option: str, value: int, lowest: int, highest: int, what: str) -> None:
    if not lowest <= value <= highest:
        raise MegaloopError(f"synthesize: {option} {value} is not possible; use {lowest} to {highest} {what}")
