"""``megaloop prep``: text files to a data set of token shards."""

from __future__ import annotations

import hashlib
import heapq
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.pack import SplitWriter
from data_prep.publish import Output
from data_prep.sources import Inputs, find_inputs
from data_prep.tokenizer import train_byte_level, train_sentencepiece
from megaloop import __version__
from megaloop.data.dataset import FORMAT_VERSION, Description, SourceEntry, TokenizerEntry
from megaloop.data.sources import open_tokenizer
from megaloop.errors import MegaloopError
from megaloop.tokenizer import Tokenizer, copy_tokenizer, file_sha256, load_tokenizer
from megaloop.tokenizer.files import FOLDER, SENTENCEPIECE

__all__ = ["PrepSummary", "available_cores", "encode_documents", "prepare"]

_BATCH_BYTES = 1 << 20
"""Text per task of a worker, characters."""
_TRAINING_BYTES = 32 << 20
"""Text at most on which a tokenizer is trained, drawn evenly from all input by document hash."""
_HASH_RANGE = 1 << 64


@dataclass(frozen=True)
class PrepSummary:
    """What ``prepare`` made; ``tokens`` count one end-of-text token per document, ``bytes`` are UTF-8 text."""

    out: str
    documents: int
    tokens: int
    bytes: int
    train_samples: int
    validation_samples: int
    validation_documents: int
    vocab_size: int
    sequence_length: int
    skipped: int
    seconds: float


def prepare(
    inputs: Sequence[Path],
    out: Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    train_bpe: bool = False,
    sequence_length: int = 2048,
    validation_fraction: float = 0.01,
    errors: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    text_field: str = "text",
    template: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> PrepSummary:
    """Tokenize ``inputs`` into shards in ``out``. The result does not depend on the number of workers.

    Reads the input twice: once to choose what is held out (and what the tokenizer is trained on), once to
    tokenize. Everything is written to a folder within ``out`` (which may be a mount point or a link) and published at
    the end by one rename (:mod:`data_prep.publish`): until then a data set that was there is whole, from then on the new.

    Args:
        inputs: files or directories.
        vocab_size: train a tokenizer of this size; or
        tokenizer: reuse this one: a sentencepiece model, a ``tokenizer.json``, or a directory that holds either.
        train_bpe: what is trained is a byte-level BPE of Hugging Face instead of a sentencepiece model.
        sequence_length: tokens per sample.
        validation_fraction: share of documents held out, chosen by a hash of the document; at least enough for a
            few samples.
        errors: what to do with text that is not UTF-8 or lines that are not JSON: stop, or skip and count.
        workers: threads; default: one per core.
        overwrite: replace a data set that is already there.
        console: where progress is shown; None: nowhere.

    Raises:
        MegaloopError: bad input or options, too little text, a full disk; nothing is left behind, and a data set that was
            there is as it was.
    """
    began = time.perf_counter()
    if (vocab_size is None) == (tokenizer is None):
        raise MegaloopError("give either --vocab-size N to train a tokenizer, or --tokenizer PATH to reuse one")
    if train_bpe and tokenizer is not None:
        raise MegaloopError("--train-bpe trains a tokenizer, and --tokenizer reuses one; give --vocab-size N instead")
    documents = Inputs(find_inputs(inputs), text_field, errors, template)
    reused = _reusable(tokenizer) if tokenizer is not None else None
    output = Output(out, overwrite, [*documents.files, *([reused.path] if reused else [])])
    with output:
        held_out, sample = _scan(documents, validation_fraction, sequence_length, reused is None, console)
        if reused is not None:
            kept = copy_tokenizer(reused.path, output.folder)[0]
        else:
            kept = _train(sample, vocab_size or 0, train_bpe, output.folder, console)
        description = _write_shards(
            documents,
            output.folder,
            load_tokenizer(kept),
            held_out,
            sequence_length,
            validation_fraction,
            workers or available_cores(),
            console,
        )
        own = FOLDER if kept.parent != output.folder else SENTENCEPIECE
        other = SENTENCEPIECE if own == FOLDER else FOLDER
        output.publish(description, ("train", "validation", own), (other,), lambda note: _note(note, console))
    train, validation = description.splits["train"], description.splits["validation"]
    return PrepSummary(
        out=str(output.path),
        documents=train.documents + validation.documents,
        tokens=train.tokens + validation.tokens,
        bytes=train.bytes + validation.bytes,
        train_samples=train.samples,
        validation_samples=validation.samples,
        validation_documents=validation.documents,
        vocab_size=description.tokenizer.vocab_size,
        sequence_length=sequence_length,
        skipped=sum(source.skipped for source in description.sources),
        seconds=time.perf_counter() - began,
    )


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _note(text: str, console: Console | None) -> None:
    if console is not None:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _reusable(path: Path) -> Tokenizer:
    """A tokenizer that a data set can be made with, checked before the input is read."""
    tokenizer = open_tokenizer(path)
    if tokenizer.eos_id < 0:
        raise MegaloopError(
            f"tokenizer {tokenizer.path} has no end-of-text token, so documents could not be told apart; use another"
            + (
                ", or name it as eos_token in a tokenizer_config.json beside it"
                if tokenizer.path.suffix == ".json"
                else ""
            )
        )
    return tokenizer


def _train(sample: list[str], vocab_size: int, byte_level: bool, folder: Path, console: Console | None) -> Path:
    if console is not None:
        console.print(f"training a tokenizer of {vocab_size} tokens", highlight=False)
    if byte_level:
        (folder / FOLDER).mkdir()
        return train_byte_level(sample, vocab_size, folder / FOLDER)
    path = folder / SENTENCEPIECE
    path.write_bytes(train_sentencepiece(sample, vocab_size))
    return path


# --- first pass ---


def _scan(
    documents: Inputs, fraction: float, sequence_length: int, training: bool, console: Console | None
) -> tuple[int, list[str]]:
    """Read everything once: which documents are held out, and a bounded sample to train the tokenizer on.

    Returns:
        The largest hash of a held-out document, and texts (empty unless ``training``).
    """
    wanted = 16 * (sequence_length + 1)  # bytes: at 4 to 5 a token, two to four samples
    smallest: list[tuple[int, int]] = []  # the documents of smallest hash, largest of them first: (-hash, bytes)
    held = count = total = 0
    sample: list[tuple[int, str]] = []
    sampled = 0
    with _Progress(console, "reading", documents) as advance:
        for number, text in documents:
            digest, size = _hash(text), len(text.encode())
            count, total = count + 1, total + size
            heapq.heappush(smallest, (-digest, size))
            held += size
            while len(smallest) > 1 and held - smallest[0][1] >= wanted:
                held -= heapq.heappop(smallest)[1]
            if training:
                # kept by another part of the hash, so that what is trained on says nothing of what is held out
                heapq.heappush(sample, (-_hash(text, b"tokenizer"), text))
                sampled += size
                while len(sample) > 1 and sampled > _TRAINING_BYTES:
                    sampled -= len(heapq.heappop(sample)[1].encode())
            advance(number)
    if not count:
        first = f"; the first: {documents.first_skipped}" if documents.first_skipped else ""
        raise MegaloopError(f"input {documents.files[0]}: no text in it (skipped: {sum(documents.skipped)}{first})")
    while len(smallest) > 1 and held > total // 4:  # little text: most of it is for training
        held -= heapq.heappop(smallest)[1]
    threshold = max(-smallest[0][0], int(fraction * _HASH_RANGE) - 1)
    return threshold, [text for _, text in sorted(sample, reverse=True)]


def _hash(text: str, salt: bytes = b"") -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest(), "big")


# --- second pass ---


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


def _write_shards(
    documents: Inputs,
    partial: Path,
    tokenizer: Tokenizer,
    held_out: int,
    sequence_length: int,
    fraction: float,
    workers: int,
    console: Console | None,
) -> Description:
    """Tokenize, pack and write both splits."""
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    sizes = tokenizer.token_bytes()
    writers = {
        name: SplitWriter(partial / name, sequence_length, dtype, sizes, tokenizer.eos_id)
        for name in ("train", "validation")
    }
    try:
        with _Progress(console, "tokenizing", documents) as advance:
            for number, text, tokens in encode_documents(iter(documents), tokenizer, dtype, workers):
                writers["validation" if _hash(text) <= held_out else "train"].add(tokens)
                advance(number)
        splits = {name: writer.finish() for name, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    for name, entry in splits.items():
        if not entry.samples:
            raise MegaloopError(
                f"too little text: the {name} split has {entry.tokens} tokens in {entry.documents} documents, less than "
                f"one sample of {sequence_length + 1}; give more text (in more documents) or a shorter --sequence-length"
            )
    return Description(
        format_version=FORMAT_VERSION,
        megaloop=__version__,
        tokenizer=TokenizerEntry.of(tokenizer, partial),
        sequence_length=sequence_length,
        dtype=dtype,
        splits=splits,  # type: ignore[arg-type]
        indices={
            "train": file_sha256(partial / "train" / "index.json"),
            "validation": file_sha256(partial / "validation" / "index.json"),
        },
        sources=[
            SourceEntry(path=str(path), bytes=path.stat().st_size, documents=found, skipped=skipped)
            for path, found, skipped in zip(documents.files, documents.documents, documents.skipped, strict=True)
        ],
        validation_fraction=fraction,
    )


class _Progress:
    """A progress bar over the input files by size on a terminal; one plain line per pass elsewhere."""

    def __init__(self, console: Console | None, what: str, documents: Inputs):
        self._ends = np.cumsum([0, *(file.stat().st_size for file in documents.files)])
        self._documents = documents
        self._bar: Progress | None = None
        self._console, self._what = console, what
        if console is not None and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]:,} documents"),
                TimeRemainingColumn(),
                console=console,
            )
        self._count = 0

    def __enter__(self) -> Any:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=float(self._ends[-1]), count=0)
        return self._advance

    def _advance(self, number: int) -> None:
        self._count += 1
        if self._bar is not None and self._count % 16 == 0:
            self._bar.update(self._task, completed=float(self._ends[number]), count=self._count)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.update(self._task, completed=float(self._ends[-1]), count=self._count)
            self._bar.stop()
        elif self._console is not None and kind is None:
            self._console.print(f"{self._what}: {self._count:,} documents", highlight=False)
