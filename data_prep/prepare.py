"""``megaloop prep``: text files to a data set of token shards."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from data_prep.progress import PassProgress
from data_prep.publish import Output
from data_prep.sources import HASH_RANGE, Inputs, document_hash, find_inputs
from data_prep.tokenizer import train_byte_level, train_sentencepiece
from data_prep.write import Shards, write_targets, write_text
from megaloop.data.dataset import DataSet
from megaloop.data.sources import open_tokenizer
from megaloop.data.targeted import ExampleReader, MarkedText, TokenLists, answer_marks
from megaloop.errors import MegaloopError
from megaloop.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from megaloop.tokenizer.files import FOLDER, SENTENCEPIECE

__all__ = ["PrepSummary", "available_cores", "prepare"]

_TRAINING_BYTES = 32 << 20
"""Text at most on which a tokenizer is trained, drawn evenly from all input by document hash."""


@dataclass(frozen=True)
class PrepSummary:
    """What ``prepare`` made; ``tokens`` count one end-of-text token per document, ``bytes`` are UTF-8 text.

    ``targets`` are those of the training samples, where documents carry their own, and ``floors`` what guessing scores by difficulty
    (-1: not given); None: every token is a target.
    """

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
    targets: int | None = None
    floors: dict[int, float] | None = None


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
    targets: bool = False,
    marks: str | None = None,
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
        targets, marks: documents carry their targets, as lists or as marked answers (:mod:`megaloop.data.targeted`).
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
    reader = _reader(documents, reused, sequence_length, targets, marks)
    output = Output(out, overwrite, [*documents.files, *([reused.path] if reused else [])])
    with output:
        held_out, sample = _scan(documents, validation_fraction, sequence_length, reused is None, console)
        if reused is not None:
            kept = copy_tokenizer(reused.path, output.folder)[0]
        else:
            texts = [reader.plain(line) for line in sample] if isinstance(reader, MarkedText) else sample
            kept = _train(texts, vocab_size or 0, train_bpe, output.folder, console)
        shards = Shards(output.folder, load_tokenizer(kept), held_out, sequence_length, validation_fraction)
        if reader is None:
            description = write_text(documents, shards, workers or available_cores(), console)
        else:
            reader = _reader(documents, shards.tokenizer, sequence_length, targets, marks)
            assert reader is not None
            description = write_targets(documents, shards, reader, console)
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
        targets=None if description.targets is None else DataSet.open(out).split("train").targets,
        floors=None
        if description.targets is None
        else {entry.difficulty: round(entry.accuracy, 4) for entry in description.targets.floors},
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


def _reader(
    documents: Inputs, tokenizer: Tokenizer | None, sequence_length: int, targets: bool, marks: str | None
) -> ExampleReader | None:
    """What reads documents that carry their targets, and checks each line; None: documents are text."""
    if not targets and marks is None:
        return None
    option = "--targets" if targets else "--answer-marks"
    if targets and marks is not None:
        raise MegaloopError("--targets reads lists of tokens, --answer-marks text; give one of them")
    other = next((file for file in documents.files if ".jsonl" not in file.suffixes), None)
    if other is not None:
        raise MegaloopError(f"input {other}: {option} reads jsonl alone")
    reader: ExampleReader
    if marks is not None:
        reader = MarkedText(tokenizer, sequence_length, answer_marks(marks), documents.text_of)
    elif tokenizer is None:
        raise MegaloopError("--targets: the lists are of words or ids that a tokenizer has; name it with --tokenizer")
    else:
        reader = TokenLists(tokenizer, sequence_length)
    documents.check_line = reader.check
    return reader


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
    with PassProgress(console, "reading", documents) as advance:
        for number, text in documents:
            digest, size = document_hash(text), len(text.encode())
            count, total = count + 1, total + size
            heapq.heappush(smallest, (-digest, size))
            held += size
            while len(smallest) > 1 and held - smallest[0][1] >= wanted:
                held -= heapq.heappop(smallest)[1]
            if training:
                # kept by another part of the hash, so that what is trained on says nothing of what is held out
                heapq.heappush(sample, (-document_hash(text, b"tokenizer"), text))
                sampled += size
                while len(sample) > 1 and sampled > _TRAINING_BYTES:
                    sampled -= len(heapq.heappop(sample)[1].encode())
            advance(number)
    if not count:
        first = f"; the first: {documents.first_skipped}" if documents.first_skipped else ""
        raise MegaloopError(f"input {documents.files[0]}: no text in it (skipped: {sum(documents.skipped)}{first})")
    while len(smallest) > 1 and held > total // 4:  # little text: most of it is for training
        held -= heapq.heappop(smallest)[1]
    threshold = max(-smallest[0][0], int(fraction * HASH_RANGE) - 1)
    return threshold, [text for _, text in sorted(sample, reverse=True)]
