"""Look inside models: measure what was asked for, or take what was measured before, and say which signatures are seen.

Runs on one process or data-parallel, as evaluation does: batches of prompts go round the ranks, and every rank gets all results.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from megaloop.analysis.interventions import KINDS, Kind
from megaloop.analysis.measures import (
    Subject,
    attribution,
    contribution_curves,
    depth_scores,
    effect_matrices,
    intervention_curves,
    lens_curves,
    monitors,
    symmetry,
    task_curves,
)
from megaloop.analysis.prompts import Prompts, held_out_prompts, read_prompts, training_prompts
from megaloop.analysis.results import DIAGNOSIS, DiagnosisRecord, Examination, Result, append_result, read_results
from megaloop.analysis.signature_table import signature_table
from megaloop.analysis.tuned_lens import TunedLens, load_lens, train_lens
from megaloop.checkpoint import Checkpoint, Manifest
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.evaluation.held_out import open_as_trained
from megaloop.evaluation.primitives import Questioning
from megaloop.evaluation.tasks import TASKS_VERSION, tasks_named
from megaloop.inference.load import load_decoder
from megaloop.runtime.collectives import broadcast_object
from megaloop.runtime.share import OnPart, rank
from megaloop.text import printable

__all__ = ["MEASURES", "SIGNATURES", "TUNED_LENS", "PromptSource", "TaskSource", "default_measures", "diagnose"]

VERSION = 3
"""Of the definitions; results of different versions do not compare."""
SIGNATURES, TUNED_LENS = "signatures", "tuned-lens"
ATTRIBUTIONS: tuple[Literal["erasure", "gradients"], ...] = ("erasure", "gradients")
"""Of one prompt."""
_BLOCK = 4
_LENS_SAMPLES = 2048
"""Training samples that a tuned lens learns from."""


def _intervention(kind: Kind) -> Callable[[Subject], Result]:
    return lambda subject: intervention_curves(subject, kind)


MEASURES: dict[str, Callable[[Subject], Result]] = {
    "contributions": contribution_curves,
    "effects": effect_matrices,
    "depth-score": depth_scores,
    "lens": lens_curves,
    "symmetry": symmetry,
    "loops": monitors,
    **{kind: _intervention(kind) for kind in KINDS},
}
"""By name, in the order in which they are done. After them come ``tuned-lens``, which is trained first, and ``erasure`` and ``gradients``, of one prompt."""


def default_measures(plan: DepthPlan, block: int) -> list[str]:
    """All of :data:`MEASURES` that the model allows."""
    without = {"loops"} if plan.loop is None else set()
    without |= {"symmetry"} if plan.layers < 2 * block else set()
    return [name for name in MEASURES if name not in without]


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from.

    Attributes:
        path: a data set or a jsonl file; None: held-out samples of the run's first data set.
        count: at most so many.
        field: of a jsonl line, that has the text.
    """

    path: Path | None = None
    count: int = 64
    field: str = "text"

    def read(self, checkpoint: Checkpoint, document_masking: bool) -> Prompts:
        """The prompts.

        Raises:
            MegaloopError: there are none, or they are of another tokenizer.
        """
        path = self.path or _own_data(checkpoint, "name prompts with --prompts")
        if path.is_dir():
            return held_out_prompts(open_as_trained(checkpoint, path), self.count, document_masking)
        return read_prompts(path, checkpoint.open_tokenizer("prompts are text"), self.count, self.field)


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


def _own_data(checkpoint: Checkpoint, otherwise: str) -> Path:
    data = checkpoint.manifest.data
    if not data.paths:
        raise MegaloopError(f"diagnose: the checkpoint does not know its data; {otherwise}")
    if data.is_fine_tuned:
        raise MegaloopError(
            f"diagnose: the run was fine-tuned on prompts and answers, which have no held-out samples; {otherwise}"
        )
    return data.paths[0]


def diagnose(
    path: Path,
    *,
    measures: Sequence[str] | None = None,
    prompts: PromptSource = PromptSource(),
    tasks: TaskSource = TaskSource(),
    block: int | None = None,
    lens_steps: int = 200,
    prompt: int = 1,
    seed: int = 123,
    precision: Literal["fp32", "bf16"] = "fp32",
    again: bool = False,
    out: Path | None = None,
    on_part: OnPart | None = None,
) -> list[DiagnosisRecord]:
    """Measure a checkpoint (or a run's newest), or take what was measured before; the last record has the signatures.

    Args:
        measures: names of :data:`MEASURES`, ``tuned-lens``, ``erasure``, ``gradients``; None: :func:`default_measures`.
        tasks: with them interventions are measured a second time, by the accuracy of primitives.
        block: layers of a block; None: of the loop, else 4.
        lens_steps: of a tuned lens' training.
        prompt: which prompt, from 1 on, ``erasure`` and ``gradients`` are of.
        again: measure anew what ``out`` holds already.
        out: the file that remembers; None: RUN/diagnosis.jsonl for a run and for its checkpoints, no file otherwise.

    Raises:
        MegaloopError: an unknown measure or task, a damaged checkpoint, prompts that are missing or too short, a block that does not fit, a
            lens of another checkpoint.
    """
    known = (*MEASURES, TUNED_LENS, *ATTRIBUTIONS)
    if unknown := [name for name in measures or () if name not in known]:
        raise MegaloopError(f"--measures: {printable(unknown[0], 60)} is none of {', '.join(known)}")
    asked = tasks_named(tasks.names) if tasks.names else []
    model, checkpoint = load_decoder(path, precision=precision)
    found = prompts.read(checkpoint, model.config.document_masking)
    size = _block(checkpoint.manifest.plan, block)
    chosen = default_measures(model.plan, size) if measures is None else measures
    tokenizer = checkpoint.open_tokenizer("questions are text") if asked else None
    if asked and not set(KINDS) & set(chosen):
        raise MegaloopError(
            f"--tasks: scores interventions, and none is among the measures; add one of {', '.join(KINDS)}"
        )
    vocab_size = model.vocab_size if checkpoint.manifest.tokenizer is None else checkpoint.open_tokenizer("").vocab_size
    subject = Subject(model, found, size, seed, vocab_size, on_part or (lambda label, done, total: None))
    questioning = None
    if tokenizer is not None:
        questioning = Questioning(model, tokenizer, tasks.shots, tasks.examples, seed, subject.on_part)
        questioning.check(asked)
    work = _Diagnosis(subject, checkpoint, precision, out or _beside(checkpoint), again)
    records = [work.done(name, MEASURES[name]) for name in MEASURES if name in chosen]
    if TUNED_LENS in chosen:
        records.append(work.tuned_lens(lens_steps))
    for name in ATTRIBUTIONS:
        if name in chosen:
            records.append(work.attribution(name, prompt))
    if questioning is not None:
        how = f"{tasks.shots} shots, {tasks.examples} questions, version {TASKS_VERSION}"
        for kind in KINDS:
            records += [
                work.done(kind, lambda s, k=kind, t=task: task_curves(s, k, t, questioning), f"{task.name}, {how}")  # type: ignore[misc]
                for task in asked
                if kind in chosen
            ]
    by_name = {record.examination.measure: record.result for record in records if not record.examination.options}
    return [*records, work.record(SIGNATURES, Result(signatures=signature_table(by_name, size)), 0.0)]


class _Diagnosis:
    """Measures one thing at a time, or remembers it."""

    def __init__(self, subject: Subject, checkpoint: Checkpoint, precision: str, file: Path | None, again: bool):
        self._subject, self._checkpoint, self._precision, self._file = subject, checkpoint, precision, file
        self._known = {} if again or file is None else broadcast_object(read_results(file))
        self._sha256 = subject.prompts.sha256

    def record(self, measure: str, result: Result, seconds: float, options: str = "") -> DiagnosisRecord:
        """What was found, as it is remembered."""
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        return DiagnosisRecord(self._examination(measure, options), result, round(seconds, 3), moment)

    def done(self, name: str, measure: Callable[[Subject], Result], options: str = "") -> DiagnosisRecord:
        """Measure, and write it down."""
        if (known := self._known.get(self._examination(name, options))) is not None:
            return known
        began = time.perf_counter()
        try:
            result = measure(self._subject)
        except ValidationError:
            raise MegaloopError(
                f"{name}: the model's numbers are NaN, infinite or huge in {self._precision}, and nothing can be said of them"
            ) from None
        record = self.record(name, result, time.perf_counter() - began, options)
        if self._file is not None and rank() == 0:
            append_result(self._file, record)
        return record

    def tuned_lens(self, steps: int) -> DiagnosisRecord:
        """The lens, trained on samples of the run's own data; it is kept beside the results."""

        def measure(subject: Subject) -> Result:
            tuned = self._trained(steps)
            return lens_curves(subject, tuned)

        return self.done(TUNED_LENS, measure, f"{steps} steps")

    def attribution(self, name: Literal["erasure", "gradients"], prompt: int) -> DiagnosisRecord:
        tokenizer = self._checkpoint.open_tokenizer("tokens are shown as text")
        return self.done(name, lambda subject: attribution(subject, name, prompt, tokenizer), f"prompt {prompt}")

    def _trained(self, steps: int) -> TunedLens:
        model, manifest = self._subject.model, self._checkpoint.manifest
        path = _own_data(self._checkpoint, "a tuned lens is trained on a run's own")
        samples = training_prompts(
            open_as_trained(self._checkpoint, path), _LENS_SAMPLES, model.config.document_masking
        )
        name = f"step-{manifest.step:08}"
        if self._file != _beside(self._checkpoint):  # which several models may share
            name += f"-{manifest.checksum[:12]}"
        file = self._file.parent / "lenses" / f"{name}.safetensors" if self._file else None
        shape = model.plan.depth, model.config.hidden_size, manifest.checksum
        tuned, optimizer = TunedLens(*shape).to(model.device), None
        if file is not None and file.is_file():
            tuned, optimizer, planned = load_lens(file, *shape, device=model.device)
            if planned != steps:
                tuned, optimizer = TunedLens(*shape).to(model.device), None
        on_part = self._subject.on_part
        train_lens(
            model,
            tuned,
            samples,
            steps=steps,
            file=file if rank() == 0 else None,
            optimizer=optimizer,
            on_step=lambda step, loss: on_part("training the tuned lens", step, steps),
        )
        return tuned.requires_grad_(False)

    def _examination(self, measure: str, options: str) -> Examination:
        manifest, subject = self._checkpoint.manifest, self._subject
        return Examination(
            measure=measure,
            prompts=subject.prompts.source,
            prompts_sha256=self._sha256,
            count=len(subject.prompts),
            depth=str(manifest.plan),
            block=subject.block,
            step=manifest.step,
            checkpoint=_identity(manifest),
            precision=self._precision,
            seed=subject.seed,
            version=VERSION,
            options=options,
        )


def _identity(manifest: Manifest) -> str:
    """What tells a model from others: its manifest's checksum; of one that was imported, which is written anew with every call, that of what is in it."""
    if manifest.data.paths:
        return manifest.checksum
    files = sorted((file.path, file.bytes, file.checksum) for file in manifest.files)
    content = json.dumps([files, manifest.plan.to_json(), manifest.model.to_json()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _block(plan: DepthPlan, block: int | None) -> int:
    size = block or (plan.loop.block if plan.loop else min(_BLOCK, plan.depth))
    if not 1 <= size <= plan.depth:
        raise MegaloopError(f"--block {size}: the model executes {plan.depth} layers; choose 1 to {plan.depth}")
    return size


def _beside(checkpoint: Checkpoint) -> Path | None:
    folder = checkpoint.path.absolute().parent
    return folder.parent / DIAGNOSIS if folder.name == "checkpoints" else None
