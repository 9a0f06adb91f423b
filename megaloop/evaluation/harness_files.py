"""Our primitives as task files for EleutherAI's lm-eval, which then asks any model the very same questions.

A task with a number of shots is a YAML and a file of questions. The shots are part of each question's text, because ours go with
blocks of questions, and lm-eval would draw others. lm-eval reads the files without executing anything of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megaloop.errors import MegaloopError
from megaloop.evaluation.tasks import BLOCK, TASKS_VERSION, Task, examples, shots
from megaloop.files import replacing

__all__ = ["harness_tag", "harness_task", "write_harness_files"]


def harness_task(task: str, count: int) -> str:
    """What lm-eval calls a task with so many shots."""
    return f"megaloop-{task}-{count}shot"


def harness_tag(count: int) -> str:
    """What lm-eval calls all tasks with so many shots."""
    return f"megaloop-{count}shot"


def write_harness_files(
    directory: Path, tasks: Sequence[Task], counts: Sequence[int], *, count: int, seed: int
) -> list[str]:
    """Write the questions that :func:`megaloop.evaluation.evaluate.evaluate` asks, for ``lm_eval --include_path DIRECTORY``.

    Args:
        directory: made where it is missing. Its absolute path goes into the files, since lm-eval takes a relative one from
            wherever it is started.
        counts: numbers of shots.
        count: questions of each task.

    Returns:
        lm-eval's names of the tasks.

    Raises:
        MegaloopError: the files cannot be written.
    """
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            for number in dict.fromkeys(counts):
                name = harness_task(task.name, number)
                questions = directory.resolve() / f"{name}.jsonl"
                with replacing(questions) as file:
                    file.writelines(json.dumps(line).encode() + b"\n" for line in _lines(task, number, count, seed))
                with replacing(directory / f"{name}.yaml") as file:
                    file.write(_yaml(task, number, questions, count, seed).encode())
                written.append(name)
    except OSError as error:
        raise MegaloopError(f"export-tasks: cannot write {error.filename or directory} ({error.strerror})") from None
    return written


def _lines(task: Task, number: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
    for place, example in enumerate(examples(task, count, seed)):
        if place % BLOCK == 0:
            solved = shots(task, number, seed, place // BLOCK)
        yield {
            "prompt": task.prompt(solved, example),
            "choices": example.candidates,
            "gold": example.correct,
            "answer": task.delimiter + example.answer,  # for fine-tuning, which takes prompt and answer
        }


def _yaml(task: Task, number: int, questions: Path, count: int, seed: int) -> str:
    """The configuration; a text of JSON is one of YAML too."""
    return f"""\
# {task.title}, {number} shots, as megaloop eval asks it; written by megaloop export-tasks
task: {harness_task(task.name, number)}
tag: {harness_tag(number)}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(questions))}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
target_delimiter: {json.dumps(task.delimiter)}
num_fewshot: 0  # the shots are in the prompts
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: {TASKS_VERSION}
  seed: {seed}
  examples: {count}
"""
