"""Evaluate a checkpoint: primitives and held-out loss, by number of shots and of loops, by halting and by caches of loops.

Runs on one process or data-parallel: blocks of examples go round the ranks of torch.distributed where there are some, and
every rank gets all results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from megaloop.checkpoint import Checkpoint
from megaloop.data import DataSet, MicroBatch, bits_per_byte, held_out_batch, held_out_places
from megaloop.depth import LayerCall
from megaloop.errors import MegaloopError
from megaloop.evaluation.held_out import Scored, difficulties, open_as_trained, score_held_out, summary
from megaloop.evaluation.primitives import Questioning
from megaloop.evaluation.records import DIFFICULTY, EVALUATION, Record, Subject, append_record, read_records
from megaloop.evaluation.tasks import TASKS_VERSION, Task, tasks_named
from megaloop.evaluation.thinking import TokenClasses, by_class, loops_over_text, spent
from megaloop.inference.caches import CachePolicy, loop_iterations
from megaloop.inference.halting import Halting
from megaloop.inference.load import load_decoder
from megaloop.inference.loops import Block, EveryBlock, InferenceDepth, inference_depth
from megaloop.inference.thinking import Thinking
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
    halts: Sequence[Halting] = (),
    caches: Sequence[CachePolicy] = (),
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
        halts: by which tokens leave the loop, one after another; nothing: all iterations run.
        caches: which iterations keep keys and values; others than ``full`` beside it.
        again: measure anew what ``out`` holds already.
        out: the file that remembers; None: RUN/evaluation.jsonl for a run and for its checkpoints, no file otherwise.

    Raises:
        MegaloopError: a damaged checkpoint, one without tokenizer, an unknown task, a loop that does not fit, halting that the model cannot do.
    """
    primitives = tasks_named([name for name in tasks if name != VALIDATION]) if set(tasks) != {VALIDATION} else []
    model, checkpoint = load_decoder(path, precision=precision)
    chosen = [one for block in blocks for one in (block.of(model.plan) if isinstance(block, EveryBlock) else [block])]
    depths = [inference_depth(model.plan, loop, block) for block in chosen or [None] for loop in loops]
    settings = _settings(depths, _thinkings(halts, caches), on_note or _mute)
    for setting in settings:  # what a model cannot do is said before hours of what it can
        setting.thinking.passes(model, setting.calls)
    work = _Work(
        model, checkpoint, precision, seed, examples, samples, _remembered(checkpoint, out), again, on_step or _silent
    )
    asked = VALIDATION in tasks or data is not None
    datasets = _datasets(checkpoint, data, required=asked, note=on_note or _mute) if asked or not tasks else []
    if not tasks and (why := work.cannot_ask(primitives)):
        primitives = []
        (on_note or _mute)(f"no primitives: {why}")
    records = []
    for setting in settings:
        for dataset in datasets:
            records += work.held_out(setting, dataset)
        for count in dict.fromkeys(shots):
            records += [work.primitive(setting, task, count) for task in primitives]
    return records


@dataclass(frozen=True)
class _Setting:
    """How the model runs."""

    depth: InferenceDepth
    thinking: Thinking

    @property
    def calls(self) -> tuple[LayerCall, ...]:
        return self.depth.execution.calls


def _settings(
    depths: Sequence[InferenceDepth], thinkings: Sequence[Thinking], note: Callable[[str], None]
) -> list[_Setting]:
    """Each depth with each way to think; one without a loop, beside others that have one, just as it runs."""
    found = []
    looped = {depth: any(call.iteration is not None for call in depth.execution.calls) for depth in depths}
    for depth, loops in looped.items():
        plain = any(looped.values()) and not loops
        if plain and thinkings != [Thinking()]:
            note(f"--loops {depth.loops}: nothing loops there, so nothing halts or shares caches; measured as it runs")
        found += [_Setting(depth, thinking) for thinking in ([Thinking()] if plain else thinkings)]
    return found


def _thinkings(halts: Sequence[Halting], caches: Sequence[CachePolicy]) -> list[Thinking]:
    wanted: Sequence[Halting | None] = halts or [None]
    policies = dict.fromkeys([CachePolicy(), *caches])
    return [Thinking(halting, policy) for halting in dict.fromkeys(wanted) for policy in policies]


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

    def primitive(self, setting: _Setting, task: Task, count: int) -> Record:
        subject = self._subject(task.name, setting, count, self._examples, self._seed, None)
        if subject in self._known:
            return self._known[subject]
        began = time.perf_counter()
        values = self._questioning(count, setting.thinking).ask(task, setting.calls, _label(subject))
        return self._record(subject, values | self._memory(setting), time.perf_counter() - began)

    def cannot_ask(self, tasks: Sequence[Task]) -> str | None:
        """Why the tokenizer has no words for the questions of these tasks; None: it has."""
        try:
            self._questioning(0).check(tasks)
        except MegaloopError as error:
            return str(error)
        return None

    def held_out(self, setting: _Setting, dataset: DataSet) -> list[Record]:
        """The loss over all held-out samples, and a record for each difficulty that they have; all in one pass."""
        samples = min(self._samples, len(dataset.split("validation")))
        subjects = [self._subject(VALIDATION, setting, 0, samples, 0, dataset)] + [
            self._subject(DIFFICULTY, setting, 0, samples, 0, dataset, difficulty)
            for difficulty in self._difficulties(dataset, samples)
        ]
        known = [record for subject in subjects if (record := self._known.get(subject)) is not None]
        if len(known) == len(subjects) and all(record.subject.is_of_same_data(subjects[0]) for record in known):
            return known
        began = time.perf_counter()
        scored, size, text = self._scored(setting, dataset, subjects[0])
        seconds = time.perf_counter() - began
        records = []
        for subject in subjects:
            values = _held_out_values(scored, dataset, subject, size) | self._memory(setting)
            if setting.thinking.halting is not None:
                values |= self._loops(setting, scored, subject, text)
            records.append(self._record(subject, values, seconds))
        return records

    def _loops(
        self, setting: _Setting, scored: Sequence[Scored], subject: Subject, text: list[list[Any]]
    ) -> dict[str, Any]:
        """How many iterations the predictions took; of all of them by kind of token too, and over a text."""
        same = [one for one in scored if subject.difficulty in (None, one.difficulty)]
        pairs = [pair for one in same for pair in one.loops]
        values = spent((loops for _, loops in pairs), loop_iterations(setting.calls))
        if subject.difficulty is None and self._checkpoint.tokenizer is not None:
            classes = TokenClasses(self._open_tokenizer().decode)
            values |= {"loops_by_class": by_class(classes, pairs), "loops_text": text}
        return values

    def _memory(self, setting: _Setting) -> dict[str, int]:
        return setting.thinking.memory(self._model, setting.calls)

    def _difficulties(self, dataset: DataSet, samples: int) -> list[int]:
        if dataset.path not in self._found:
            self._found[dataset.path] = difficulties(dataset, samples)
        return self._found[dataset.path]

    def _subject(
        self,
        task: str,
        setting: _Setting,
        count: int,
        examples: int,
        seed: int,
        dataset: DataSet | None,
        difficulty: int | None = None,
    ) -> Subject:
        manifest, depth, halting = self._checkpoint.manifest, setting.depth, setting.thinking.halting
        halt: dict[str, Any] = {}
        if halting is not None:
            halt = {
                "halt": str(halting),
                "min_loops": halting.minimum,
                "halt_scope": halting.scope,
                "halt_decay": halting.decay,
            }
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
            cache=str(setting.thinking.policy),
            **halt,
        )

    def _record(self, subject: Subject, values: dict[str, Any], seconds: float) -> Record:
        """Write down what was measured."""
        values["seconds"] = round(seconds, 3)
        record = Record(subject, values, datetime.now(UTC).isoformat(timespec="seconds"))
        if self._file is not None and rank() == 0:
            append_record(self._file, record)
        return record

    def _questioning(self, count: int, thinking: Thinking = Thinking()) -> Questioning:
        tokenizer = self._open_tokenizer()
        return Questioning(self._model, tokenizer, count, self._examples, self._seed, self._on_step, thinking)

    def _scored(
        self, setting: _Setting, dataset: DataSet, subject: Subject
    ) -> tuple[list[Scored], int, list[list[Any]]]:
        """Every held-out document, the bytes of text that they are, and the first text with its loops."""
        places = held_out_places([dataset], subject.examples)
        batch = max((1 << 13) // dataset.sequence_length, 1)
        batches = [range(first, min(first + batch, len(places))) for first in range(0, len(places), batch)]

        def score(part: int, numbers: Sequence[int]) -> tuple[list[Scored], int, list[list[Any]]]:
            read = held_out_batch(places, numbers)
            vocab_size = dataset.vocab_size
            scored, loops_BS = score_held_out(self._model, read, setting.calls, vocab_size, setting.thinking)
            text = [] if part or loops_BS is None else self._text(read, loops_BS)
            return scored, read.bytes, text

        found = self._shared(_label(subject), batches, score)
        return [entry for part, *_ in found for entry in part], sum(size for _, size, _ in found), found[0][2]

    def _text(self, read: MicroBatch, loops_BS: Tensor) -> list[list[Any]]:
        if self._checkpoint.tokenizer is None:
            return []
        own = read.loss_weights is not None
        asked_S = read.loss_weights[0] > 0 if read.loss_weights is not None else torch.ones_like(loops_BS[0])
        return loops_over_text(
            self._open_tokenizer(), read.inputs[0], read.documents[0], asked_S, loops_BS[0], own_targets=own
        )

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
    halt = f", {subject.halt}" if subject.halt else ""
    cache = "" if subject.cache == "full" else f", cache {subject.cache}"
    return f"{subject.task}{shots}{loops}{halt}{cache}"
