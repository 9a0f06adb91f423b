"""Training tokenizers that lose nothing: decode(encode(text)) == text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megaloop.errors import MegaloopError
from megaloop.tokenizer.huggingface import write_tokenizer_json
from megaloop.tokenizer.protocol import MOST_TOKENS

__all__ = ["END_OF_TEXT", "train_byte_level", "train_sentencepiece"]

END_OF_TEXT = "<|endoftext|>"
"""What ends a text in the byte-level tokenizers that are trained here, as in SmolLM's."""

_LONGEST = 4000
"""Bytes of a training sentence; sentencepiece leaves longer ones out."""


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
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


def train_byte_level(texts: Iterable[str], vocab_size: int, folder: Path) -> Path:
    """Train a byte-level BPE as SmolLM's is: GPT-2's splitting with every digit by itself, nothing normalised.

    Writes ``tokenizer.json`` and ``tokenizer_config.json``, which transformers opens, into ``folder``. The ids: ``<|endoftext|>`` 0, then
    the 256 bytes, then what is merged. The result depends on the text alone, not on threads.

    Returns:
        The ``tokenizer.json``.

    Raises:
        MegaloopError: fewer than 257 tokens are asked for, or more than the text supports (the largest number is named).
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise MegaloopError(
            f"--vocab-size {vocab_size} is smaller than 256 bytes and {END_OF_TEXT} need; use {len(alphabet) + 1} or more"
        )
    if vocab_size > MOST_TOKENS:
        raise MegaloopError(f"--vocab-size {vocab_size} is too large; at most {MOST_TOKENS} tokens are possible")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (largest := tokenizer.get_vocab_size()) < vocab_size:
        raise MegaloopError(
            f"--vocab-size {vocab_size} is larger than the text supports; use {largest} or less, or give more text"
        )
    return write_tokenizer_json(tokenizer, folder, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})


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
