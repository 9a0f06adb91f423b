"""Training a sentencepiece BPE tokenizer that loses nothing: decode(encode(text)) == text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megaloop.errors import MegaloopError

__all__ = ["token_bytes", "train_tokenizer"]

_LONGEST = 4000
"""Bytes of a training sentence; sentencepiece leaves longer ones out."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a byte-pair encoding (arXiv 1508.07909) with byte fallback; returns the serialised model.

    Text is taken as it is: no normalisation, no added or removed spaces. Ids: <unk> 0, <s> 1, </s> 2.

    Raises:
        MegaloopError: the text does not support so large a vocabulary (the largest is named), or needs a larger one.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=_LONGEST + 8,
            num_threads=1,  # more threads may break ties in another order
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: a number that is too large for it
        raise _explain(str(error), vocab_size) from None
    return model.getvalue()


def token_bytes(processor: sentencepiece.SentencePieceProcessor) -> NDArray[np.int64]:
    """UTF-8 bytes of text that each token stands for; 0 for special tokens."""
    sizes = np.zeros(processor.get_piece_size(), dtype=np.int64)
    for token in range(len(sizes)):
        if processor.is_byte(token):
            sizes[token] = 1
        elif not processor.is_control(token) and not processor.is_unknown(token):
            sizes[token] = len(processor.id_to_piece(token).replace("\u2581", " ").encode())
    return sizes


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, cut where they are longer than the trainer takes."""
    for text in texts:
        for line in text.splitlines():
            while len(line.encode()) > _LONGEST:
                yield line[: _LONGEST // 4]  # a character takes at most four bytes
                line = line[_LONGEST // 4 :]
            if line:
                yield line


def _explain(message: str, vocab_size: int) -> MegaloopError:
    largest = re.search(r"<= (\d+)", message)
    if largest:
        return MegaloopError(
            f"--vocab-size {vocab_size} is larger than the text supports; use {largest[1]} or less, or give more text"
        )
    smallest = re.search(r"required_chars\D*(\d+)\D+(\d+)", message) or re.search(
        r"smaller than required\D*\d+ vs (\d+)", message
    )
    if smallest:
        needed = int(smallest[smallest.lastindex or 1])
        return MegaloopError(
            f"--vocab-size {vocab_size} is smaller than the text's characters need; use {needed} or more"
        )
    return MegaloopError(
        f"the tokenizer could not be trained with --vocab-size {vocab_size}: {' '.join(message.split())}"
    )
