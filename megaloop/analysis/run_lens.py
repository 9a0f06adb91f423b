"""The tuned lens of a checkpoint: trained on samples of its run's own data, and kept beside the results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megaloop.analysis.prompts import training_prompts
from megaloop.analysis.request import own_data, own_results
from megaloop.analysis.tuned_lens import LensSource, TunedLens, check_lens, load_lens, train_lens
from megaloop.checkpoint import Checkpoint
from megaloop.data import DataSet
from megaloop.evaluation.held_out import open_as_trained
from megaloop.model import Decoder
from megaloop.runtime.share import OnPart, rank

__all__ = ["RunLens"]

_SAMPLES = 2048
"""Training samples that a lens learns from, at most."""


@dataclass(frozen=True)
class RunLens:
    """What a lens of a checkpoint is of, and where it is kept.

    Attributes:
        dataset: the run's first, in samples as long as those of its training.
        file: None: it is not kept.
    """

    dataset: DataSet
    source: LensSource
    file: Path | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, results: Path | None) -> RunLens:
        """The lens of a checkpoint whose results are kept in a file.

        Raises:
            MegaloopError: the run's data is not known or not there, or a lens of another checkpoint or of other data lies there.
        """
        manifest = checkpoint.manifest
        dataset = open_as_trained(checkpoint, own_data(checkpoint, "a tuned lens is trained on a run's own"))
        samples = min(_SAMPLES, len(dataset.split("train")))
        source = LensSource(manifest.checksum, dataset.sha256("train"), samples, dataset.sequence_length)
        name = f"step-{manifest.step:08}"
        if results != own_results(checkpoint):  # which several models may share
            name += f"-{manifest.checksum[:12]}"
        file = results.parent / "lenses" / f"{name}.safetensors" if results else None
        if file is not None and file.is_file():
            check_lens(file, source)
        return cls(dataset, source, file)

    def trained(self, model: Decoder, steps: int, on_part: OnPart) -> TunedLens:
        """The lens after so many steps; one that was kept on the way to as many goes on."""
        samples = training_prompts(self.dataset, self.source.samples, model.config.document_masking)
        shape = model.plan.depth, model.config.hidden_size, self.source
        tuned, optimizer = TunedLens(*shape).to(model.device), None
        if self.file is not None and self.file.is_file():
            kept, kept_optimizer, planned = load_lens(self.file, *shape, device=model.device)
            if planned == steps:
                tuned, optimizer = kept, kept_optimizer
        train_lens(
            model,
            tuned,
            samples,
            steps=steps,
            file=self.file if rank() == 0 else None,
            optimizer=optimizer,
            on_step=lambda step, loss: on_part("training the tuned lens", step, steps),
        )
        return tuned.requires_grad_(False)
