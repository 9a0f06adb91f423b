"""What ``data.json`` says of a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from megaloop.tokenizer import Tokenizer, file_sha256, tokenizer_files

__all__ = [
    "COLUMNS",
    "DATA_JSON",
    "FORMAT_VERSION",
    "HASH",
    "TARGET_COLUMNS",
    "TARGET_COUNTS",
    "Description",
    "FloorEntry",
    "SourceEntry",
    "SplitEntry",
    "TargetsEntry",
    "TokenizerEntry",
]

DATA_JSON = "data.json"
FORMAT_VERSION = 1
"""Of data sets whose targets are the next tokens; those with targets of their own have the next version."""
HASH = "xxh3_128"
COLUMNS = {"tokens": "bytes", "starts": "bytes", "text_bytes": "int"}
"""MDS columns: token ids (little-endian, of data.json's dtype), document starts (int32), bytes of text."""
TARGET_COLUMNS = {"targets": "bytes", "difficulties": "bytes"}
"""MDS columns besides, where samples carry targets: of each place (int32, -1: none), the difficulty of each document (int32, -1: not given)."""
TARGET_COUNTS = "targets.u32"
"""File beside a split's shards: how many targets each sample has (uint32)."""
_LARGEST = 1 << 62
"""No count of tokens, bytes or samples is larger."""

Count = Annotated[int, Field(ge=0, lt=_LARGEST)]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
TokenId = Annotated[int, Field(ge=-1, lt=1 << 31)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class TokenizerEntry(_Model):
    """The tokenizer: its file, SHA-256 and size; ``beside`` are the other files of one of Hugging Face, and their SHA-256."""

    file: str
    sha256: str
    vocab_size: Size
    bos_id: TokenId
    eos_id: TokenId
    beside: dict[str, str] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer, folder: Path) -> TokenizerEntry:
        """Describe a tokenizer whose files lie in ``folder``, the data set's."""
        first, *others = tokenizer_files(tokenizer.path)
        return cls(
            file=first.relative_to(folder).as_posix(),
            sha256=file_sha256(first),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            beside={path.relative_to(folder).as_posix(): file_sha256(path) for path in others},
        )


class SplitEntry(_Model):
    """Counts of one split; ``bytes`` of UTF-8 text, ``tokens`` with one end-of-text token per document."""

    documents: Count
    tokens: Count
    bytes: Count
    samples: Count


class SourceEntry(_Model):
    """One input file and what came of it."""

    path: str
    bytes: Count
    documents: Count
    skipped: Count


class FloorEntry(_Model):
    """What the best guesser scores that knows the statistics of a difficulty, but not how its tasks are solved.

    ``accuracy`` over all places with a target, ``last`` on each document's last of them, measured on ``documents``, held-out
    ones and where those are few others that guessers did not learn from; ``guesser`` and ``last_guesser`` say which (:mod:`data_prep.floor`).
    """

    difficulty: TokenId
    accuracy: Annotated[float, Field(ge=0, le=1)]
    last: Annotated[float, Field(ge=0, le=1)]
    documents: Count
    guesser: str
    last_guesser: str


class TargetsEntry(_Model):
    """Of samples that carry targets: the SHA-256 of each split's file of counts, and the floor of each difficulty."""

    counts: dict[Literal["train", "validation"], str]
    floors: list[FloorEntry]

    def floor(self, difficulty: int) -> FloorEntry | None:
        """The floor of a difficulty; None where it was not measured."""
        return next((entry for entry in self.floors if entry.difficulty == difficulty), None)


class Description(_Model):
    """``data.json``: written last; a directory without it is no data set.

    ``indices`` are the SHA-256 of the splits' ``index.json``, which in turn holds the shards' checksums. ``folder`` is
    where parts of the data set are that are not yet in their place: only while prep puts them there, or where it was
    killed meanwhile.
    """

    format_version: int
    megaloop: str
    tokenizer: TokenizerEntry
    sequence_length: Size
    dtype: Literal["uint16", "uint32"]
    splits: dict[Literal["train", "validation"], SplitEntry]
    indices: dict[Literal["train", "validation"], str]
    sources: list[SourceEntry]
    validation_fraction: float
    targets: TargetsEntry | None = None
    folder: str = ""

    def to_json(self) -> bytes:
        """The content of ``data.json``. Keys that are younger than the format are only there where they say something."""
        values = self.model_dump(mode="json")
        if not self.folder:
            del values["folder"]
        if self.targets is None:
            del values["targets"]
        if not self.tokenizer.beside:
            del values["tokenizer"]["beside"]
        return json.dumps(values, indent=1).encode()
