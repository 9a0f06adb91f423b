"""Look inside models: measure what was asked for, or take what was measured before, and say which signatures are seen.

Runs on one process or data-parallel, as evaluation does: batches of prompts go round the ranks, and every rank gets all results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from megaloop.analysis.interventions import KINDS, Kind
from megaloop.analysis.measures import (
    Subject,
    contribution_curves,
    depth_scores,
    effect_matrices,
    intervention_curves,
    lens_curves,
)
from megaloop.analysis.prompts import Prompts, held_out_prompts, read_prompts
from megaloop.analysis.results import DIAGNOSIS, DiagnosisRecord, Examination, Result, append_result, read_results
from megaloop.analysis.signature_table import signature_table
from megaloop.checkpoint import Checkpoint
from megaloop.data import DataSet
from megaloop.errors import MegaloopError
from megaloop.inference.load import load_decoder
from megaloop.runtime.collectives import broadcast_object
from megaloop.runtime.share import OnPart, rank
from megaloop.text import printable

__all__ = ["DEFAULT_MEASURES", "MEASURES", "SIGNATURES", "PromptSource", "diagnose"]

VERSION = 1
"""Of the definitions; results of different versions do not compare."""
SIGNATURES = "signatures"
_BLOCK = 4


def _intervention(kind: Kind) -> Callable[[Subject], Result]:
    return lambda subject: intervention_curves(subject, kind)


MEASURES: dict[str, Callable[[Subject], Result]] = {
    "contributions": contribution_curves,
    "effects": effect_matrices,
    "depth-score": depth_scores,
    "lens": lens_curves,
    **{kind: _intervention(kind) for kind in KINDS},
}
"""By name, in the order in which they are done."""
DEFAULT_MEASURES = tuple(MEASURES)


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
        paths = checkpoint.manifest.data.paths
        path = self.path or (paths[0] if paths else None)
        if path is None:
            raise MegaloopError("diagnose: the checkpoint does not know its data; name prompts with --prompts")
        if path.is_dir():
            dataset = DataSet.open(path)
            checkpoint.check_tokenizer(path, dataset.tokenizer_sha256)
            return held_out_prompts(dataset, self.count, document_masking)
        return read_prompts(path, checkpoint.open_tokenizer("prompts are text"), self.count, self.field)


def diagnose(
    path: Path,
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    prompts: PromptSource = PromptSource(),
    block: int | None = None,
    seed: int = 123,
    precision: Literal["fp32", "bf16"] = "fp32",
    again: bool = False,
    out: Path | None = None,
    on_part: OnPart | None = None,
) -> list[DiagnosisRecord]:
    """Measure a checkpoint (or a run's newest), or take what was measured before; the last record has the signatures.

    Args:
        measures: names of :data:`MEASURES`.
        block: layers of a block; None: of the loop, or of the growth, as the checkpoint says, else 4.
        again: measure anew what ``out`` holds already.
        out: the file that remembers; None: RUN/diagnosis.jsonl for a run and for its checkpoints, no file otherwise.

    Raises:
        MegaloopError: an unknown measure, a damaged checkpoint, prompts that are missing or too short, a block that does not fit.
    """
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise MegaloopError(f"--measures: {printable(unknown[0], 60)} is none of {', '.join(MEASURES)}")
    model, checkpoint = load_decoder(path, precision=precision)
    manifest = checkpoint.manifest
    found = prompts.read(checkpoint, model.config.document_masking)
    size = _block(checkpoint, block)
    vocab_size = checkpoint.open_tokenizer("the head has rows for it").vocab_size if manifest.tokenizer else None
    subject = Subject(model, found, size, seed, vocab_size, on_part or (lambda label, done, total: None))
    file = out or _beside(checkpoint)
    known = {} if again or file is None else broadcast_object(read_results(file))
    sha256 = found.sha256

    def examination(name: str) -> Examination:
        return Examination(
            measure=name,
            prompts=found.source,
            prompts_sha256=sha256,
            count=len(found),
            depth=str(manifest.plan),
            block=size,
            step=manifest.step,
            checkpoint=manifest.checksum,
            precision=precision,
            seed=seed,
            version=VERSION,
        )

    def done(name: str, measure: Callable[[], Result]) -> DiagnosisRecord:
        asked = examination(name)
        if asked in known:
            return known[asked]
        began = time.perf_counter()
        record = DiagnosisRecord(
            asked, measure(), round(time.perf_counter() - began, 3), datetime.now(UTC).isoformat(timespec="seconds")
        )
        if file is not None and rank() == 0:
            append_result(file, record)
        return record

    records = [done(name, lambda name=name: MEASURES[name](subject)) for name in MEASURES if name in measures]  # type: ignore[misc]
    by_name = {record.examination.measure: record.result for record in records}
    table = Result(signatures=signature_table(by_name, size))
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    return [*records, DiagnosisRecord(examination(SIGNATURES), table, 0.0, moment)]


def _block(checkpoint: Checkpoint, block: int | None) -> int:
    plan = checkpoint.manifest.plan
    size = block or (plan.loop.block if plan.loop else min(_BLOCK, plan.depth))
    if not 1 <= size <= plan.depth:
        raise MegaloopError(f"--block {size}: the model executes {plan.depth} layers; choose 1 to {plan.depth}")
    return size


def _beside(checkpoint: Checkpoint) -> Path | None:
    folder = checkpoint.path.absolute().parent
    return folder.parent / DIAGNOSIS if folder.name == "checkpoints" else None
