"""A data set on disk: ``data.json`` and MDS shards, as ``megaloop prep`` writes them."""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from megaloop.data.streaming_base import mds_reader
from megaloop.errors import MegaloopError

__all__ = ["COLUMNS", "DATA_JSON", "HASH", "DataSet", "Description", "Sample", "SourceEntry", "Split", "SplitEntry"]

DATA_JSON = "data.json"
FORMAT_VERSION = 1
HASH = "xxh3_128"
COLUMNS = {"tokens": "bytes", "starts": "bytes", "text_bytes": "int"}
"""MDS columns: token ids (little-endian, of data.json's dtype), document starts (int32), bytes of text."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TokenizerEntry(_Model):
    """The tokenizer: its file, SHA-256 and size."""

    file: str
    sha256: str
    vocab_size: PositiveInt
    bos_id: int
    eos_id: int


class SplitEntry(_Model):
    """Counts of one split; ``bytes`` of UTF-8 text, ``tokens`` with one end-of-text token per document."""

    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    samples: NonNegativeInt


class SourceEntry(_Model):
    """One input file and what came of it."""

    path: str
    bytes: NonNegativeInt
    documents: NonNegativeInt
    skipped: NonNegativeInt


class Description(_Model):
    """``data.json``: written last; a directory without it is no data set.

    ``indices`` are the SHA-256 of the splits' ``index.json``, which in turn holds the shards' checksums.
    """

    format_version: int
    megaloop: str
    tokenizer: TokenizerEntry
    sequence_length: PositiveInt
    dtype: Literal["uint16", "uint32"]
    splits: dict[Literal["train", "validation"], SplitEntry]
    indices: dict[Literal["train", "validation"], str]
    sources: list[SourceEntry]
    validation_fraction: float


class _Version(BaseModel):
    """The one key that every version of ``data.json`` has."""

    format_version: int


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        tokens: sequence_length + 1 token ids.
        starts: positions among the first sequence_length at which a document begins, ascending.
        bytes: UTF-8 bytes of text that the predicted tokens (all but the first) stand for.
        learnt: which of the predicted tokens count, bool [sequence_length]; None: all of them.
    """

    tokens: NDArray[np.int64]
    starts: NDArray[np.int32]
    bytes: int
    learnt: NDArray[np.bool_] | None = None


class DataSet:
    """An opened data set.

    Attributes:
        path: its directory.
        description: what ``data.json`` says.
        sequence_length: tokens per sample as read, at most the shards'.
    """

    def __init__(self, path: Path, description: Description, sequence_length: int):
        self.path, self.description, self.sequence_length = path, description, sequence_length
        self.pieces = description.sequence_length // sequence_length
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(cls, path: Path, sequence_length: int | None = None) -> DataSet:
        """Open a data set; shards are checked for presence and size now, and by hash when first used.

        Args:
            sequence_length: tokens per sample; shorter than the shards' where it divides that, each stored
                sample then serves as several.

        Raises:
            MegaloopError: no data set, a damaged one, or shards too short for ``sequence_length``.
        """
        try:
            content = (path / DATA_JSON).read_bytes()
            version = _Version.model_validate_json(content).format_version
            if version != FORMAT_VERSION:
                raise MegaloopError(
                    f"data {path}: format version {version}, expected {FORMAT_VERSION}; prepare it again"
                )
            description = Description.model_validate_json(content)
        except (FileNotFoundError, NotADirectoryError):
            raise MegaloopError(
                f"data {path}: no {DATA_JSON} there; make a data set with 'megaloop prep INPUT --out {path}'"
            ) from None
        except OSError as error:
            raise MegaloopError(f"data {path}: {DATA_JSON} cannot be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise MegaloopError(
                f"data {path}: {DATA_JSON} is damaged ({where}: {first['msg']}); prepare it again"
            ) from None
        if Path(description.tokenizer.file).name != description.tokenizer.file:
            raise MegaloopError(f"data {path}: {DATA_JSON} names a tokenizer outside the data set; prepare it again")
        for split in ("train", "validation"):
            if split not in description.splits or split not in description.indices:
                raise MegaloopError(f"data {path}: {DATA_JSON} lacks the {split} split; prepare it again")
        stored = description.sequence_length
        wanted = sequence_length or stored
        if wanted > stored:
            raise MegaloopError(
                f"data.sequence_length {wanted} is longer than the {stored} tokens of the samples in {path}; "
                f"use {stored} or less, or prepare the data with --sequence-length {wanted}"
            )
        if stored % wanted:
            raise MegaloopError(
                f"data.sequence_length {wanted} does not divide the {stored} tokens of the samples in {path}; "
                f"use a divisor of {stored}, or prepare the data with --sequence-length {wanted}"
            )
        return cls(path, description, wanted)

    @property
    def tokenizer(self) -> Path:
        return self.path / self.description.tokenizer.file

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.description.tokenizer.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        return self.description.tokenizer.sha256

    def sha256(self, split: Literal["train", "validation"]) -> str:
        """What tells the samples of a split apart from others'; the sequence length aside."""
        return self.description.indices[split]

    def describe(self) -> str:
        """What there is to train on."""
        train = self.description.splits["train"]
        return (
            f"{train.tokens:,} tokens of {train.documents:,} documents, "
            f"{len(self.split('train')):,} samples of {self.sequence_length}"
        )

    def split(self, name: Literal["train", "validation"]) -> Split:
        """The samples of a split."""
        if name not in self._splits:
            self._splits[name] = Split(self, name)
        return self._splits[name]

    def verify(self) -> None:
        """Hash every shard now. Raises MegaloopError that names the one that was altered."""
        for name in self.description.splits:
            self.split(name).verify()


class Split:
    """Random access to the samples of one split; thread-safe.

    Attributes:
        shard_sizes: samples of each shard.
    """

    def __init__(self, dataset: DataSet, name: Literal["train", "validation"]):
        self._dataset, self._name, self._directory = dataset, name, dataset.path / name
        self._dtype = np.dtype(dataset.description.dtype).newbyteorder("<")
        self._pieces = dataset.pieces
        self._readers: list[Any] = []
        entries = self._read_index()
        self._entries = [entry["raw_data"] for entry in entries]
        self._verified = [False] * len(entries)
        self._lock = threading.Lock()
        self.shard_sizes = [entry["samples"] * self._pieces for entry in entries]
        self._ends = list(accumulate(entry["samples"] for entry in entries))

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def sample(self, index: int) -> Sample:
        """Sample ``index`` of the split."""
        stored, piece = divmod(index, self._pieces)
        shard = bisect_right(self._ends, stored)
        if not self._verified[shard]:
            self._verify(shard)
        first = self._ends[shard - 1] if shard else 0
        record = self._readers[shard][stored - first]
        length = self._dataset.sequence_length
        start = piece * length
        tokens = np.frombuffer(record["tokens"], self._dtype)
        starts = np.frombuffer(record["starts"], "<i4")
        size = record["text_bytes"]
        if self._pieces > 1:
            # text is spread over a stored sample's tokens: counts per piece are in proportion, and sum up exactly
            whole = len(tokens) - 1
            size = size * (start + length) // whole - size * start // whole
            starts = starts[(starts >= start) & (starts < start + length)] - start
            tokens = tokens[start : start + length + 1]
        return Sample(tokens.astype(np.int64), starts.astype(np.int32), size)

    def verify(self) -> None:
        for shard in range(len(self._readers)):
            self._verify(shard)

    def _read_index(self) -> list[dict[str, Any]]:
        path = self._directory / "index.json"
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self._dataset.description.indices[self._name]:
                raise MegaloopError(f"data {path}: altered (its SHA-256 does not match); prepare the data again")
            shards: list[dict[str, Any]] = json.loads(content)["shards"]
            for entry in shards:
                raw = entry["raw_data"]
                basename, expected = raw["basename"], raw["bytes"]
                if not (isinstance(entry["samples"], int) and isinstance(raw["hashes"], dict)):
                    raise TypeError
                if Path(basename).name != basename:
                    raise MegaloopError(
                        f"data {path}: shard {basename!r} points outside the data set; prepare it again"
                    )
                try:
                    size = (self._directory / basename).stat().st_size
                except FileNotFoundError:
                    raise MegaloopError(
                        f"data {self._directory / basename}: shard is missing; prepare the data again"
                    ) from None
                if size != expected:
                    raise MegaloopError(
                        f"data {self._directory / basename}: shard has {size} bytes, expected {expected}; prepare the data again"
                    )
                self._readers.append(self._reader(entry))
            return shards
        except FileNotFoundError:
            raise MegaloopError(f"data {path}: missing; prepare the data again") from None
        except OSError as error:
            raise MegaloopError(f"data {path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise MegaloopError(f"data {path}: damaged; prepare the data again") from None

    def _reader(self, entry: dict[str, Any]) -> Any:
        # only these encodings, each column once: MDS also knows one that unpickles
        columns = list(zip(entry["column_names"], entry["column_encodings"], strict=True))
        if sorted(columns) != sorted(COLUMNS.items()) or entry["compression"] or entry["format"] != "mds":
            raise MegaloopError(
                f"data {self._directory}: shards of another layout than megaloop's; prepare the data again"
            )
        return mds_reader().from_json(str(self._directory.parent), self._directory.name, entry)

    def _verify(self, shard: int) -> None:
        """Hash a shard, once."""
        with self._lock:
            if self._verified[shard]:
                return
            raw = self._entries[shard]
            path = self._directory / raw["basename"]
            digest = xxhash.xxh3_128()
            try:
                with path.open("rb") as file:
                    while block := file.read(8 << 20):
                        digest.update(block)
            except OSError as error:
                raise MegaloopError(f"data {path}: shard cannot be read ({error.strerror})") from None
            if digest.hexdigest() != raw["hashes"].get(HASH):
                raise MegaloopError(
                    f"data {path}: shard was altered (its {HASH} does not match); prepare the data again"
                )
            self._verified[shard] = True
