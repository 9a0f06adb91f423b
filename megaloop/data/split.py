"""The samples of one split of a data set: read from its MDS shards, and looked at before they are used."""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megaloop.data.description import COLUMNS, DATA_JSON, HASH, TARGET_COLUMNS, TARGET_COUNTS, Description
from megaloop.data.streaming_base import mds_reader
from megaloop.errors import MegaloopError
from megaloop.text import printable

if TYPE_CHECKING:
    from megaloop.data.dataset import DataSet

__all__ = ["Sample", "Split", "is_name"]

_SIZES = {"tokens": None, "starts": None, "text_bytes": 8, "targets": None, "difficulties": None}
"""Bytes of each column in every sample, where they are the same."""


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        tokens: sequence_length + 1 token ids.
        starts: positions among the first sequence_length at which a document begins, ascending.
        bytes: UTF-8 bytes of text that the predicted tokens (all but the first) stand for.
        loss_mask: which of the predicted tokens count, bool [sequence_length]; None: all of them.
        targets: what each place is to predict, [sequence_length], -1 where nothing counts; None: the token after it.
        difficulties: of each document that begins in it, as ``starts``, -1: not given; None: the samples carry none.
    """

    tokens: NDArray[np.int64]
    starts: NDArray[np.int32]
    bytes: int
    loss_mask: NDArray[np.bool_] | None = None
    targets: NDArray[np.int64] | None = None
    difficulties: NDArray[np.int32] | None = None


def is_name(name: object) -> bool:
    """Whether this is a name within a directory, and leads to no other."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


class Split:
    """Random access to the samples of one split; thread-safe.

    Attributes:
        shard_sizes: samples of each shard.
    """

    def __init__(self, dataset: DataSet, name: Literal["train", "validation"]):
        self._dataset, self._name, self._directory = dataset, name, dataset.part(name)
        self._dtype = np.dtype(dataset.description.dtype).newbyteorder("<")
        self._pieces = dataset.pieces
        self._readers: list[Any] = []
        self._columns = COLUMNS | (TARGET_COLUMNS if dataset.description.targets else {})
        entries = self._read_index()
        self._entries = [entry["raw_data"] for entry in entries]
        self._verified = [False] * len(entries)
        self._lock = threading.Lock()
        self.shard_sizes = [entry["samples"] * self._pieces for entry in entries]
        self._ends = list(accumulate(entry["samples"] for entry in entries))
        self._counts = self._read_counts()

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    @property
    def has_loss_mask(self) -> bool:
        """Not all predicted tokens count."""
        return self._counts is not None

    @property
    def targets(self) -> int:
        """Predicted tokens that count, in all samples."""
        return len(self) * self._dataset.sequence_length if self._counts is None else int(self._counts.sum())

    def loss_mask(self, index: int) -> int:
        """Predicted tokens of a sample that count; known without reading it."""
        return self._dataset.sequence_length if self._counts is None else int(self._counts[index])

    def sample(self, index: int) -> Sample:
        """Sample ``index`` of the split."""
        stored, piece = divmod(index, self._pieces)
        shard = bisect_right(self._ends, stored)
        if not self._verified[shard]:
            self._verify(shard)
        first = self._ends[shard - 1] if shard else 0
        tokens, starts, size, targets, difficulties = self._read(shard, stored - first)
        length = self._dataset.sequence_length
        start = piece * length
        if self._pieces > 1:
            # text is spread over a stored sample's tokens: counts per piece are in proportion, and sum up exactly
            whole = len(tokens) - 1
            size = size * (start + length) // whole - size * start // whole
            starts = starts[(starts >= start) & (starts < start + length)] - start
            tokens = tokens[start : start + length + 1]
        if self._counts is None:
            return Sample(tokens.astype(np.int64), starts.astype(np.int32), size)
        loss_mask = targets >= 0
        if int(loss_mask.sum()) != self._counts[index]:
            raise self._altered(shard, stored - first)
        return Sample(
            tokens.astype(np.int64), starts.astype(np.int32), size, loss_mask, targets.astype(np.int64), difficulties
        )

    def verify(self) -> None:
        for shard in range(len(self._readers)):
            self._verify(shard)

    def _read(
        self, shard: int, index: int
    ) -> tuple[NDArray[Any], NDArray[np.int32], int, NDArray[np.int32], NDArray[np.int32]]:
        """Tokens, starts, bytes, targets and difficulties (both empty where samples carry none) of a stored sample.

        The shard was right when it was hashed. It is on a disk that others can write to, so what comes is looked at:
        a token outside the vocabulary would end training with an error that says nothing of data, or, on a GPU, take
        the process with it.
        """
        description, path = self._dataset.description, self._directory / self._entries[shard]["basename"]
        targets = difficulties = none = np.empty(0, np.int32)
        try:
            record = self._readers[shard][index]
            tokens = np.frombuffer(record["tokens"], self._dtype)
            starts = np.frombuffer(record["starts"], "<i4")
            size = int(record["text_bytes"])
            if self._counts is not None:
                targets = np.frombuffer(record["targets"], "<i4")
                difficulties = np.frombuffer(record["difficulties"], "<i4")
        except FileNotFoundError:
            raise MegaloopError(f"data {path}: shard is gone; put it back, or prepare the data again") from None
        except OSError as error:
            raise MegaloopError(f"data {path}: shard cannot be read ({error.strerror})") from None
        except Exception:  # whatever the reader makes of bytes that are no sample
            tokens, starts, size = np.empty(0, self._dtype), none, 0
        if not _is_sound(description, tokens, starts, size):
            raise self._altered(shard, index)
        if self._counts is not None and not _are_sound(description, starts, targets, difficulties):
            raise self._altered(shard, index)
        return tokens, starts, size, targets, difficulties

    def _altered(self, shard: int, index: int) -> MegaloopError:
        path = self._directory / self._entries[shard]["basename"]
        return MegaloopError(
            f"data {path}: shard was altered after it was checked (sample {index} of it is none); "
            "put the file back, or prepare the data again"
        )

    def _read_counts(self) -> NDArray[np.uint32] | None:
        """How many targets each sample has; None where every token is one."""
        described = self._dataset.description.targets
        if described is None:
            return None
        path = self._directory / TARGET_COUNTS
        try:
            content = path.read_bytes()
        except OSError as error:
            raise MegaloopError(f"data {path}: cannot be read ({error.strerror}); prepare the data again") from None
        if hashlib.sha256(content).hexdigest() != described.counts.get(self._name) or len(content) != 4 * len(self):
            raise MegaloopError(f"data {path}: altered (its SHA-256 does not match); prepare the data again")
        return np.frombuffer(content, "<u4")

    def _read_index(self) -> list[dict[str, Any]]:
        path = self._directory / "index.json"
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self._dataset.description.indices[self._name]:
                raise MegaloopError(f"data {path}: altered (its SHA-256 does not match); prepare the data again")
            shards: list[dict[str, Any]] = json.loads(content)["shards"]
            for entry in shards:
                raw = entry["raw_data"]
                basename, expected, samples = raw["basename"], raw["bytes"], entry["samples"]
                if not is_name(basename):
                    raise MegaloopError(
                        f"data {path}: shard '{printable(basename)}' points outside the data set; prepare it again"
                    )
                if not (type(expected) is type(samples) is int and isinstance(raw["hashes"], dict)):
                    raise TypeError
                if not 0 < samples < expected:  # each takes some bytes
                    raise ValueError
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
            found, described = sum(entry["samples"] for entry in shards), self._dataset.description.splits[self._name]
            if found != described.samples:
                raise MegaloopError(
                    f"data {path}: {found} samples in the shards, {described.samples} in {DATA_JSON}; prepare it again"
                )
            return shards
        except FileNotFoundError:
            raise MegaloopError(f"data {path}: missing; prepare the data again") from None
        except OSError as error:
            raise MegaloopError(f"data {path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise MegaloopError(f"data {path}: damaged; prepare the data again") from None

    def _reader(self, entry: dict[str, Any]) -> Any:
        # only these encodings, each column once: MDS also knows one that unpickles
        columns = list(zip(entry["column_names"], entry["column_encodings"], strict=True))
        sizes = dict(zip(entry["column_names"], entry["column_sizes"], strict=True))
        plain = entry["format"] == "mds" and not entry["compression"] and not entry["zip_data"]
        if (
            sorted(columns) != sorted(self._columns.items())
            or sizes != {name: _SIZES[name] for name in self._columns}
            or not plain
        ):
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


def _is_sound(description: Description, tokens: NDArray[Any], starts: NDArray[np.int32], size: int) -> bool:
    """Whether these can be a sample of the data set."""
    length = description.sequence_length
    if len(tokens) != length + 1 or int(tokens.max()) >= description.tokenizer.vocab_size or size < 0:
        return False
    return not len(starts) or 0 <= int(starts.min()) <= int(starts.max()) < length


def _are_sound(
    description: Description, starts: NDArray[np.int32], targets: NDArray[np.int32], difficulties: NDArray[np.int32]
) -> bool:
    """Whether a sample of such documents can have these targets and difficulties."""
    if len(targets) != description.sequence_length or len(difficulties) != len(starts) or not len(starts):
        return False
    if int(targets.min()) < -1 or int(targets.max()) >= description.tokenizer.vocab_size:
        return False
    return int(starts[0]) == 0 and int(difficulties.min()) >= -1
