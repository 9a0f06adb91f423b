"""The data sets of a run's configuration, opened together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megaloop.config import Config, DataConfig
from megaloop.data.dataset import DataSet
from megaloop.data.description import DATA_JSON
from megaloop.data.order import CURRENT, SampleOrder
from megaloop.data.sft import FineTuningSet
from megaloop.errors import MegaloopError
from megaloop.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Sources", "embedding_rows", "open_sources", "open_tokenizer"]


@dataclass(frozen=True)
class Sources:
    """One or more data sets that share a tokenizer.

    Attributes:
        datasets: the sources, in configuration order.
        weights: their shares.
        cooldown: their shares in the cooldown.
    """

    datasets: tuple[DataSet, ...] | tuple[FineTuningSet, ...]
    weights: tuple[float, ...]
    cooldown: tuple[float, ...]

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.datasets[0].vocab_size

    @property
    def tokenizer(self) -> Path:
        return self.datasets[0].tokenizer

    @property
    def tokenizer_sha256(self) -> str:
        return self.datasets[0].tokenizer_sha256

    def order(self, seed: int, cooldown_sample: int | None = None, version: int = CURRENT) -> SampleOrder:
        """The order of the sources' training samples.

        Args:
            cooldown_sample: the first with the cooldown's shares; None: no cooldown comes.
            version: of the order; that of the run, where it goes on.

        Raises:
            MegaloopError: a version that is not known.
        """
        sizes = [dataset.split("train").shard_sizes for dataset in self.datasets]
        changes = [] if cooldown_sample is None or self.cooldown == self.weights else [(cooldown_sample, self.cooldown)]
        return SampleOrder(seed, sizes, self.weights, changes, version)

    def describe(self) -> str:
        """One line about each source."""
        lines = []
        for number, (weight, cooldown) in enumerate(zip(self.weights, self.cooldown, strict=True)):
            dataset = self.datasets[number]
            share, changed = weight / sum(self.weights), cooldown / sum(self.cooldown)
            lines.append(
                f"data {dataset.path}: {dataset.describe()}, share {share:.0%}"
                + (f", {changed:.0%} in the cooldown" if changed != share else "")
            )
        return "\n".join(lines)


def open_sources(config: DataConfig, init: Path | None = None) -> Sources:
    """Open every source of a configuration.

    Args:
        init: the checkpoint (or run) that the run begins with, whose tokenizer fine-tuning takes.

    Raises:
        MegaloopError: one cannot be opened, holds no training sample, or has another tokenizer than the first.
    """
    stable, cooldown = (tuple(source.weights[phase] for source in config.sources) for phase in (0, 1))
    if config.format == "sft":
        tokenizer = open_tokenizer(config.tokenizer) if config.tokenizer else _tokenizer_of(init)
        return Sources(
            tuple(FineTuningSet(source.path, tokenizer, config) for source in config.sources), stable, cooldown
        )
    datasets = tuple(DataSet.open(source.path, config.sequence_length) for source in config.sources)
    for dataset in datasets:
        entry = dataset.description.tokenizer
        dataset.open_tokenizer()
        if entry.sha256 != datasets[0].description.tokenizer.sha256:
            raise MegaloopError(
                f"data {dataset.path} has another tokenizer (SHA-256 {entry.sha256[:12]}) than {datasets[0].path} "
                f"({datasets[0].tokenizer_sha256[:12]}); prepare it again with --tokenizer {datasets[0].tokenizer}"
            )
        if not len(dataset.split("train")):
            raise MegaloopError(f"data {dataset.path}: no training samples")
    return Sources(datasets, stable, cooldown)


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a path names: a data set's or a checkpoint's, verified as they are, a model directory's, or a file.

    Raises:
        MegaloopError: there is none, or it is damaged.
    """
    if (path / DATA_JSON).is_file():
        return DataSet.open(path).open_tokenizer()
    from megaloop.checkpoint import Checkpoint
    from megaloop.checkpoint.manifest import MANIFEST

    if (path / MANIFEST).is_file():
        with Checkpoint.open(path, verify="sizes") as checkpoint:
            return checkpoint.open_tokenizer(f"--tokenizer {path} names it")
    return load_tokenizer(path)


def _tokenizer_of(init: Path | None) -> Tokenizer:
    from megaloop.checkpoint import Checkpoint, resolve_checkpoint

    if init is None:
        raise MegaloopError(
            "data.format sft: no tokenizer; begin with a checkpoint that has one (init=CKPT), or set data.tokenizer"
        )
    with Checkpoint.open(resolve_checkpoint(init), verify="sizes") as checkpoint:
        return checkpoint.open_tokenizer("fine-tuning reads text (or set data.tokenizer)")


def embedding_rows(config: Config, sources: Sources) -> int:
    """Rows of the embedding: as configured, or the tokenizer's size rounded up to a multiple of 128.

    Raises:
        MegaloopError: the configured size is smaller than the tokenizer's, or does not divide over tensor parallelism.
    """
    configured, tokens = config.model.vocab_size, sources.vocab_size
    if configured is not None and configured < tokens:
        raise MegaloopError(
            f"model.vocab_size {configured} is smaller than the data's vocabulary of {tokens} tokens; "
            f"set it to {tokens} or more, or leave it out"
        )
    rows = configured or -(-tokens // 128) * 128
    config.check_vocab(rows)
    return rows
