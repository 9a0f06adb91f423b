"""Evaluate a checkpoint: primitives and held-out loss, by number of shots and of loops.

Runs on one process or data-parallel: blocks of examples go round the ranks of torch.distributed where there are some, and
every rank gets all results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from megaloop.checkpoint import Checkpoint
from megaloop.data import DataSet, bits_per_byte, held_out_batch, held_out_places
from megaloop.errors import MegaloopError
from megaloop.evaluation.held_out import Scored, difficulties, open_as_trained, score_held_out, summary
from megaloop.evaluation.primitives import Questioning
from megaloop.evaluation.records import DIFFICULTY, EVALUATION, Record, Subject, append_record, read_records
from megaloop.evaluation.tasks import TASKS_VERSION, Task, tasks_named
from megaloop.inference.load import load_decoder
from megaloop.inference.loops import Block, EveryBlock, InferenceDepth, inference_depth
from megaloop.model import Decoder
from megaloop.runtime.collectives import broadcast_object
from megaloop.runtime.share import OnPart, rank, share_over_ranks
from megaloop.tokenizer import Tokenizer

__all__ = ["VALIDATION", "evaluate"]

VALIDATION = "validation"
_VALIDATION_VERSION = 2
"""Of how held-out loss is measured: what earlier versions of the tasks left beside it stays valid."""
_Part = TypeVar("_Part")


def evaluate(
    path: Path,
    *,
    tasks: Sequence[str] = (),
    shots: Sequence[int] = (5,),
    loops: Sequence[int | None] = (None,),
    blocks: Sequence[Block | EveryBlock] = (),
    examples: int = 1000,
    seed: int = 0,
    data: Sequence[Path] | None = None,
    samples: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    again: bool = False,
    out: Path | None = None,
    on_step: OnPart | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[Record]:
    """Evaluate a checkpoint (or a run's newest), or take what was measured before.

    Args:
        tasks: names of primitives, ``primitives`` for all of them, ``validation``; nothing: all of it, but no primitives if the
            tokenizer has no words for them.
        shots: numbers of solved examples before each question.
        loops, blocks: see :func:`megaloop.inference.loops.with_loops`; each number with each block.
        examples: questions of each primitive.
        seed: of the questions.
        data: data sets whose held-out samples validation takes; None: those that the run was trained on.
        samples: of each data set, at most.
        again: measure anew what ``out`` holds already.
        out: the file that remembers; None: RUN/evaluation.jsonl for a run and for its checkpoints, no file otherwise.

    Raises:
        MegaloopError: a damaged checkpoint, one without tokenizer, an unknown task, a loop that does not fit.
    """
    primitives = tasks_named([name for name in tasks if name != VALIDATION]) if set(tasks) != {VALIDATION} else []
    model, checkpoint = load_decoder(path, precision=precision)
    chosen = [one for block in blocks for one in (block.of(model.plan) if isinstance(block, EveryBlock) else [block])]
    depths = [inference_depth(model.plan, loop, block) for block in chosen or [None] for loop in loops]
    work = _Work(
        model, checkpoint, precision, seed, examples, samples, _remembered(checkpoint, out), again, on_step or _silent
    )
    asked = VALIDATION in tasks or data is not None
    datasets = _datasets(checkpoint, data, required=asked, note=on_note or _mute) if asked or not tasks else []
    if not tasks and (why := work.cannot_ask(primitives)):
        primitives = []
        (on_note or _mute)(f"no primitives: {why}")
    records = []
    for depth in dict.fromkeys(depths):
        for dataset in datasets:
            records += work.held_out(depth, dataset)
        for count in dict.fromkeys(shots):
            records += [work.primitive(depth, task, count) for task in primitives]
    return records


def _silent(what: str, done: int, total: int) -> None:
    pass


def _mute(note: str) -> None:
    pass


def _remembered(checkpoint: Checkpoint, out: Path | None) -> Path | None:
    if out is not None:
        return out
    folder = checkpoint.path.absolute().parent
    return folder.parent / EVALUATION if folder.name == "checkpoints" else None


def _datasets(
    checkpoint: Checkpoint, data: Sequence[Path] | None, *, required: bool, note: Callable[[str], None]
) -> list[DataSet]:
    """The data sets to validate on, in samples as long as those of training where they allow it."""
    paths = checkpoint.manifest.data.paths if data is None else list(data)
    if required and not paths:
        raise MegaloopError("eval: the checkpoint does not know its data; name a data set with --data")
    if data is None and checkpoint.manifest.data.is_fine_tuned:
        text = (
            "the run was fine-tuned on prompts and answers, and training alone measures their held-out loss (val_loss in "
            "RUN/metrics.jsonl); name a data set that megaloop prep made with --data"
        )
        if required:
            raise MegaloopError(f"eval: {text}")
        note(f"no held-out loss: {text}")
        return []
    opened = []
    for path in paths:
        try:
            dataset = open_as_trained(checkpoint, path)
            if not len(dataset.split("validation")):
                raise MegaloopError(f"data {path}: no held-out samples; prepare it with --validation-fraction")
            opened.append(dataset)
        except MegaloopError as error:
            if required:
                raise
            note(f"no held-out loss: {error}")
    return opened


class _Work:
    """Measures one thing at a time, or remembers it."""

    def __init__(
        self,
        model: Decoder,
        checkpoint: Checkpoint,
        precision: str,
        seed: int,
        examples: int,
        samples: int,
        file: Path | None,
        again: bool,
        on_step: OnPart,
    ):
        self._model, self._checkpoint, self._precision = model, checkpoint, precision
        self._seed, self._examples, self._samples, self._on_step = seed, examples, samples, on_step
        self._file = file
        self._known = {} if again or file is None else broadcast_object(read_records(file))
        self._tokenizer: Tokenizer | None = None
        self._found: dict[Path, list[int]] = {}  # difficulties of a data set

    def primitive(self, depth: InferenceDepth, task: Task, count: int) -> Record:
        subject = self._subject(task.name, depth, count, self._examples, self._seed, None)
        return self._known.get(subject) or self._measured(subject, lambda: self._primitive(depth, task, count, subject))

    def cannot_ask(self, tasks: Sequence[Task]) -> str | None:
        """Why the tokenizer has no words for the questions of these tasks; None: it has."""
        try:
            self._questioning(0).check(tasks)
        except MegaloopError as error:
            return str(error)
        return None

    def held_out(self, depth: InferenceDepth, dataset: DataSet) -> list[Record]:
        """The loss over all held-out samples, and a record for each difficulty that they have; all in one pass."""
        samples = min(self._samples, len(dataset.split("validation")))
        subjects = [self._subject(VALIDATION, depth, 0, samples, 0, dataset)] + [
            self._subject(DIFFICULTY, depth, 0, samples, 0, dataset, difficulty)
            for difficulty in self._difficulties(dataset, samples)
        ]
        known = [record for subject in subjects if (record := self._known.get(subject)) is not None]
        if len(known) == len(subjects) and all(record.subject.is_of_same_data(subjects[0]) for record in known):
            return known
        began = time.perf_counter()
        scored, size = self._scored(depth, dataset, subjects[0])
        seconds = time.perf_counter() - began
        return [
            self._record(subject, _held_out_values(scored, dataset, subject, size), seconds) for subject in subjects
        ]

    def _difficulties(self, dataset: DataSet, samples: int) -> list[int]:
        if dataset.path not in self._found:
            self._found[dataset.path] = difficulties(dataset, samples)
        return self._found[dataset.path]

    def _subject(
        self,
        task: str,
        depth: InferenceDepth,
        count: int,
        examples: int,
        seed: int,
        dataset: DataSet | None,
        difficulty: int | None = None,
    ) -> Subject:
        manifest = self._checkpoint.manifest
        return Subject(
            task=task,
            data=None if dataset is None else str(dataset.path),
            shots=count,
            loops=depth.loops,
            depth=str(depth.execution.depth),
            block=str(depth.block) if depth.block else None,
            examples=examples,
            seed=seed,
            precision=self._precision,
            version=_VALIDATION_VERSION if task in (VALIDATION, DIFFICULTY) else TASKS_VERSION,
            step=manifest.step,
            checkpoint=manifest.checksum,
            document_masking=self._model.config.document_masking,
            difficulty=difficulty,
            data_sha256=None if dataset is None else dataset.sha256("validation"),
        )

    def _measured(self, subject: Subject, measure: Callable[[], dict[str, Any]]) -> Record:
        began = time.perf_counter()
        values = measure()
        return self._record(subject, values, time.perf_counter() - began)

    def _record(self, subject: Subject, values: dict[str, Any], seconds: float) -> Record:
        """Write down what was measured."""
        values["seconds"] = round(seconds, 3)
        record = Record(subject, values, datetime.now(UTC).isoformat(timespec="seconds"))
        if self._file is not None and rank() == 0:
            append_record(self._file, record)
        return record

    def _primitive(self, depth: InferenceDepth, task: Task, count: int, subject: Subject) -> dict[str, Any]:
        return self._questioning(count).ask(task, depth.execution.calls, _label(subject))

    def _questioning(self, count: int) -> Questioning:
        tokenizer = self._open_tokenizer()
        return Questioning(self._model, tokenizer, count, self._examples, self._seed, self._on_step)

    def _scored(self, depth: InferenceDepth, dataset: DataSet, subject: Subject) -> tuple[list[Scored], int]:
        """Every held-out document, and the bytes of text that they are."""
        places = held_out_places([dataset], subject.examples)
        batch = max((1 << 13) // dataset.sequence_length, 1)
        batches = [range(first, min(first + batch, len(places))) for first in range(0, len(places), batch)]

        def score(_: int, numbers: Sequence[int]) -> tuple[list[Scored], int]:
            read = held_out_batch(places, numbers)
            return score_held_out(self._model, read, depth.execution.calls, dataset.vocab_size), read.bytes

        found = self._shared(_label(subject), batches, score)
        return [entry for part, _ in found for entry in part], sum(size for _, size in found)

    def _shared(self, label: str, parts: Sequence[_Part], run: Callable[[int, _Part], Any]) -> list[Any]:
        return share_over_ranks(label, parts, run, self._on_step)

    def _open_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = self._checkpoint.open_tokenizer("questions are text")
        return self._tokenizer


def _held_out_values(scored: Sequence[Scored], dataset: DataSet, subject: Subject, size: int) -> dict[str, Any]:
    if subject.difficulty is not None:
        same = [entry for entry in scored if entry.difficulty == subject.difficulty]
        return summary(same, dataset, subject.difficulty)
    values = summary(scored, dataset)
    return values | {"bits_per_byte": bits_per_byte(values["loss"], values["tokens"], size) if size else None}


def _label(subject: Subject) -> str:
    shots = "" if subject.task == VALIDATION else f", {subject.shots} shots"
    loops = f", {subject.loops} loops" if subject.block else ""
    return f"{subject.task}{shots}{loops}"
