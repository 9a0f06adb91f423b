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
    lines = [line for line in query.splitlines() if "=" in line]
    scope: dict[str, int] = {}
    for line in lines:
        node = ast.parse(line.strip()).body[0]
        assert isinstance(node, ast.Assign)
        assert isinstance(node.targets[0], ast.Name)
        value = node.value
        scope[node.targets[0].id] = int(value.value) if isinstance(value, ast.Constant) else scope[value.id]  # type: ignore
    asked = re.search(r"value of (\w)\?", query)
    assert asked is not None
    return str(scope[asked[1]])


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
    return query.splitlines()[0].removeprefix("List: ")


@every_task
def test_every_answer_is_right_and_alone(task: Task) -> None:
    for example in [*examples(task, 300, 4), *shots(task, 10, 4, 0)]:
        assert example.answer == f" {_solve(task, example.query)}\n"
        assert len(set(example.candidates)) == len(example.candidates) == 5


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
@pytest.mark.parametrize("count", [25, 1000])
def test_a_constant_guesser_scores_chance_exactly(task: Task, count: int) -> None:
    asked = examples(task, count, 0)
    assert Counter(example.correct for example in asked) == dict.fromkeys(range(5), count // 5)
    if not task.name.startswith("copy"):  # there the candidates have no order of their own
        for rank in range(5):
            right = sum(_numeric_rank(example, rank) == example.correct for example in asked)
            assert right == count // 5


def _likes(seed: int) -> Callable[[Example], int]:
    """Prefers some characters to others, as a model that has read some text and no question."""
    taste = random.Random(seed)
    value = {character: taste.random() for character in map(chr, range(128))}
    return lambda example: max(
        range(5), key=lambda i: sum(value[c] for c in example.candidates[i]) / len(example.candidates[i])
    )


def _shortest(example: Example) -> int:
    return min(range(5), key=lambda i: len(example.candidates[i]))


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
    assert task.header.strip() not in text
    query = examples(task, 1, 0)[0].query
    shapes = {re.sub(r"\d+", "0", re.sub(r"\b[a-z]\b", "x", line)) for line in query.splitlines() if line}
    trained = {re.sub(r"\d+", "0", re.sub(r"\b[a-z]\b", "x", line)) for line in text.splitlines()}
    assert not shapes & trained
    for phrase in ("numerical value", "value of", "Answer:", "Copy", "Sequence:", " + ", "After "):
        assert phrase not in text


def test_p_hop_by_hand() -> None:
    assert p_hop("abcab", 1) == "c"  # before the last b stands "ab", then c
    assert p_hop("abcabb", 1) == "b"
    assert p_hop("abac", 1) is None
    assert p_hop("xaybxazb", 1) == "x"
    assert p_hop("xaybxazb", 2) == "a"


def test_unknown_tasks_are_named() -> None:
    assert [task.name for task in tasks_named(["p-hop", "primitives"])][:2] == ["p-hop", "variables-0-math"]
    assert len(tasks_named([])) == len(TASKS)
    with pytest.raises(MegaloopError, match="unknown task 'p-hopp'; choose from variables-0-math"):
        tasks_named(["p-hopp"])
    assert BLOCK >= 25
