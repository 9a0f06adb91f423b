"""The second pass of ``megaloop prep``: tokenize, pack and write both splits."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from data_prep.floor import FloorSample
from data_prep.pack import SplitWriter, TargetWriter
from data_prep.progress import PassProgress
from data_prep.sources import Inputs, document_hash
from megaloop import __version__
from megaloop.data.description import (
    FORMAT_VERSION,
    TARGET_COUNTS,
    Description,
    SourceEntry,
    SplitEntry,
    TargetsEntry,
    TokenizerEntry,
)
from megaloop.data.targeted import ExampleReader
from megaloop.errors import MegaloopError
from megaloop.tokenizer import Tokenizer, file_sha256

__all__ = ["Shards", "encode_documents", "write_targets", "write_text"]

_BATCH_BYTES = 1 << 20
"""Text per task of a worker, characters."""
_Split = Literal["train", "validation"]
_SPLITS: tuple[_Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Shards:
    """Where the shards of a data set are written, and how.

    Attributes:
        folder: that holds the splits.
        held_out: documents of this hash or a smaller one are held out.
        validation_fraction: as asked for.
    """

    folder: Path
    tokenizer: Tokenizer
    held_out: int
    sequence_length: int
    validation_fraction: float

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    def split_of(self, document: str) -> _Split:
        return "validation" if document_hash(document) <= self.held_out else "train"

    def describe(
        self, documents: Inputs, splits: Mapping[_Split, SplitEntry], targets: TargetsEntry | None = None
    ) -> Description:
        """``data.json`` of what was written.

        Raises:
            MegaloopError: a split without a sample.
        """
        for name, entry in splits.items():
            if not entry.samples:
                less = "" if targets else f", less than one sample of {self.sequence_length + 1}"
                raise MegaloopError(
                    f"too little text: the {name} split has {entry.tokens} tokens in {entry.documents} documents{less}; "
                    "give more text (in more documents) or a shorter --sequence-length"
                )
        return Description(
            format_version=FORMAT_VERSION + (targets is not None),
            megaloop=__version__,
            tokenizer=TokenizerEntry.of(self.tokenizer, self.folder),
            sequence_length=self.sequence_length,
            dtype=self.dtype,
            splits=dict(splits),
            indices={name: file_sha256(self.folder / name / "index.json") for name in _SPLITS},
            sources=[
                SourceEntry(path=str(path), bytes=path.stat().st_size, documents=found, skipped=skipped)
                for path, found, skipped in zip(documents.files, documents.documents, documents.skipped, strict=True)
            ],
            validation_fraction=self.validation_fraction,
            targets=targets,
        )


@contextmanager
def _abandoned_on_error(writers: Collection[SplitWriter] | Collection[TargetWriter]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise


def write_text(documents: Inputs, shards: Shards, workers: int, console: Console | None) -> Description:
    """Both splits of text, whose tokens are all predicted."""
    sizes, tokenizer, dtype = shards.tokenizer.token_bytes(), shards.tokenizer, shards.dtype
    writers = {
        name: SplitWriter(shards.folder / name, shards.sequence_length, dtype, sizes, tokenizer.eos_id)
        for name in _SPLITS
    }
    with _abandoned_on_error(writers.values()):
        with PassProgress(console, "tokenizing", documents) as advance:
            for number, text, tokens in encode_documents(iter(documents), tokenizer, dtype, workers):
                writers[shards.split_of(text)].add(tokens)
                advance(number)
        splits = {name: writer.finish() for name, writer in writers.items()}
    return shards.describe(documents, splits)


def write_targets(documents: Inputs, shards: Shards, reader: ExampleReader, console: Console | None) -> Description:
    """Both splits of documents that carry their targets, and the floor of each difficulty."""
    sizes, sample = shards.tokenizer.token_bytes(), FloorSample()
    writers = {
        name: TargetWriter(shards.folder / name, shards.sequence_length, shards.dtype, sizes, shards.tokenizer.eos_id)
        for name in _SPLITS
    }
    with _abandoned_on_error(writers.values()):
        with PassProgress(console, "packing", documents) as advance:
            for number, line in documents:
                example, split = reader.read(line), shards.split_of(line)
                writers[split].add(example)
                sample.add(example, held_out=split == "validation")
                advance(number)
        splits = {name: writer.finish() for name, writer in writers.items()}
    counts = {name: file_sha256(shards.folder / name / TARGET_COUNTS) for name in _SPLITS}
    return shards.describe(documents, splits, TargetsEntry(counts=dict(counts), floors=sample.floors()))


def encode_documents(
    documents: Iterator[tuple[int, str]], tokenizer: Tokenizer, dtype: str, workers: int
) -> Iterator[tuple[int, str, NDArray[Any]]]:
    """(file number, text, tokens) in the order of ``documents``, tokenized by ``workers`` threads.

    Both libraries encode outside Python's lock, so threads use all cores, and no text is sent between processes.
    At most a few megabytes of text per worker are in flight: memory does not grow with the input.
    """
    prefix = np.array(tokenizer.prefix_ids, dtype=dtype)

    def encode(batch: list[tuple[int, str]]) -> list[NDArray[Any]]:
        encoded = [ids.astype(dtype) for ids in tokenizer.encode_batch([text for _, text in batch])]
        return [np.concatenate([prefix, ids]) for ids in encoded] if len(prefix) else encoded

    waiting: deque[tuple[list[tuple[int, str]], Future[list[NDArray[Any]]]]] = deque()

    def finished() -> Iterator[tuple[int, str, NDArray[Any]]]:
        batch, future = waiting.popleft()
        for (number, text), tokens in zip(batch, future.result(), strict=True):
            yield number, text, tokens

    with ThreadPoolExecutor(workers) as pool:
        for batch in _batches(documents):
            waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) > 2 * workers:
                yield from finished()
        while waiting:
            yield from finished()


def _batches(documents: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    for number, text in documents:
        batch.append((number, text))
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
