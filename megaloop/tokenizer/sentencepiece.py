"""Tokenizers of sentencepiece: one ``tokenizer.model``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megaloop.errors import MegaloopError

__all__ = ["SentencePieceTokenizer"]

_SPACE = "\u2581"


class SentencePieceTokenizer:
    """A sentencepiece model; see :class:`megaloop.tokenizer.protocol.Tokenizer`."""

    prefix_ids: tuple[int, ...] = ()

    def __init__(self, path: Path, processor: sentencepiece.SentencePieceProcessor):
        self.path = path
        self.processor = processor
        self.vocab_size: int = processor.get_piece_size()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        # from 0.2.3 on sentencepiece hands out buffers: no Python list of integers is built under the lock
        self._buffers: dict[str, Any] = {"return_type": "numpy"} if hasattr(processor, "EncodeAsNumpy") else {}

    @classmethod
    def load(cls, path: Path) -> SentencePieceTokenizer:
        """Read a model.

        Raises:
            MegaloopError: not a sentencepiece model.
        """
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError):
            raise MegaloopError(
                f"tokenizer {path}: neither a sentencepiece model nor a tokenizer.json; give one, or a directory that holds one"
            ) from None
        return cls(path, processor)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.processor.encode(text)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        # by itself a call would start a thread for every core of the machine
        encoded = self.processor.encode(list(texts), num_threads=1, **self._buffers)
        return [np.asarray(ids) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.processor.decode(list(ids))
        return text

    def vocabulary(self) -> dict[str, int]:
        return {self.processor.id_to_piece(token): token for token in range(self.vocab_size)}

    def token_bytes(self) -> NDArray[np.int64]:
        processor = self.processor
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(len(sizes)):
            if processor.is_byte(token):
                sizes[token] = 1
            elif not processor.is_control(token) and not processor.is_unknown(token):
                sizes[token] = len(processor.id_to_piece(token).replace(_SPACE, " ").encode())
        return sizes
