"""Text that asks for reasoning: word problems, n-ary addition, p-hop induction, assignment of variables.

The synthetic tasks of "Reasoning with Latent Thoughts" (arXiv 2502.17416, section 3) as training text, in several surface
forms each. None of them is a form in which :mod:`megaloop.evaluation` asks, so that what a model learns here it has to carry
over. A document is a series of problems of one kind and form with their answers. Problem n of a seed is a function of both, whatever
the machine and the number of documents.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import BinaryIO

from megaloop.data.induction import p_hop
from megaloop.errors import MegaloopError
from megaloop.files import replacing
from megaloop.text import printable

__all__ = ["KINDS", "Problem", "Written", "documents", "write_jsonl", "writing"]

SERIES = (4, 12)
"""A document holds this many problems, at least and at most."""


@dataclass(frozen=True)
class Problem:
    """A problem: the answer follows the prompt without a space between."""

    prompt: str
    answer: str


Maker = Callable[[random.Random], Problem]


# --- assignment of variables


def _assignments(rng: random.Random) -> tuple[list[tuple[str, str]], str, int]:
    """[(name, number or other name)], the name that is asked, its value; each of up to two hops."""
    count, hops = rng.randint(3, 6), rng.choice((0, 1, 1, 2))
    names = rng.sample(ascii_lowercase, count * (hops + 1))
    values = rng.sample(range(1, 100), count)
    asked = rng.randrange(count)
    level = names[:count]
    lines = list(zip(level, map(str, values), strict=True))
    for hop in range(hops):
        names_here = names[count * (hop + 1) : count * (hop + 2)]
        lines += rng.sample(list(zip(names_here, level, strict=True)), count)
        level = names_here
    return lines, level[asked], values[asked]


def _let(rng: random.Random) -> Problem:
    lines, asked, value = _assignments(rng)
    return Problem("\n".join(f"let {a} be {b}" for a, b in lines) + f"\nso {asked} is", f" {value}")


def _arrow(rng: random.Random) -> Problem:
    lines, asked, value = _assignments(rng)
    return Problem("; ".join(f"{a} <- {b}" for a, b in lines) + f" | {asked} ?", f" {value}")


def _shell(rng: random.Random) -> Problem:
    lines, asked, value = _assignments(rng)
    text = "\n".join(f"set {a} {b if b.isdigit() else '$' + b}" for a, b in lines)
    return Problem(f"{text}\necho ${asked}\n", str(value))


def _boxes(rng: random.Random) -> Problem:
    lines, asked, value = _assignments(rng)
    text = " ".join(f"Box {a} holds {b if b.isdigit() else 'as much as box ' + b}." for a, b in lines)
    return Problem(f"{text} How much does box {asked} hold?", f" {value}.")


# --- n-ary addition


def _summands(rng: random.Random) -> tuple[list[int], int]:
    numbers = [rng.randint(1, 10 ** rng.choice((1, 2, 2)) - 1) for _ in range(rng.randint(2, 5))]
    return numbers, sum(numbers)


def _plus(rng: random.Random) -> Problem:
    numbers, total = _summands(rng)
    return Problem(" plus ".join(map(str, numbers)) + " makes", f" {total}")


def _add(rng: random.Random) -> Problem:
    numbers, total = _summands(rng)
    return Problem(f"Add {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}:", f" {total}")


def _call(rng: random.Random) -> Problem:
    numbers, total = _summands(rng)
    return Problem(f"sum({', '.join(map(str, numbers))}) ->", f" {total}")


def _running(rng: random.Random) -> Problem:
    """The way there as well: running totals."""
    numbers, total = _summands(rng)
    steps = [str(sum(numbers[: count + 1])) for count in range(len(numbers))]
    return Problem(f"total of {' '.join(map(str, numbers))}:", f" {' '.join(steps)}, so {total}")


# --- p-hop induction


def _sequence(rng: random.Random, longest: int = 3) -> tuple[list[str], int, str]:
    while True:
        alphabet = rng.sample(ascii_lowercase, rng.randint(3, 6))
        sequence = [rng.choice(alphabet) for _ in range(rng.randint(12, 24))]
        hops = rng.randint(1, longest)
        answer = p_hop(sequence, hops)
        if answer is not None:
            return sequence, hops, answer


def _hops(rng: random.Random) -> Problem:
    sequence, hops, answer = _sequence(rng)
    return Problem(f"{' '.join(sequence)} / {hops} /", f" {answer}")


def _back(rng: random.Random) -> Problem:
    sequence, hops, answer = _sequence(rng)
    return Problem(f"Walk {hops} through {''.join(sequence)}:", f" {answer}")


def _arrows(rng: random.Random) -> Problem:
    """The way there as well: each symbol that a hop reaches."""
    sequence, hops, _ = _sequence(rng)
    reached = [str(p_hop(sequence, count)) for count in range(1, hops + 1)]
    return Problem(f"({', '.join(sequence)}) {hops} times", f" > {' > '.join(reached)}")


# --- word problems

_NAMES = "Anna Ben Carla David Emma Felix Grace Henry Irene Jacob Kate Leo Maria Noah Olga Peter Rosa Simon Tina Viktor"
_PEOPLE = _NAMES.split()
_THING_LIST = "apples books coins cards eggs flowers marbles nuts pears pencils plates shells stamps stones toys"
_THINGS = _THING_LIST.split()


def _story(rng: random.Random) -> tuple[list[str], str, str, int]:
    """Sentences in an order in which each follows from those before; the person asked for, the thing, how many."""
    people = rng.sample(_PEOPLE, rng.randint(2, 5))
    thing = rng.choice(_THINGS)
    have = {people[0]: rng.randint(2, 30)}
    sentences = [f"{people[0]} has {have[people[0]]} {thing}."]
    for person in people[1:]:
        other, number = rng.choice(list(have)), rng.randint(1, 12)
        kinds = ["more", "sum"] if have[other] <= number else ["more", "fewer", "sum"]
        kind = rng.choice(kinds + ["times"] * (have[other] <= 40))
        if kind == "more":
            have[person] = have[other] + number
            sentences.append(f"{person} has {number} more than {other}.")
        elif kind == "fewer":
            have[person] = have[other] - number
            sentences.append(f"{person} has {number} fewer than {other}.")
        elif kind == "times":
            factor = rng.randint(2, 3)
            have[person] = have[other] * factor
            sentences.append(f"{person} has {'twice' if factor == 2 else 'three times'} as many as {other}.")
        else:
            third = rng.choice(list(have))
            have[person] = have[other] + have[third]
            sentences.append(
                f"{person} has as many as {other} and {third} together."
                if other != third
                else f"{person} has twice as many as {other}."
            )
    asked = rng.choice(people[1:])
    return sentences, asked, thing, have[asked]


def _ordered(rng: random.Random) -> Problem:
    sentences, asked, thing, number = _story(rng)
    return Problem(f"{' '.join(sentences)} How many {thing} does {asked} have?", f" {number}.")


def _shuffled(rng: random.Random) -> Problem:
    sentences, asked, thing, number = _story(rng)
    rng.shuffle(sentences)
    return Problem(f"Q: {' '.join(sentences)} How many {thing} are {asked}'s? A:", f" {number}")


def _count(rng: random.Random) -> Problem:
    sentences, asked, thing, number = _story(rng)
    return Problem(f"{' '.join(sentences)} So the {thing} of {asked} are", f" {number} in number.")


KINDS: dict[str, tuple[Maker, ...]] = {
    "words": (_ordered, _shuffled, _count),
    "addition": (_plus, _add, _call, _running),
    "hops": (_hops, _back, _arrows),
    "variables": (_let, _arrow, _shell, _boxes),
}
"""The surface forms of each kind of problem."""


def documents(kinds: Sequence[str], count: int, seed: int) -> Iterator[tuple[str, list[Problem]]]:
    """(kind, problems of one form) of each document; kinds take turns.

    Raises:
        MegaloopError: an unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise MegaloopError(
            f"synthesize: unknown kind {printable(', '.join(unknown)) or '(none)'}; choose from {', '.join(KINDS)}"
        )
    for number in range(count):
        kind = kinds[number % len(kinds)]
        rng = random.Random(f"{seed}:{kind}:{number}")  # of text: the same on every machine
        maker = rng.choice(KINDS[kind])
        yield kind, [maker(rng) for _ in range(rng.randint(*SERIES))]


@dataclass(frozen=True)
class Written:
    """What was written: documents (lines), problems, and bytes of the file."""

    documents: int
    problems: int
    bytes: int


def write_jsonl(
    out: Path,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    count: int,
    seed: int = 0,
    pairs: bool = False,
    on_document: Callable[[int], None] | None = None,
) -> Written:
    """Write documents as lines of JSON, atomically.

    Args:
        count: documents.
        pairs: a line for each problem, with ``prompt`` and ``answer``, for fine-tuning; otherwise one for each document,
            with ``text``.
        on_document: called with the documents written so far.

    Raises:
        MegaloopError: an unknown kind, or a file that cannot be written.
    """
    made = documents(kinds, count, seed)
    problems = 0
    with writing(out) as file:
        for number, (kind, series) in enumerate(made, start=1):
            problems += len(series)
            if pairs:
                lines = [{"kind": kind, "prompt": entry.prompt, "answer": entry.answer} for entry in series]
            else:
                lines = [{"kind": kind, "text": "\n".join(entry.prompt + entry.answer for entry in series)}]
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            if on_document is not None:
                on_document(number)
        size = file.tell()
    return Written(count, problems, size)


@contextmanager
def writing(out: Path) -> Iterator[BinaryIO]:
    """A new file that takes its name once it is complete (see :func:`megaloop.files.replacing`), in a directory that is made.

    Raises:
        MegaloopError: it cannot be written.
    """
    if not out.name:
        raise MegaloopError(f"synthesize: {out} is a directory; name a file to write")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            yield file
    except OSError as error:
        raise MegaloopError(f"synthesize: cannot write {out} ({error.strerror})") from None
