"""What is asked of models by ``megaloop diagnose``: which measures, of which prompts and questions, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaloop.analysis.prompts import Prompts, held_out_prompts, read_prompts
from megaloop.analysis.results import DIAGNOSIS
from megaloop.checkpoint import Checkpoint, Manifest
from megaloop.depth import copied_block
from megaloop.errors import MegaloopError
from megaloop.evaluation.held_out import open_as_trained
from megaloop.evaluation.tasks import TASKS_VERSION, Task, tasks_named

__all__ = ["PromptSource", "Request", "TaskSource", "block_layers", "own_data", "own_results"]

_BLOCK = 4
"""Layers of a block where nothing says how many."""


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from.

    Attributes:
        path: a data set or a jsonl file; None: held-out samples of the run's first data set.
        count: at most so many.
        tokens: of a text, at most.
        field: of a jsonl line, that has the text.
    """

    path: Path | None = None
    count: int = 16
    tokens: int = 128
    field: str = "text"

    def read(self, checkpoint: Checkpoint, document_masking: bool) -> Prompts:
        """The prompts.

        Raises:
            MegaloopError: there are none, or they are of another tokenizer.
        """
        path = self.path or own_data(checkpoint, "name prompts with --prompts")
        if path.is_dir():
            prompts = held_out_prompts(open_as_trained(checkpoint, path), self.count, document_masking)
        else:
            prompts = read_prompts(path, checkpoint.open_tokenizer("prompts are text"), self.count, self.field)
        return prompts.cut(self.tokens)


def own_data(checkpoint: Checkpoint, otherwise: str) -> Path:
    """The first data set of a run.

    Args:
        otherwise: what to do where there is none, for the error.

    Raises:
        MegaloopError: the run does not say, or was fine-tuned.
    """
    data = checkpoint.manifest.data
    if not data.paths:
        raise MegaloopError(f"diagnose: the checkpoint does not know its data; {otherwise}")
    if data.is_fine_tuned:
        raise MegaloopError(
            f"diagnose: the run was fine-tuned on prompts and answers, which have no held-out samples; {otherwise}"
        )
    return data.paths[0]


def own_results(checkpoint: Checkpoint) -> Path | None:
    """The file of a run that remembers results of its checkpoints; None: the checkpoint is in no run."""
    folder = checkpoint.path.absolute().parent
    return folder.parent / DIAGNOSIS if folder.name == "checkpoints" else None


@dataclass(frozen=True)
class TaskSource:
    """Primitives that interventions are also scored by.

    Attributes:
        names: as ``megaloop eval --tasks`` takes them.
        shots: solved examples before each question.
        examples: questions of each.
    """

    names: Sequence[str] = ()
    shots: int = 5
    examples: int = 250

    def chosen(self) -> list[Task]:
        """The primitives; none where none is named.

        Raises:
            MegaloopError: an unknown name.
        """
        return tasks_named(self.names) if self.names else []

    @property
    def how(self) -> str:
        """What a result says besides the task's name."""
        return f"{self.shots} shots, {self.examples} questions, version {TASKS_VERSION}"


@dataclass(frozen=True)
class Request:
    """What is asked, the same of every model.

    Attributes:
        measures: names; None: those that a model allows (:func:`megaloop.analysis.diagnose.default_measures`).
        tasks: with them interventions are measured a second time, by the accuracy of primitives.
        block: layers of a block; None: :func:`block_layers` says.
        lens_steps: of a tuned lens' training.
        attributed: which prompts, from 1 on, ``erasure`` and ``gradients`` are of.
        seed: of boundaries, and of the questions of primitives.
        again: measure anew what ``out`` holds already.
        out: the file that remembers; None: RUN/diagnosis.jsonl for a run and for its checkpoints, no file otherwise.
    """

    measures: Sequence[str] | None = None
    prompts: PromptSource = PromptSource()
    tasks: TaskSource = TaskSource()
    block: int | None = None
    lens_steps: int = 200
    attributed: Sequence[int] = (1,)
    seed: int = 123
    precision: Literal["fp32", "bf16"] = "fp32"
    again: bool = False
    out: Path | None = None


def block_layers(manifest: Manifest, asked: int | None = None) -> int:
    """Layers of a model's block: what was asked for, else the loop's, else those that growth added at a time, else 4 or as many as there are.

    Raises:
        MegaloopError: more than the model executes.
    """
    plan = manifest.plan
    known = plan.loop.block if plan.loop is not None else _grown_by(manifest)
    size = asked or known or min(_BLOCK, plan.depth)
    if not 1 <= size <= plan.depth:
        raise MegaloopError(f"--block {size}: the model executes {plan.depth} layers; choose 1 to {plan.depth}")
    return size


def _grown_by(manifest: Manifest) -> int | None:
    """Layers of the block that was copied last; where growth adds fresh ones (or has not begun), what the run's configuration says."""
    if (block := copied_block(manifest.plan)) is not None:
        return block
    growth = manifest.config.get("growth")
    block = growth.get("block") if manifest.growth is not None and isinstance(growth, dict) else None
    return block if type(block) is int and 1 <= block <= manifest.plan.depth else None
