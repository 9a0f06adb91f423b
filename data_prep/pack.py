"""Packing documents into samples of fixed length, and writing them as MDS shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaloop.data.description import COLUMNS, HASH, TARGET_COLUMNS, TARGET_COUNTS, SplitEntry
from megaloop.data.streaming_base import mds_writer
from megaloop.data.targeted import Example

__all__ = ["SplitWriter", "TargetWriter"]

SHARD_BYTES = 1 << 24


class SplitWriter:
    """Joins documents to one stream of tokens and cuts it into samples.

    Sample k holds tokens k S to (k + 1) S, both ends included: neighbours share one token, so that every token
    but the stream's first is predicted exactly once. What is left at the end, less than a sample, is dropped.

    Args:
        directory: of the split's shards; must not exist.
        sequence_length: S.
        dtype: ``uint16`` or ``uint32``.
        token_bytes: bytes of text of each token.
        eos_id: put after every document.
    """

    def __init__(self, directory: Path, sequence_length: int, dtype: str, token_bytes: NDArray[np.int64], eos_id: int):
        self._length, self._eos = sequence_length, eos_id
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._token_bytes = token_bytes
        self._writer = _shards(directory, COLUMNS)
        self._parts: list[NDArray[Any]] = []
        self._starts: list[int] = []  # of documents, counted from the first token that is not yet written
        self._pending = 0
        self.documents = self.tokens = self.bytes = self.samples = 0

    def add(self, tokens: NDArray[Any]) -> None:
        """Append a document's tokens."""
        self._starts.append(self._pending)
        self._parts += [tokens, np.array([self._eos], dtype=tokens.dtype)]
        self._pending += len(tokens) + 1
        self.documents += 1
        self.tokens += len(tokens) + 1
        self.bytes += int(self._token_bytes[tokens].sum())
        if self._pending > 64 * self._length:
            self._write()

    def _write(self) -> None:
        """Write all whole samples."""
        stream = np.concatenate(self._parts) if self._parts else np.empty(0, dtype=self._dtype)
        starts = np.array(self._starts, dtype=np.int64)
        whole = max(len(stream) - 1, 0) // self._length
        for sample in range(whole):
            first = sample * self._length
            tokens = stream[first : first + self._length + 1]
            inside = starts[np.searchsorted(starts, first) : np.searchsorted(starts, first + self._length)]
            self._writer.write(
                {
                    "tokens": tokens.astype(self._dtype).tobytes(),
                    "starts": (inside - first).astype("<i4").tobytes(),
                    "text_bytes": int(self._token_bytes[tokens[1:]].sum()),
                }
            )
        self.samples += whole
        rest = stream[whole * self._length :]
        self._parts, self._pending = [rest], len(rest)
        self._starts = [int(start) for start in starts - whole * self._length if start >= 0]

    def finish(self) -> SplitEntry:
        """Write what is left and close the shards; returns the counts."""
        self._write()
        self._writer.finish()
        return SplitEntry(documents=self.documents, tokens=self.tokens, bytes=self.bytes, samples=self.samples)

    def abandon(self) -> None:
        """Release what writing holds, after an error."""
        self._writer.__exit__(RuntimeError, RuntimeError("abandoned"), None)


class TargetWriter:
    """Packs documents that carry targets into samples, in order, as many as fit and none cut; writes the counts of targets.

    What is left of a sample is padding: a document of its own, without targets.

    Args:
        directory: of the split's shards; must not exist.
        sequence_length: S; no document is longer.
        dtype: ``uint16`` or ``uint32``.
        token_bytes: bytes of text of each token.
        eos_id: fills samples up.
    """

    def __init__(self, directory: Path, sequence_length: int, dtype: str, token_bytes: NDArray[np.int64], eos_id: int):
        self._directory, self._length, self._eos = directory, sequence_length, eos_id
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._token_bytes = token_bytes
        self._writer = _shards(directory, COLUMNS | TARGET_COLUMNS)
        self._waiting: list[Example] = []
        self._room = sequence_length
        self._counts: list[int] = []
        self.documents = self.tokens = self.bytes = 0

    def add(self, example: Example) -> None:
        """Append a document."""
        if len(example) > self._room:
            self._write()
        self._waiting.append(example)
        self._room -= len(example)
        self.documents += 1
        self.tokens += len(example)
        self.bytes += self._text_bytes(example.targets)

    def _text_bytes(self, targets: NDArray[Any]) -> int:
        return int(self._token_bytes[targets[targets >= 0]].sum())

    def _write(self) -> None:
        if not self._waiting:
            return
        tokens = np.full(self._length + 1, self._eos, dtype=self._dtype)
        targets = np.full(self._length, -1, dtype="<i4")
        starts, at = [], 0
        for example in self._waiting:
            starts.append(at)
            tokens[at : at + len(example)] = example.tokens
            targets[at : at + len(example)] = example.targets
            at += len(example)
        difficulties = [example.difficulty for example in self._waiting]
        if at < self._length:
            starts.append(at)
            difficulties.append(-1)
        self._writer.write(
            {
                "tokens": tokens.tobytes(),
                "starts": np.array(starts, "<i4").tobytes(),
                "text_bytes": self._text_bytes(targets),
                "targets": targets.tobytes(),
                "difficulties": np.array(difficulties, "<i4").tobytes(),
            }
        )
        self._counts.append(int((targets >= 0).sum()))
        self._waiting, self._room = [], self._length

    def finish(self) -> SplitEntry:
        """Write what is left and close the shards; returns the counts."""
        self._write()
        self._writer.finish()
        (self._directory / TARGET_COUNTS).write_bytes(np.array(self._counts, "<u4").tobytes())
        return SplitEntry(documents=self.documents, tokens=self.tokens, bytes=self.bytes, samples=len(self._counts))

    def abandon(self) -> None:
        """Release what writing holds, after an error."""
        self._writer.__exit__(RuntimeError, RuntimeError("abandoned"), None)


def _shards(directory: Path, columns: dict[str, str]) -> Any:
    return mds_writer()(out=str(directory), columns=columns, hashes=[HASH], size_limit=SHARD_BYTES, progress_bar=False)
