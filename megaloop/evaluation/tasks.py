"""Reasoning primitives: small questions that need no knowledge, only steps (arXiv 2502.17416, section 3.3 and appendix).

An example is a query with five candidate answers, one of which is right; a guesser scores 20%. Examples are a function of (task, seed,
number) on every machine. They are balanced: place and rank of the right answer among the candidates go through all
combinations, so that a guesser who always takes the same place, or always the smallest, is right in exactly a fifth of a
multiple of 25 examples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from megaloop.data.induction import p_hop
from megaloop.errors import MegaloopError
from megaloop.text import printable

__all__ = [
    "BLOCK",
    "CANDIDATES",
    "TASKS",
    "TASKS_VERSION",
    "Example",
    "Task",
    "examples",
    "shots",
    "tasks_named",
]

TASKS_VERSION = 2
"""Of the generators and prompts; results of different versions do not compare."""
CANDIDATES = 5
BLOCK = 50
"""So many examples share their shots; a prompt's shots are so run through the model once for all of them."""


@dataclass(frozen=True)
class Example:
    """A question.

    Attributes:
        query: the text up to where the answer begins.
        candidates: possible answers, each with the space before it and the line's end after it.
        correct: index of the right one.
    """

    query: str
    candidates: tuple[str, ...]
    correct: int

    @property
    def answer(self) -> str:
        return self.candidates[self.correct]


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: what ``--tasks`` calls it.
        title: what a report calls it.
        header: the text that a prompt begins with.
        make: an example of a number, with a random generator of its own; numbers balance.
    """

    name: str
    title: str
    header: str
    make: Callable[[random.Random, int], Example]

    @property
    def chance(self) -> float:
        return 1 / CANDIDATES


def examples(task: Task, count: int, seed: int) -> list[Example]:
    """The first ``count`` examples of a seed; more begin with those of fewer."""
    return [_make(task, seed, "examples", number) for number in range(count)]


def shots(task: Task, count: int, seed: int, block: int) -> list[Example]:
    """The solved examples that come before those of a block; more begin with those of fewer."""
    return [_make(task, seed, f"shots of {block}", number) for number in range(count)]


def _make(task: Task, seed: int, part: str, number: int) -> Example:
    cycle, place = divmod(number, CANDIDATES**2)  # each cycle goes through all combinations, in an order of its own
    slots = list(range(CANDIDATES**2))
    random.Random(f"{task.name}:{seed}:{part}:cycle {cycle}").shuffle(slots)
    return task.make(random.Random(f"{task.name}:{seed}:{part}:{number}"), slots[place])


def tasks_named(names: Sequence[str]) -> list[Task]:
    """Tasks by name; ``primitives`` or nothing: all.

    Raises:
        MegaloopError: an unknown name.
    """
    unknown = [name for name in names if name not in TASKS and name != "primitives"]
    if unknown:
        shown = printable(unknown[0])
        raise MegaloopError(
            f"eval: unknown task {shown!r}; choose from {', '.join(TASKS)}, or primitives for all; "
            f"tasks of EleutherAI's lm-eval go to --harness {shown}"
        )
    chosen = [task for name in names for task in (TASKS if name == "primitives" else [name])]
    return [TASKS[name] for name in dict.fromkeys(chosen or TASKS)]


# --- assignment of variables


def _variables(form: str, hops: int) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, slot: int) -> Example:
        rank, place = divmod(slot, CANDIDATES)
        values = sorted(rng.sample(range(1, 26), CANDIDATES))
        right = values.pop(rank)
        rng.shuffle(values)
        values.insert(place, right)
        names = rng.sample(ascii_lowercase, CANDIDATES * (1 + hops))
        lines = [(name, str(value)) for name, value in zip(names, values, strict=False)]
        asked = names[place]
        for hop in range(hops):
            targets = names[CANDIDATES * hop : CANDIDATES * (hop + 1)]
            aliases = dict(zip(targets, names[CANDIDATES * (hop + 1) :], strict=False))
            lines += rng.sample([(alias, target) for target, alias in aliases.items()], CANDIDATES)
            asked = aliases[asked]
        candidates = tuple(f" {value}\n" for value in values)
        return Example(_FORMS[form](lines, asked), candidates, place)

    return make


def _math(lines: list[tuple[str, str]], asked: str) -> str:
    body = "".join(f"{name}={value}\n" for name, value in lines)
    return f"{body}What is the numerical value of {asked}?\nAnswer:"


def _code(lines: list[tuple[str, str]], asked: str) -> str:
    body = "".join(f"{name} = {value}\n" for name, value in lines)
    return f"Program:\n{body}\nQuestion:\nWhat is the value of {asked}?\nAnswer:"


_FORMS = {"math": _math, "code": _code}
_HEADERS = {
    "math": "The following is a set of simple mathematical equations.\n\n",
    "code": "The following is a very short Python program. Use the program to resolve the value of the variable in the question.\n\n",
}


# --- copying

_WORD_LIST = (
    "apple arm baby bag ball bank basket bear bed bell bird boat bone book bottle box bread bridge brother bucket cake camp candle car cat "
    "chair cheese child church circle city clock cloud coat corn cow cup dance desk dog door dress drum duck ear earth egg eye face farm "
    "father feather field finger fire fish flag floor flower foot forest fork friend frog game garden gate glass glove gold grass ground "
    "guitar hair hammer hand hat heart hill horse house ice island jar kettle key king kitchen knife lake lamp leaf leg letter lion lock "
    "map market milk mirror money moon mother mountain mouse mouth nail needle nest night nose ocean onion orange oven page paint paper "
    "pen pencil piano picture pig pipe plate pocket pond potato queen rabbit rain ring river road rock roof root rope rose sail salt sand "
    "school sea seed sheep shelf ship shoe shop sister snow soap sock song soup spoon spring square star stone storm street sugar summer "
    "sun table tail tent thumb tiger tooth tower town train tree truck village wagon wall watch water wheel wind window winter wolf wood"
)
_WORDS = _WORD_LIST.split()


def _copying(random_strings: bool) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, slot: int) -> Example:
        if random_strings:
            words = ["".join(rng.choices(ascii_lowercase, k=4)) for _ in range(CANDIDATES)]
        else:
            words = rng.sample(_WORDS, CANDIDATES)
        text, place = " ".join(words), slot % CANDIDATES
        orders = [text]
        while len(orders) < CANDIDATES:
            other = " ".join(rng.sample(words, CANDIDATES))
            if other not in orders:
                orders.append(other)
        orders.insert(place, orders.pop(0))
        return Example(f"List: {text}\nCopy:", tuple(f" {order}\n" for order in orders), place)

    return make


# --- n-ary addition


def _addition(terms: int) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, slot: int) -> Example:
        rank, place = divmod(slot, CANDIDATES)
        numbers = [rng.randint(15, 60) for _ in range(terms)]
        total, gaps = sum(numbers), rng.choices((1, 2, 3, 7, 9, 10), k=CANDIDATES - 1)
        # a ladder of sums that says nothing of which rung is right: errors around the sum would single it out
        ladder = [sum(gaps[:rung]) for rung in range(CANDIDATES)]
        wrong = [total + step - ladder[rank] for step in ladder if step != ladder[rank]]
        rng.shuffle(wrong)
        wrong.insert(place, total)
        return Example(f"{' + '.join(map(str, numbers))} =", tuple(f" {number}\n" for number in wrong), place)

    return make


# --- p-hop induction


def _hopping(hops: int, length: int) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, slot: int) -> Example:
        rank, place = divmod(slot, CANDIDATES)
        letters = sorted(rng.sample(ascii_lowercase, CANDIDATES))
        right = letters[rank]
        others = [letter for letter in letters if letter != right]
        rng.shuffle(others)
        others.insert(place, right)
        while (
            True
        ):  # one sequence in seven will do; a walk back to the letter it began with would favour frequent letters
            sequence = rng.choices(letters, k=length)
            if sequence[-1] != right and set(sequence) == set(letters) and p_hop(sequence, hops) == right:
                break
        query = f"Sequence: {' '.join(sequence)}\nAfter {hops} hops:"
        return Example(query, tuple(f" {letter}\n" for letter in others), place)

    return make


TASKS = {
    task.name: task
    for task in (
        *(
            Task(f"variables-{hops}-{form}", f"variables, depth {hops}, {form}", _HEADERS[form], _variables(form, hops))
            for hops in (0, 1)
            for form in ("math", "code")
        ),
        Task("copy-words", "copying real words", "Copy each list.\n\n", _copying(False)),
        Task("copy-random", "copying random strings", "Copy each list.\n\n", _copying(True)),
        Task("addition", "addition of three numbers", "Add the numbers.\n\n", _addition(3)),
        Task(
            "p-hop",
            "2-hop induction",
            "Go back to where the last letter stood before, and take the letter after it; do the same from there.\n\n",
            _hopping(2, 16),
        ),
    )
}
"""The tasks by name."""
