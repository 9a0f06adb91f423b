"""The sentencepiece tokenizer of a data set or a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import sentencepiece

from megaloop.errors import MegaloopError

__all__ = ["Tokenizer", "file_sha256"]


class Tokenizer:
    """Text to token ids and back. Special tokens written out in a text are text.

    Attributes:
        path: the model's file.
        vocab_size: number of tokens.
        bos_id, eos_id: beginning and end of a text; -1 where the model has none.
    """

    def __init__(self, path: Path, processor: sentencepiece.SentencePieceProcessor):
        self.path = path
        self._processor = processor
        self.vocab_size: int = processor.get_piece_size()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a sentencepiece model.

        Raises:
            MegaloopError: no such file, or not a sentencepiece model.
        """
        if not path.is_file():
            raise MegaloopError(f"tokenizer {path}: no such file; expected a sentencepiece model")
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError):
            raise MegaloopError(f"tokenizer {path}: not a sentencepiece model") from None
        return cls(path, processor)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
