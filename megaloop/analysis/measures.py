"""The measures of ``megaloop diagnose``: each goes over all prompts and gives curves over the places of layers.

What a measure computes of one batch of prompts is in the module of its name; here the batches are put together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaloop.analysis.attribution import Answer, erasure_effects, integrated_gradients
from megaloop.analysis.contributions import STATISTICS, contributions
from megaloop.analysis.edits import Calls
from megaloop.analysis.effective_depth import depth_score, first_below_half, first_overlap, last_crossing
from megaloop.analysis.effects import SHORTEST, Setting, answer_starts, boundaries, local_effects, skip_effects
from megaloop.analysis.interventions import Intervention, Kind, score_targets, sweep
from megaloop.analysis.lens import AT_TARGETS, AT_TOKENS, Translate, lens
from megaloop.analysis.loop_monitors import MONITORS, loop_calls, loop_monitors
from megaloop.analysis.prompts import PromptBatch, Prompts
from megaloop.analysis.results import Curve, Result, curve
from megaloop.analysis.symmetry import mean_symmetry, weight_symmetry
from megaloop.analysis.trace import Trace, trace
from megaloop.errors import MegaloopError
from megaloop.evaluation.primitives import Questioning
from megaloop.evaluation.records import ratio
from megaloop.evaluation.tasks import Task
from megaloop.model import Decoder
from megaloop.runtime.share import OnPart, share_over_ranks
from megaloop.tokenizer import Tokenizer

__all__ = [
    "Subject",
    "attribution",
    "contribution_curves",
    "depth_scores",
    "effect_matrices",
    "intervention_curves",
    "lens_curves",
    "monitors",
    "symmetry",
    "task_curves",
]

_BATCH_TOKENS = {"cpu": 512}
"""Tokens of prompts that are traced together, by kind of device. On a CPU more are no faster, and batches are what ranks share: the
default's 16 prompts of 128 tokens are four."""
_OTHER_BATCH_TOKENS = 2048
"""Of 30 layers of width 576 a trace of fp32 takes 0.4 GB."""
_BOUNDARIES = 4
_EFFECT_TOKENS = _OTHER_BATCH_TOKENS // _BOUNDARIES
"""The same where each prompt goes through once for each boundary, and distributions of all its tokens are kept: 0.1 GB of 49,152 words."""
_EFFECT_PROMPTS = 10
_SCORED_PROMPTS = 20
"""Prompts of each difficulty whose depth is scored."""


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        block: layers of a block: the period that is looked for, and what is repeated.
        vocab_size: the tokenizer's tokens; None: all rows of the head.
    """

    model: Decoder
    prompts: Prompts
    block: int
    seed: int
    vocab_size: int | None
    on_part: OnPart

    @property
    def depth(self) -> int:
        return self.model.plan.depth

    def trace(self, batch: PromptBatch) -> Trace:
        """Of the untouched pass over a batch."""
        return trace(self.model, batch.tokens_BS, batch.documents_BS)

    def collect(
        self,
        label: str,
        measure: Callable[[PromptBatch], Sequence[Tensor]],
        prompts: Prompts | None = None,
        tokens: int | None = None,
    ) -> list[NDArray[np.float64]]:
        """What a measure gives for each prompt, in their order: arrays [P, ...].

        Args:
            measure: of a batch, tensors whose first index is the prompt.
            tokens: of a batch, at most; default: what suits the device. However many ranks there are, batches are the same.
        """
        prompts = prompts or self.prompts
        tokens = tokens or _BATCH_TOKENS.get(self.model.device.type, _OTHER_BATCH_TOKENS)

        def run(_: int, numbers: list[int]) -> tuple[list[int], list[NDArray[np.float64]]]:
            found = measure(prompts.batch(numbers, self.model.device))
            return numbers, [tensor.double().cpu().numpy() for tensor in found]

        parts = share_over_ranks(label, prompts.together(tokens), run, self.on_part)
        order = np.argsort([number for numbers, _ in parts for number in numbers])
        return [np.concatenate(arrays)[order] for arrays in zip(*(found for _, found in parts), strict=True)]


def contribution_curves(subject: Subject) -> Result:
    """What attention, MLP and both add to the residual stream; see :mod:`megaloop.analysis.contributions`."""
    sums_PLK, counts_P = subject.collect(
        "contributions", lambda b: (contributions(subject.trace(b), b), b.valid_BS.sum(1))
    )
    curves = {name: _ratios(sums_PLK[..., index], counts_P) for index, name in enumerate(STATISTICS)}
    sizes_PL = sums_PLK[..., STATISTICS.index("attention_size")] / counts_P[:, None]
    cosine_L = sums_PLK[..., STATISTICS.index("layer_cosine")].sum(0)
    numbers = {"effective depth, last crossing of the cosine": _or_none(last_crossing(cosine_L))}
    return Result(curves=curves, numbers=numbers, by_prompt={"attention_size": _rows(sizes_PL)})


def effect_matrices(subject: Subject) -> Result:
    """Effects of skipping each layer on later ones and on the output; see :mod:`megaloop.analysis.effects`."""
    prompts = subject.prompts.chosen(range(min(_EFFECT_PROMPTS, len(subject.prompts))))
    prompts.require(SHORTEST, "effects")
    at = boundaries([len(prompt) for prompt in prompts.prompts], _BOUNDARIES, subject.seed)
    matrices, curves = {}, {}
    for setting in ("current", "future"):
        later, output, local = _effects(subject, prompts, setting, at)
        matrices[f"{setting} effect on later layers"] = _rows(later.max(0))
        matrices[f"{setting} local effect"] = _rows(local.max(0))
        curves[f"{setting} effect on the output"] = curve(output.max(0))
    return Result(curves=curves, matrices=matrices)


def _effects(
    subject: Subject, prompts: Prompts, setting: Setting, at: Sequence[Sequence[int]]
) -> list[NDArray[np.float64]]:
    def measure(batch: PromptBatch) -> tuple[Tensor, Tensor, Tensor]:
        own, traced = [at[number] for number in batch.numbers], subject.trace(batch)
        effects = skip_effects(subject.model, traced, batch, setting, own)
        return effects.later_BLL, effects.output_BL, local_effects(subject.model, traced, batch, setting, own)

    return subject.collect(f"{setting} effects", measure, prompts, _EFFECT_TOKENS)


def depth_scores(subject: Subject) -> Result:
    """Future effects on the output, of up to 20 prompts of each difficulty (20 in all where there is none).

    The boundary of a question is where its answer begins, as in the authors' code; of other prompts there are four at random.
    """
    numbers_P = _few_of_each(subject.prompts)
    prompts = subject.prompts.chosen(numbers_P)
    if (starts := answer_starts(prompts.prompts)) is not None:
        at, where = [[start] for start in starts], "at the answer"
    else:
        subject.prompts.require(SHORTEST, "depth-score", numbers_P)
        at, where = boundaries([len(prompt) for prompt in prompts.prompts], _BOUNDARIES, subject.seed), "at random"

    def measure(batch: PromptBatch) -> tuple[Tensor]:
        own = [at[number] for number in batch.numbers]
        return (skip_effects(subject.model, subject.trace(batch), batch, "future", own).output_BL,)

    (output_PL,) = subject.collect("depth score", measure, prompts, _EFFECT_TOKENS)
    difficulty_P = np.array([prompt.difficulty for prompt in prompts.prompts])
    of_level = {level: output_PL[difficulty_P == level].mean(0) for level in prompts.difficulties}
    curves = {"output change": curve(output_PL.mean(0))}
    curves |= {f"output change at difficulty {level}": curve(effect_L) for level, effect_L in of_level.items()}
    numbers = {"depth score": depth_score(output_PL.mean(0))}
    numbers |= {f"depth score at difficulty {level}": depth_score(effect_L) for level, effect_L in of_level.items()}
    by_prompt = {"output": _rows(output_PL), "difficulty": _rows(difficulty_P[:, None].astype(np.float64))}
    return Result(curves=curves, numbers=numbers, by_prompt=by_prompt, labels={"boundaries": [where]})


def _few_of_each(prompts: Prompts) -> list[int]:
    """Numbers of the first 20 prompts of each difficulty, ascending."""
    taken: Counter[int] = Counter()
    chosen = []
    for number, prompt in enumerate(prompts.prompts):
        taken[prompt.difficulty] += 1
        if taken[prompt.difficulty] <= _SCORED_PROMPTS:
            chosen.append(number)
    return chosen


def lens_curves(subject: Subject, translate: Translate | None = None) -> Result:
    """What each residual stream predicts; see :mod:`megaloop.analysis.lens`. Place 0 is the embedding, the last the model's end."""

    def measure(batch: PromptBatch) -> tuple[Tensor, ...]:
        sums = lens(subject.model, subject.trace(batch), batch, subject.vocab_size, translate)
        return sums.tokens_BLK, sums.targets_BLK, sums.deep_B, sums.token_count_B, sums.target_count_B

    label = "logit lens" if translate is None else "tuned lens"
    tokens_PLK, targets_PLK, deep_P, token_count_P, target_count_P = subject.collect(label, measure)
    curves = {name: _ratios(tokens_PLK[..., index], token_count_P) for index, name in enumerate(AT_TOKENS)}
    if target_count_P.sum():
        curves |= {name: _ratios(targets_PLK[..., index], target_count_P) for index, name in enumerate(AT_TARGETS)}
    means_KL = {name: tokens_PLK[..., index].sum(0) / token_count_P.sum() for index, name in enumerate(AT_TOKENS)}
    numbers = {
        "deep-thinking ratio": float(deep_P.sum() / token_count_P.sum()),
        "effective depth, KL below half": _or_none(first_below_half(means_KL["kl"])),
        "effective depth, overlap above 0.2": _or_none(first_overlap(means_KL["overlap"])),
    }
    overlap_P2 = np.stack([tokens_PLK[:, -2, AT_TOKENS.index("overlap")], token_count_P], 1)
    return Result(curves=curves, numbers=numbers, by_prompt={"overlap at the last layer": _rows(overlap_P2)})


def _or_none(value: int | None) -> float | None:
    return None if value is None else float(value)


def intervention_curves(subject: Subject, kind: Kind) -> Result:
    """Loss and accuracy over the targets of the prompts, with one change of the order at every place; as differences to none.

    Raises:
        MegaloopError: no prompt has a target.
    """
    if not any((prompt.targets >= 0).any() for prompt in subject.prompts.prompts):
        raise MegaloopError(
            f"{kind}: no prompt of {subject.prompts.source} has a target; give prompts of at least two tokens"
        )
    interventions, orders = _orders(subject, kind)
    sums_PIK, counts_P = subject.collect(
        kind, lambda b: (score_targets(subject.model, b, orders, subject.vocab_size), (b.targets_BS >= 0).sum(1))
    )
    curves, by_prompt = {}, {"targets": _rows(counts_P[:, None]), "loss without": _rows(sums_PIK[:, :1, 0])}
    for index, name in enumerate(("loss", "accuracy")):
        changed_PI = sums_PIK[:, 1:, index] - sums_PIK[:, :1, index]
        for title, columns in _by_curve(interventions).items():
            curves[f"{title}: {name}"] = _ratios(changed_PI[:, columns], counts_P)
    for title, columns in _by_curve(interventions).items():
        by_prompt[title] = _rows(sums_PIK[:, 1:, 0][:, columns])
    without = sums_PIK[:, 0].sum(0) / max(counts_P.sum(), 1)
    return Result(
        curves=curves, by_prompt=by_prompt, numbers={"loss": float(without[0]), "accuracy": float(without[1])}
    )


def task_curves(subject: Subject, kind: Kind, task: Task, questioning: Questioning) -> Result:
    """Accuracy and exact match of a primitive with one change of the order at every place, as they are (not as differences)."""
    interventions, orders = _orders(subject, kind)
    without, *found = questioning.ask_in_orders(task, orders, f"{kind}, {task.name}")
    curves = {
        f"{title}: {name}": curve(
            [found[column][name] for column in columns],
            np.array([found[column][f"{name}_stderr"] for column in columns], np.float64),  # None is nan
        )
        for title, columns in _by_curve(interventions).items()
        for name in ("accuracy", "exact_match")
    }
    return Result(curves=curves, numbers={name: without[name] for name in ("accuracy", "exact_match", "chance")})


def symmetry(subject: Subject) -> Result:
    """Cosines of the MLP weights of blocks; see :mod:`megaloop.analysis.symmetry`."""
    cosines_BB = weight_symmetry(subject.model, subject.block)
    return Result(
        matrices={"cosine of the weights of blocks": _rows(cosines_BB.numpy())},
        numbers={"weight symmetry": mean_symmetry(cosines_BB)},
    )


def monitors(subject: Subject) -> Result:
    """How a loop's state changes, up to twice as many iterations as it was trained with; see :mod:`megaloop.analysis.loop_monitors`.

    A loop that divides what each iteration adds by their number would add less from the first on if there were more: it runs as it was trained.
    """
    plan = subject.model.plan
    iterations = 2 * plan.loop.iterations if plan.loop is not None and plan.style.residual_scale != "1/k" else None
    loop_calls(plan, iterations)  # refuses a model without a loop before anything runs

    def measure(batch: PromptBatch) -> tuple[Tensor, Tensor]:
        return loop_monitors(subject.model, batch, iterations), batch.valid_BS.sum(1)

    sums_PRK, counts_P = subject.collect("loop monitors", measure)
    return Result(curves={name: _ratios(sums_PRK[..., index], counts_P) for index, name in enumerate(MONITORS)})


def attribution(subject: Subject, name: Literal["erasure", "gradients"], number: int, tokenizer: Tokenizer) -> Result:
    """Which residual streams the answer of one prompt depends on; see :mod:`megaloop.analysis.attribution`.

    Args:
        number: of the prompt, from 1 on.

    Raises:
        MegaloopError: there is no such prompt, or it has no target.
    """
    if not 1 <= number <= len(subject.prompts):
        raise MegaloopError(
            f"--prompt {number}: there are {len(subject.prompts)} prompts; choose 1 to {len(subject.prompts)}"
        )
    prompt = subject.prompts.prompts[number - 1]
    answer = Answer(subject.model, prompt)
    numbers: dict[str, float | None] = {"probability": answer.probability}
    places = range(subject.depth)
    if name == "erasure":
        means_LD = _mean_residuals(subject)
        scores = share_over_ranks(
            name, places, lambda place, _: erasure_effects(answer, place, means_LD[place]), subject.on_part
        )
    else:
        found = share_over_ranks(name, places, lambda place, _: integrated_gradients(answer, place), subject.on_part)
        scores = [of_layer for of_layer, _ in found]
        numbers["largest gap of completeness"] = max(abs(missing) for _, missing in found)
    tokens = [tokenizer.decode([token]) for token in prompt.tokens.tolist()]
    target = tokenizer.decode([int(prompt.targets[answer.positions[-1]])])
    return Result(
        matrices={name: _rows(torch.stack(scores).numpy())},
        numbers=numbers,
        labels={"tokens": tokens, "answer": [target]},
    )


def _mean_residuals(subject: Subject) -> Tensor:
    """h_l over the tokens of the first 10 prompts; fp32 [L, D]."""
    prompts = subject.prompts.chosen(range(min(_EFFECT_PROMPTS, len(subject.prompts))))

    def measure(batch: PromptBatch) -> tuple[Tensor, Tensor]:
        valid_BS1 = batch.valid_BS.unsqueeze(2)
        sums = [(layer.h_BSD.double() * valid_BS1).sum(1) for layer in subject.trace(batch).layers]
        return torch.stack(sums, 1), batch.valid_BS.sum(1)

    sums_PLD, counts_P = subject.collect("mean residual streams", measure, prompts)
    return torch.from_numpy(sums_PLD.sum(0) / counts_P.sum()).float().to(subject.model.device)


def _orders(subject: Subject, kind: Kind) -> tuple[list[Intervention], list[Calls]]:
    """The interventions of a sweep; and the orders of execution that they make, the first without any."""
    calls = subject.model.plan.calls()
    interventions = sweep(kind, subject.depth, subject.block)
    return interventions, [tuple(calls), *(one.calls(calls) for one in interventions)]


def _by_curve(interventions: Sequence[Intervention]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, intervention in enumerate(interventions):
        found.setdefault(intervention.curve, []).append(index)
    return found


def _ratios(sums_PL: NDArray[np.float64], counts_P: NDArray[np.float64]) -> Curve:
    """Means over the items of all prompts with standard errors, each prompt a cluster."""
    counts = [int(count) for count in counts_P]
    measured = [ratio(sums_PL[:, place].tolist(), counts) for place in range(sums_PL.shape[1])]
    return curve(
        np.array([one.mean for one in measured]), np.array([one.error for one in measured])
    )  # nan of one prompt: no error


def _rows(values: NDArray[np.float64]) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in row] for row in values]
