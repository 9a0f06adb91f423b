"""What a tokenizer is to the rest of the code, whichever library it stands on."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_TOKENS", "Tokenizer", "file_sha256"]

MOST_TOKENS = 1 << 22
"""Larger ids are no tokenizer's: a file that claims them would cost memory by the gigabyte before anything is read."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    There are two ways from text to ids. What is trained on is text and nothing else: a document that spells out a
    special token (``<|endoftext|>``) must not end there. What a person asks a model may hold special tokens (those of a
    chat) and is taken as transformers takes it. For sentencepiece, which knows no spelled-out special tokens, both are one.

    Attributes:
        path: the file that names it; its SHA-256 tells tokenizers apart.
        vocab_size: largest id plus one.
        bos_id, eos_id: beginning and end of a text; -1 where it has none.
        prefix_ids: what it puts before every text (Llama 3: ``<|begin_of_text|>``; most: nothing).
    """

    path: Path
    vocab_size: int
    bos_id: int
    eos_id: int
    prefix_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Ids of text to train on: special tokens that are written out are text, and nothing is added."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids as transformers' ``tokenizer(text)`` gives them: ``prefix_ids``, and written-out special tokens as such."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """:meth:`encode` of each text, by one thread, and most of it outside Python's lock."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""

    def vocabulary(self) -> dict[str, int]:
        """Its tokens, as they are written in its file, and their ids."""

    def token_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of text that each token stands for, [vocab_size]; 0 for special tokens."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; OSError where it is none (a pipe would be waited for)."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
