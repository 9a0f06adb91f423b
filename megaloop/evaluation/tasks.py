"""Reasoning primitives: small questions that need no knowledge, only steps.

The texts are those of arXiv 2409.19044, 2512.08819 and 2602.16490: copying (fill in the blank) and assignment of variables
(basic, math, code). Addition and p-hop induction are our questions for what arXiv 2502.17416 trains on.

An example is a query with ten (copying) or five candidate answers, one of which is right. Examples are a function of (task,
seed, number) on every machine. They are balanced: they go through all combinations of the place of the right answer among
the candidates and of its rank (where candidates have a natural order) or of the place where the copied segment begins. A guesser
who always takes the same place, or always the smallest, is so right in exactly a tenth, or a fifth, of a multiple of
``Task.slots`` examples.
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
    "RENAMED",
    "TASKS",
    "TASKS_VERSION",
    "Example",
    "Task",
    "examples",
    "shots",
    "tasks_named",
]

TASKS_VERSION = 3
"""Of the generators and prompts, and of how they are turned into tokens; results of different versions do not compare."""
BLOCK = 50
"""So many examples share their shots; a prompt's shots are so run through the model once for all of them."""
_CHOICES = 5
"""Candidates where a task has no other number, and variables of each level."""


@dataclass(frozen=True)
class Example:
    """A question.

    Attributes:
        query: the text up to where the answer, or the delimiter before it, begins.
        candidates: possible answers, each with the end of its line: ``2`` must not profit from being how ``22`` begins.
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
        header: the text that a prompt begins with, once, before the shots.
        delimiter: what stands between a query and its answer.
        make: an example of a slot, with a random generator of its own.
        candidates: answers to choose from.
        slots: combinations that balance; each is made once in so many examples.
    """

    name: str
    title: str
    header: str
    delimiter: str
    make: Callable[[random.Random, int], Example]
    candidates: int = _CHOICES
    slots: int = _CHOICES**2

    @property
    def chance(self) -> float:
        """Share of right answers of a guesser."""
        return 1 / self.candidates

    def prompt(self, solved: Sequence[Example], example: Example) -> str:
        """The whole text before the delimiter and the answer, as lm-eval joins it: a blank line after each shot."""
        before = "".join(f"{shot.query}{self.delimiter}{shot.answer}\n" for shot in solved)
        return f"{self.header}{before}{example.query}"


def examples(task: Task, count: int, seed: int) -> list[Example]:
    """The first ``count`` examples of a seed; more begin with those of fewer."""
    return [_make(task, seed, "examples", number) for number in range(count)]


def shots(task: Task, count: int, seed: int, block: int) -> list[Example]:
    """The solved examples that come before those of a block; more begin with those of fewer."""
    return [_make(task, seed, f"shots of {block}", number) for number in range(count)]


def _make(task: Task, seed: int, part: str, number: int) -> Example:
    cycle, place = divmod(number, task.slots)  # each cycle goes through all combinations, in an order of its own
    slots = list(range(task.slots))
    random.Random(f"{task.name}:{seed}:{part}:cycle {cycle}").shuffle(slots)
    return task.make(random.Random(f"{task.name}:{seed}:{part}:{number}"), slots[place])


def tasks_named(names: Sequence[str]) -> list[Task]:
    """Tasks by name; ``primitives`` or nothing: all.

    Raises:
        MegaloopError: an unknown name.
    """
    unknown = [name for name in names if name not in TASKS and name != "primitives"]
    if unknown:
        if unknown[0] in RENAMED:
            raise MegaloopError(
                f"--tasks: task {unknown[0]} is now called {RENAMED[unknown[0]]}, and asks another question"
            )
        shown = printable(unknown[0])
        raise MegaloopError(
            f"--tasks: unknown task {shown!r}; choose from {', '.join(TASKS)}, or primitives for all; "
            f"tasks of EleutherAI's lm-eval go to megaloop eval --harness {shown}"
        )
    chosen = [task for name in names for task in (TASKS if name == "primitives" else [name])]
    return [TASKS[name] for name in dict.fromkeys(chosen or TASKS)]


# --- assignment of variables


def _variables(form: str, hops: int) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, slot: int) -> Example:
        rank, place = divmod(slot, _CHOICES)
        values = sorted(rng.sample(range(1, 26), _CHOICES))
        right = values.pop(rank)
        rng.shuffle(values)
        values.insert(place, right)
        names = rng.sample(ascii_lowercase, _CHOICES * (1 + hops))
        lines = [(name, str(value)) for name, value in zip(names, values, strict=False)]
        asked = names[place]
        for hop in range(hops):
            targets = names[_CHOICES * hop : _CHOICES * (hop + 1)]
            aliases = dict(zip(targets, names[_CHOICES * (hop + 1) :], strict=False))
            lines += rng.sample([(alias, target) for target, alias in aliases.items()], _CHOICES)
            asked = aliases[asked]
        candidates = tuple(f"{value}\n" for value in values)
        return Example(_FORMS[form](lines, asked), candidates, place)

    return make


def _basic(lines: list[tuple[str, str]], asked: str) -> str:
    body = "".join(f"{name}={value}\n" for name, value in lines)
    return f"Fill in blank:\n{body}{asked}=___. ->\nAnswer:"


def _math(lines: list[tuple[str, str]], asked: str) -> str:
    body = "".join(f"{name}={value}\n" for name, value in lines)
    return f"{body}What is the numerical value of {asked}?\nAnswer:"


def _code(lines: list[tuple[str, str]], asked: str) -> str:
    body = "".join(f"{name} = {value}\n" for name, value in lines)
    return f"Program:\n{body}\nQuestion:\nWhat is the value of {asked}?\nAnswer:"


_FORMS = {"basic": _basic, "math": _math, "code": _code}
_DELIMITERS = {"basic": "\n", "math": " ", "code": " "}
_HEADERS = {
    "basic": "",
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


_LISTED, _REPEATED = 10, 5
"""Words of a list, which are also the candidates, and those of the segment that stands once more."""
_STARTS = _LISTED - _REPEATED
"""Places where the segment can begin so that a word follows it in the list."""


def _random_words(rng: random.Random) -> list[str]:
    """Distinct words of three letters."""
    drawn = rng.sample(range(26**3), _LISTED)
    return ["".join(ascii_lowercase[number // 26**place % 26] for place in (2, 1, 0)) for number in drawn]


def _real_words(rng: random.Random) -> list[str]:
    return rng.sample(_WORDS, _LISTED)


def _copying(draw: Callable[[random.Random], list[str]]) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, slot: int) -> Example:
        start, place = divmod(slot, _LISTED)
        words = draw(rng)
        again, right = words[start : start + _REPEATED], words[start + _REPEATED]
        candidates = [word for word in words if word != right]
        rng.shuffle(candidates)
        candidates.insert(place, right)
        query = f"Fill in the blank:\n{' '.join([*words, *again])} ___. ->\nAnswer:"
        return Example(query, tuple(f"{word}\n" for word in candidates), place)

    return make


# --- n-ary addition


def _addition(terms: int) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, slot: int) -> Example:
        rank, place = divmod(slot, _CHOICES)
        numbers = [rng.randint(15, 60) for _ in range(terms)]
        total, gaps = sum(numbers), rng.choices((1, 2, 3, 7, 9, 10), k=_CHOICES - 1)
        # a ladder of sums that says nothing of which rung is right: errors around the sum would single it out
        ladder = [sum(gaps[:rung]) for rung in range(_CHOICES)]
        wrong = [total + step - ladder[rank] for step in ladder if step != ladder[rank]]
        rng.shuffle(wrong)
        wrong.insert(place, total)
        return Example(f"{' + '.join(map(str, numbers))} =", tuple(f"{number}\n" for number in wrong), place)

    return make


# --- p-hop induction


def _hopping(hops: int, length: int) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, slot: int) -> Example:
        rank, place = divmod(slot, _CHOICES)
        letters = sorted(rng.sample(ascii_lowercase, _CHOICES))
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
        return Example(query, tuple(f"{letter}\n" for letter in others), place)

    return make


TASKS = {
    task.name: task
    for task in (
        *(
            Task(name, title, "", "\n", _copying(draw), _LISTED, _STARTS * _LISTED)
            for name, title, draw in (
                ("copy-random", "copying random words", _random_words),
                ("copy-real", "copying real words", _real_words),
            )
        ),
        *(
            Task(
                f"variables-{hops}-{form}",
                f"variables, depth {hops}, {form}",
                _HEADERS[form],
                _DELIMITERS[form],
                _variables(form, hops),
            )
            for form in _FORMS
            for hops in (0, 1, 2)
        ),
        Task("addition", "addition of three numbers", "Add the numbers.\n\n", " ", _addition(3)),
        Task(
            "p-hop",
            "2-hop induction",
            "Go back to where the last letter stood before, and take the letter after it; do the same from there.\n\n",
            " ",
            _hopping(2, 16),
        ),
    )
}
"""The tasks by name."""
RENAMED = {"copy-words": "copy-real"}
"""Names of earlier versions, which evaluations may still hold, and what comes nearest to them."""
