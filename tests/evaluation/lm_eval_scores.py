"""Our primitives by lm-eval's own Hugging Face model, beside what we say of the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megaloop.evaluation.harness_files import harness_task, write_harness_files
from megaloop.evaluation.prompts import questions
from megaloop.evaluation.scoring import score
from megaloop.evaluation.tasks import BLOCK, TASKS, examples, shots
from megaloop.inference.load import load_decoder


@dataclass(frozen=True)
class Scored:
    """Log-likelihoods of the candidates of each question, in order, and the share of right answers."""

    likelihoods: list[list[float]]
    accuracy: float


def ours(checkpoint: Path, name: str, shot_count: int, count: int) -> Scored:
    model, opened = load_decoder(checkpoint)
    tokenizer = opened.open_tokenizer("questions are text")
    asked = examples(TASKS[name], count, 0)
    found, right = [], 0
    for number in range(0, count, BLOCK):
        block = asked[number : number + BLOCK]
        beginning, rows = questions(tokenizer, TASKS[name], shots(TASKS[name], shot_count, 0, number // BLOCK), block)
        scored = score(model, beginning, rows, vocab_size=tokenizer.vocab_size)
        found += [scores.log_likelihoods for scores in scored]
        right += sum(scores.best == example.correct for scores, example in zip(scored, block, strict=True))
    return Scored(found, right / count)


def theirs(
    exported: Path, folder: Path, names: Sequence[str], shot_counts: Sequence[int], count: int, dtype: str = "float32"
) -> dict[str, Scored]:
    """By lm-eval's name of the task, with the files that we write into ``folder``; in arithmetic of ``dtype``."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    written = write_harness_files(folder, [TASKS[name] for name in names], shot_counts, count=count, seed=0)
    # a model of ours may have been trained on shorter texts than the prompts are; we do not cut them
    model = HFLM(pretrained=str(exported), device="cpu", dtype=dtype, batch_size=16, max_length=4096)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=written, task_manager=manager, bootstrap_iters=0)
    found = {}
    for name in written:
        lines = sorted(results["samples"][name], key=lambda line: line["doc_id"])
        likelihoods = [[likelihood for likelihood, _ in line["filtered_resps"]] for line in lines]
        found[name] = Scored(likelihoods, results["results"][name]["acc,none"])
    return found


def differences(
    checkpoint: Path,
    exported: Path,
    folder: Path,
    names: Sequence[str],
    shot_counts: Sequence[int],
    count: int,
    dtype: str = "float32",
) -> dict[str, tuple[float, float]]:
    """By lm-eval's name: the largest difference of a log-likelihood, and that of the accuracies."""
    other = theirs(exported, folder, names, shot_counts, count, dtype)
    made = {}
    for name in names:
        for shot_count in shot_counts:
            mine, found = ours(checkpoint, name, shot_count, count), other[harness_task(name, shot_count)]
            apart = torch.tensor(mine.likelihoods) - torch.tensor(found.likelihoods)
            made[harness_task(name, shot_count)] = (float(apart.abs().max()), abs(mine.accuracy - found.accuracy))
    return made
