"""Look inside models: measure what was asked for, or take what was measured before, and say which signatures are seen.

Runs on one process or data-parallel, as evaluation does: batches of prompts go round the ranks, and every rank gets all results.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
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
from megaloop.analysis.named_model import NamedModel, open_named
from megaloop.analysis.prompts import Prompts
from megaloop.analysis.rehearsal import Rehearsal
from megaloop.analysis.request import Request, block_layers, own_results
from megaloop.analysis.results import DiagnosisRecord, Examination, Result, append_result, check_results, read_results
from megaloop.analysis.run_lens import RunLens
from megaloop.analysis.signature_table import signature_table
from megaloop.checkpoint import Checkpoint, Manifest
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.evaluation.primitives import Questioning
from megaloop.inference.load import load_decoder
from megaloop.model import Decoder
from megaloop.runtime.collectives import broadcast_object, raise_on_all_ranks
from megaloop.runtime.share import OnPart, rank
from megaloop.text import printable
from megaloop.tokenizer import Tokenizer

__all__ = ["MEASURES", "SIGNATURES", "TUNED_LENS", "default_measures", "diagnose"]

VERSION = 4
"""Of the definitions, and of how they are computed; results of different versions do not compare."""
SIGNATURES, TUNED_LENS = "signatures", "tuned-lens"
Attribution = Literal["erasure", "gradients"]
ATTRIBUTIONS: tuple[Attribution, ...] = ("erasure", "gradients")
"""Of one prompt each."""


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
"""By name, in the order in which they are done. After them come ``tuned-lens``, which is trained first, and ``erasure`` and ``gradients``, of one prompt each."""


def default_measures(plan: DepthPlan, block: int) -> list[str]:
    """All of :data:`MEASURES` that the model allows."""
    without = {"loops"} if plan.loop is None else set()
    without |= {"symmetry"} if plan.layers < 2 * block else set()
    return [name for name in MEASURES if name not in without]


def diagnose(
    models: Sequence[Path], request: Request = Request(), on_part: OnPart | None = None
) -> list[list[DiagnosisRecord]]:
    """Measure models (a run's newest checkpoint), or take what was measured before; the last record of each has its signatures.

    All are found and checked before the first is measured; one at a time is in memory.

    Raises:
        MegaloopError: an unknown measure or task, a model that is not there or damaged, prompts that are missing or too short, a block
            that does not fit, a lens of another checkpoint or of other data.
    """
    _check_names(request)
    several = len(models) > 1
    examinees: list[_Examinee] = []
    found: list[list[DiagnosisRecord]] = []
    with ExitStack() as stack:
        for model in models:
            named = stack.enter_context(open_named(model))
            with raise_on_all_ranks(), named.errors(several):
                examinees.append(_checked(named, request))
        for examinee in examinees:
            with examinee.named.errors(several):
                found.append(_measured(examinee, request, on_part or _silent))
    return found


def _check_names(request: Request) -> None:
    """MegaloopError: a measure or a task that is not known."""
    known = (*MEASURES, TUNED_LENS, *ATTRIBUTIONS)
    if unknown := [name for name in request.measures or () if name not in known]:
        raise MegaloopError(f"--measures: {printable(unknown[0], 60)} is none of {', '.join(known)}")
    request.tasks.chosen()


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class _Examinee:
    """A model that can be measured as was asked.

    Attributes:
        block: layers of a block.
        measures: names of those that were asked for, or that the model allows.
        vocab_size: the tokenizer's tokens, or all rows of the head.
        tokenizer: None: the checkpoint holds none, and none is needed.
        lens: None: no tuned lens was asked for.
    """

    named: NamedModel
    prompts: Prompts
    block: int
    measures: Sequence[str]
    vocab_size: int
    tokenizer: Tokenizer | None
    lens: RunLens | None

    def questioning(self, model: Decoder, request: Request, on_part: OnPart) -> Questioning | None:
        """How primitives are asked; None: they are not."""
        tasks = request.tasks
        if not tasks.chosen() or self.tokenizer is None:
            return None
        return Questioning(model, self.tokenizer, tasks.shots, tasks.examples, request.seed, on_part)


def _checked(named: NamedModel, request: Request) -> _Examinee:
    """What is measured of a model; MegaloopError where something that was asked for cannot be. Its numbers are not read."""
    checkpoint, manifest, tasks = named.checkpoint, named.checkpoint.manifest, request.tasks.chosen()
    prompts = request.prompts.read(checkpoint, manifest.model.document_masking)
    block = block_layers(manifest, request.block)
    chosen = default_measures(manifest.plan, block) if request.measures is None else request.measures
    if tasks and not set(KINDS) & set(chosen):
        raise MegaloopError(
            f"--tasks: scores interventions, and none is among the measures; add one of {', '.join(KINDS)}"
        )
    tokenizer = None
    if manifest.tokenizer is not None or tasks or set(ATTRIBUTIONS) & set(chosen):
        tokenizer = checkpoint.open_tokenizer("questions are text" if tasks else "tokens are shown as text")
    lens = RunLens.of(checkpoint, request.out or own_results(checkpoint)) if TUNED_LENS in chosen else None
    vocab_size = manifest.vocab_size if tokenizer is None else tokenizer.vocab_size
    examinee = _Examinee(named, prompts, block, chosen, vocab_size, tokenizer, lens)
    _rehearse(examinee, request, Rehearsal.of(manifest.plan, prompts, block, request.seed))
    return examinee


def _rehearse(examinee: _Examinee, request: Request, subject: Rehearsal) -> None:
    """MegaloopError where a measure refuses the model or its prompts."""
    for name in MEASURES:
        if name in examinee.measures:
            subject.check(MEASURES[name])
    if (tokenizer := examinee.tokenizer) is not None:
        for name, number in _attributions(examinee, request):
            subject.check(partial(attribution, name=name, number=number, tokenizer=tokenizer))
    if (questioning := examinee.questioning(subject.model, request, _silent)) is not None:
        questioning.check(request.tasks.chosen())


def _attributions(examinee: _Examinee, request: Request) -> list[tuple[Attribution, int]]:
    """Which, and of which prompt."""
    numbers = dict.fromkeys(request.attributed)
    return [(name, number) for name in ATTRIBUTIONS if name in examinee.measures for number in numbers]


def _measured(examinee: _Examinee, request: Request, on_part: OnPart) -> list[DiagnosisRecord]:
    """The records of one model, which is in memory as long as that takes."""
    chosen, tokenizer = examinee.measures, examinee.tokenizer
    with examinee.named.complete() as path:
        model, checkpoint = load_decoder(path, precision=request.precision)
        subject = Subject(model, examinee.prompts, examinee.block, request.seed, examinee.vocab_size, on_part)
        work = _Diagnosis(subject, checkpoint, request)
        records = [work.done(name, MEASURES[name]) for name in MEASURES if name in chosen]
        if examinee.lens is not None:
            records.append(work.tuned_lens(examinee.lens, request.lens_steps))
        if tokenizer is not None:
            records += [work.attribution(name, number, tokenizer) for name, number in _attributions(examinee, request)]
        if (questioning := examinee.questioning(model, request, on_part)) is not None:
            how = request.tasks.how
            for kind in KINDS:
                records += [
                    work.done(kind, lambda s, k=kind, t=task: task_curves(s, k, t, questioning), f"{task.name}, {how}")  # type: ignore[misc]
                    for task in request.tasks.chosen()
                    if kind in chosen
                ]
        by_name = {record.examination.measure: record.result for record in records if not record.examination.options}
        return [*records, work.record(SIGNATURES, Result(signatures=signature_table(by_name, examinee.block)), 0.0)]


class _Diagnosis:
    """Measures one thing at a time, or remembers it."""

    def __init__(self, subject: Subject, checkpoint: Checkpoint, request: Request):
        self._subject, self._manifest, self._precision = subject, checkpoint.manifest, request.precision
        self._file = file = request.out or own_results(checkpoint)
        self._known = {} if request.again or file is None else broadcast_object(read_results(file))
        self._sha256 = subject.prompts.sha256

    def record(self, measure: str, result: Result, seconds: float, options: str = "") -> DiagnosisRecord:
        """What was found, as it is remembered."""
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        return DiagnosisRecord(self._examination(measure, options), result, round(seconds, 3), moment)

    def done(self, name: str, measure: Callable[[Subject], Result], options: str = "") -> DiagnosisRecord:
        """Measure, and write it down."""
        if (known := self._known.get(self._examination(name, options))) is not None:
            return known
        with raise_on_all_ranks():
            if self._file is not None and rank() == 0:
                check_results(self._file)
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

    def tuned_lens(self, lens: RunLens, steps: int) -> DiagnosisRecord:
        """The lens, trained on samples of the run's own data; it is kept beside the results."""

        def measure(subject: Subject) -> Result:
            return lens_curves(subject, lens.trained(subject.model, steps, subject.on_part))

        return self.done(TUNED_LENS, measure, f"{steps} steps on {lens.source}")

    def attribution(self, name: Attribution, number: int, tokenizer: Tokenizer) -> DiagnosisRecord:
        """Of one prompt, which the progress names."""
        which = f"prompt {number}"

        def measure(subject: Subject) -> Result:
            on_part = subject.on_part
            told = replace(subject, on_part=lambda what, done, total: on_part(f"{what}, {which}", done, total))
            return attribution(told, name, number, tokenizer)

        return self.done(name, measure, which)

    def _examination(self, measure: str, options: str) -> Examination:
        manifest, subject = self._manifest, self._subject
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
