"""Reasoning primitives: right by a solver of their own, the same for a seed, balanced, and not what is trained on."""

from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from data_prep.synthetic import KINDS, documents
from megaloop.data.induction import p_hop
from megaloop.errors import MegaloopError
from megaloop.evaluation.tasks import BLOCK, TASKS, Example, Task, examples, shots, tasks_named

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def _solve_variables(query: str) -> str:
    """By running the assignments as the Python that they are."""
    lines = [line for line in query.splitlines() if "=" in line and "___" not in line]
    scope: dict[str, int] = {}
    for line in lines:
        node = ast.parse(line.strip()).body[0]
        assert isinstance(node, ast.Assign)
        assert isinstance(node.targets[0], ast.Name)
        value = node.value
        scope[node.targets[0].id] = int(value.value) if isinstance(value, ast.Constant) else scope[value.id]  # type: ignore
    asked = re.search(r"value of (\w)\?|^(\w)=___", query, flags=re.M)
    assert asked is not None
    assert len(scope) == len(lines)  # no variable gets two values
    assert (asked[1] or asked[2]) in list(scope)[-5:]  # one of the last level
    return str(scope[asked[1] or asked[2]])


def _solve_copying(query: str) -> str:
    """By looking for the place in the list where the words before the blank stand."""
    header, line, last = query.split("\n")
    assert (header, last) == ("Fill in the blank:", "Answer:")
    words = line.removesuffix(" ___. ->").split(" ")
    listed, again = words[:10], words[10:]
    assert (len(set(listed)), len(again)) == (10, 5)
    (start,) = (place for place in range(5) if listed[place : place + 5] == again)
    return listed[start + 5]


def _solve_hops(query: str) -> str:
    """By walking a text, with rindex."""
    sequence = query.splitlines()[0].removeprefix("Sequence: ").replace(" ", "")
    at = len(sequence) - 1
    for _ in range(2):
        at = sequence[:at].rindex(sequence[at]) + 1
    return sequence[at]


def _solve(task: Task, query: str) -> str:
    if task.name.startswith("variables"):
        return _solve_variables(query)
    if task.name == "addition":
        return str(sum(int(item) for item in query.removesuffix(" =").split(" + ")))
    if task.name == "p-hop":
        return _solve_hops(query)
    return _solve_copying(query)


@every_task
def test_every_answer_is_right_and_alone(task: Task) -> None:
    for example in [*examples(task, 300, 4), *shots(task, 10, 4, 0)]:
        assert example.answer == f"{_solve(task, example.query)}\n"
        assert len(set(example.candidates)) == len(example.candidates) == task.candidates


@pytest.mark.parametrize("name", ["copy-random", "copy-real"])
def test_the_candidates_of_copying_are_the_words_of_the_list(name: str) -> None:
    for example in examples(TASKS[name], 200, 4):
        words = example.query.split("\n")[1].split(" ")[:10]
        assert sorted(example.candidates) == sorted(f"{word}\n" for word in words)
        if name == "copy-random":
            assert all(re.fullmatch(r"[a-z]{3}", word) for word in words)


@every_task
def test_examples_are_a_function_of_seed_and_number(task: Task) -> None:
    few, many = examples(task, 40, 7), examples(task, 80, 7)
    assert many[:40] == few
    assert examples(task, 40, 8) != few
    assert len({example.query for example in many}) > 70
    assert shots(task, 2, 7, 3) == shots(task, 10, 7, 3)[:2]
    assert shots(task, 2, 7, 3) != shots(task, 2, 7, 4)
    assert not set(few) & set(shots(task, 10, 7, 0))


def test_examples_are_the_same_in_another_process() -> None:
    """String hashing, which differs between processes, plays no part."""
    code = "from megaloop.evaluation.tasks import *\nprint([examples(task, 30, 0) for task in TASKS.values()])"
    command = [sys.executable, "-c", code]
    texts = [
        subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1] == str([examples(task, 30, 0) for task in TASKS.values()]) + "\n"


def _numeric_rank(example: Example, rank: int) -> int:
    values = sorted(example.candidates, key=lambda candidate: (len(candidate), candidate))
    return example.candidates.index(values[rank])


@every_task
@pytest.mark.parametrize("cycles", [1, 20])
def test_a_constant_guesser_scores_chance_exactly(task: Task, cycles: int) -> None:
    count = cycles * task.slots
    asked = examples(task, count, 0)
    each = count // task.candidates
    assert Counter(example.correct for example in asked) == dict.fromkeys(range(task.candidates), each)
    if task.name.startswith(
        "copy"
    ):  # there the candidates have no order of their own; the segment begins at five places
        starts = Counter(_solve_start(example.query) for example in asked)
        assert starts == dict.fromkeys(range(5), count // 5)
        return
    for rank in range(task.candidates):
        right = sum(_numeric_rank(example, rank) == example.correct for example in asked)
        assert right == each


def _solve_start(query: str) -> int:
    words = query.split("\n")[1].split(" ")
    return words.index(words[10])


def _likes(seed: int) -> Callable[[Example], int]:
    """Prefers some characters to others, as a model that has read some text and no question."""
    taste = random.Random(seed)
    value = {character: taste.random() for character in map(chr, range(128))}
    return lambda example: max(
        range(len(example.candidates)),
        key=lambda i: sum(value[c] for c in example.candidates[i]) / len(example.candidates[i]),
    )


def _shortest(example: Example) -> int:
    return min(range(len(example.candidates)), key=lambda i: len(example.candidates[i]))


@every_task
def test_guessers_that_look_at_the_candidates_alone_score_about_chance(task: Task) -> None:
    asked = examples(task, 4000, 1)
    for guess in (_likes(0), _likes(1), _likes(2), _shortest):
        right = sum(guess(example) == example.correct for example in asked) / len(asked)
        assert right == pytest.approx(task.chance, abs=0.025)  # four standard errors


def _most_frequent(example: Example) -> int:
    letters = example.query.splitlines()[0].split()
    return max(range(5), key=lambda i: letters.count(example.candidates[i].strip()))


def test_counting_letters_does_not_solve_p_hop() -> None:
    asked = examples(TASKS["p-hop"], 4000, 1)
    assert sum(_most_frequent(example) == example.correct for example in asked) / len(asked) < 0.24


@every_task
def test_no_training_text_holds_a_template_of_the_evaluation(task: Task) -> None:
    """Not its sentences, and not the shape of its lines."""
    text = "\n".join(
        problem.prompt + problem.answer for _, series in documents(list(KINDS), 3000, 0) for problem in series
    )
    assert not task.header or task.header.strip() not in text
    query = examples(task, 1, 0)[0].query
    shapes = {re.sub(r"\d+", "0", re.sub(r"\b[a-z]\b", "x", line)) for line in query.splitlines() if line}
    trained = {re.sub(r"\d+", "0", re.sub(r"\b[a-z]\b", "x", line)) for line in text.splitlines()}
    assert not shapes & trained
    for phrase in ("numerical value", "value of", "Answer:", "Fill in", "___", "Sequence:", " + ", "After "):
        assert phrase not in text


def test_p_hop_by_hand() -> None:
    assert p_hop("abcab", 1) == "c"  # before the last b stands "ab", then c
    assert p_hop("abcabb", 1) == "b"
    assert p_hop("abac", 1) is None
    assert p_hop("xaybxazb", 1) == "x"
    assert p_hop("xaybxazb", 2) == "a"


def test_unknown_tasks_are_named() -> None:
    assert [task.name for task in tasks_named(["p-hop", "primitives"])][:2] == ["p-hop", "copy-random"]
    assert len(tasks_named([])) == len(TASKS)
    with pytest.raises(MegaloopError, match="unknown task 'p-hopp'; choose from copy-random"):
        tasks_named(["p-hopp"])
    with pytest.raises(MegaloopError, match="task copy-words is now called copy-real"):
        tasks_named(["copy-words"])
    assert all(task.slots <= BLOCK for task in TASKS.values())


PAPER = {
    "copy-random": """\
Fill in the blank:
jic dqy sof uzg ewr oxw osp tkj rvw mnu jic dqy sof uzg ewr ___. ->
Answer:
oxw""",
    "variables-1-basic": """\
Fill in blank:
o=2
k=23
t=13
a=1
e=9
v=k
c=e
s=o
y=t
r=a
y=___. ->
Answer:
13""",
}
"""The papers' own samples (arXiv 2512.08819)."""


def _shape(text: str) -> str:
    """Words, variables and values numbered in the order of their first appearance; everything else as it is."""
    names: dict[str, str] = {}
    pattern = r"\b[a-z]\b|\b\d+\b" if "=" in text else r"\b(?!the\b)[a-z]{3}\b"
    return re.sub(pattern, lambda found: names.setdefault(found[0], f"<{len(names)}>"), text)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_samples_are_among_our_examples_but_for_names_and_values(name: str) -> None:
    task = TASKS[name]
    texts = {
        task.prompt([], example) + task.delimiter + example.answer.removesuffix("\n")
        for example in examples(task, 5000, 0)
    }
    assert _shape(PAPER[name]) in {_shape(text) for text in texts}


SAMPLES = {
    "copy-random": """\
Fill in the blank:
vzi pyu rur cfk aiv kvi xep pdr jhz dxh aiv kvi xep pdr jhz ___. ->
Answer:
dxh

Fill in the blank:
muj qfb xzj nxj cym rwj wil rbe oed fas xzj nxj cym rwj wil ___. ->
Answer:
rbe
""",
    "copy-real": """\
Fill in the blank:
water knife bank ball arm river apple hair cloud pen ball arm river apple hair ___. ->
Answer:
cloud

Fill in the blank:
sugar window summer truck lock forest oven heart kettle sea summer truck lock forest oven ___. ->
Answer:
heart
""",
    "variables-0-basic": """\
Fill in blank:
a=15
y=3
l=1
u=8
q=9
u=___. ->
Answer:
8

Fill in blank:
o=15
q=19
a=14
m=22
z=24
z=___. ->
Answer:
24
""",
    "variables-1-math": """\
The following is a set of simple mathematical equations.

z=6
d=8
p=4
l=25
i=13
e=z
c=l
t=i
r=p
w=d
What is the numerical value of c?
Answer: 25

v=9
k=10
p=23
b=2
c=16
d=v
m=b
a=p
q=k
w=c
What is the numerical value of d?
Answer: 9
""",
    "variables-1-code": """\
The following is a very short Python program. Use the program to resolve the value of the variable in the question.

Program:
h = 15
u = 14
g = 4
x = 17
n = 5
t = x
l = n
a = u
q = g
i = h

Question:
What is the value of a?
Answer: 14

Program:
p = 12
t = 19
z = 4
f = 16
e = 17
s = e
m = z
w = p
j = f
k = t

Question:
What is the value of s?
Answer: 17
""",
    "addition": """\
Add the numbers.

60 + 58 + 54 = 172

45 + 20 + 26 = 91
""",
    "p-hop": """\
Go back to where the last letter stood before, and take the letter after it; do the same from there.

Sequence: z l a j b l z l b b l j a z b z
After 2 hops: l

Sequence: x k k y y w j w x j x y j x k x
After 2 hops: y
""",
}
"""A prompt with one shot, and its right answer, of seed 0."""


@pytest.mark.parametrize("name", SAMPLES)
def test_prompts_are_these_to_the_letter(name: str) -> None:
    """A change of one of them is a new ``TASKS_VERSION``."""
    task = TASKS[name]
    example = examples(task, 1, 0)[0]
    assert task.prompt(shots(task, 1, 0, 0), example) + task.delimiter + example.answer == SAMPLES[name]


def test_a_value_that_begins_as_another_is_common_enough_to_matter() -> None:
    """Without the end of the line, ``2`` would always be likelier than ``22`` where digits are tokens: in one question of nine."""
    asked = examples(TASKS["variables-0-basic"], 5000, 0)
    begun = [
        any(example.answer.startswith(other.rstrip()) and other != example.answer for other in example.candidates)
        for example in asked
    ]
    assert sum(begun) / len(begun) == pytest.approx(16 / 25 * 4 / 24, abs=0.02)
