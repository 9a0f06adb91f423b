"""Tokenizers of Hugging Face: a ``tokenizer.json``, and what lies beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from megaloop.errors import MegaloopError
from megaloop.text import printable
from megaloop.tokenizer.protocol import MOST_TOKENS

# Read by the library at every call: a batch is then encoded by the thread that asks, as sentencepiece does it, and prep's own
# threads share the cores. (By itself each call would start as many threads as the machine has cores.)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__all__ = ["SETTINGS", "TOKENIZER_JSON", "HuggingFaceTokenizer", "write_tokenizer_json"]

TOKENIZER_JSON = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_MOST_BYTES = 1 << 28
"""Of a tokenizer.json: ten times the largest of a published model."""
_MOST_SETTINGS = 1 << 24
_LONGEST_TOKEN = 1 << 14
_LONGEST_PREFIX = 16
_USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""What ends a text in published models, for a tokenizer.json that comes without settings."""


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, run by the library ``tokenizers``; see :class:`megaloop.tokenizer.protocol.Tokenizer`.

    Which tokens begin and end a text stands in ``tokenizer_config.json`` (or, of older models,
    ``special_tokens_map.json``) beside it. Nothing of these files is executed; a chat template is carried along, unread.
    """

    def __init__(self, path: Path, text: str, settings: dict[str, Any]):
        self.path, self._text = path, text
        self._spelled = _opened(path, text)  # special tokens that a text spells out are special tokens
        vocabulary = self._spelled.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MOST_TOKENS:
            raise MegaloopError(
                f"tokenizer {path}: its ids go up to {self.vocab_size - 1}; expected at least one and at most {MOST_TOKENS}"
            )
        if (longest := max(map(len, vocabulary))) > _LONGEST_TOKEN:
            raise MegaloopError(
                f"tokenizer {path}: a token of {longest:,} characters; at most {_LONGEST_TOKEN:,} are possible"
            )
        self._spells_nothing = settings.get("split_special_tokens") is True
        self.bos_id = self._named(settings, "bos_token")
        self.eos_id = self._named(settings, "eos_token")
        if self.eos_id < 0 and "eos_token" not in settings:
            usual = [token for text in _USUAL_ENDS if (token := self._spelled.token_to_id(text)) is not None]
            self.eos_id = usual[0] if len(usual) == 1 else -1
        self.prefix_ids = self._prefix(settings)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same, where special tokens that a text spells out are text."""
        plain = _opened(self.path, self._text)
        plain.encode_special_tokens = True
        return plain

    @classmethod
    def load(cls, path: Path) -> HuggingFaceTokenizer:
        """Read a ``tokenizer.json`` with what lies beside it.

        Raises:
            MegaloopError: a file that is damaged, or names a token that the tokenizer does not have.
        """
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise MegaloopError(
                    f"tokenizer {path}: {path.stat().st_size:,} bytes; expected at most {_MOST_BYTES:,}"
                )
            text = path.read_bytes().decode().removeprefix("\ufeff")
        except (OSError, UnicodeDecodeError) as error:
            raise MegaloopError(f"tokenizer {path}: cannot be read ({error})") from None
        settings = _settings(path.with_name(_SPECIAL)) | _settings(path.with_name(SETTINGS))
        return cls(path, text, settings)

    def encode(self, text: str) -> list[int]:
        with self._named_errors():
            ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        tokenizer = self._plain if self._spells_nothing else self._spelled
        with self._named_errors():
            return [*self.prefix_ids, *tokenizer.encode(text, add_special_tokens=False).ids]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        with self._named_errors():
            encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._spelled.decode(list(ids), skip_special_tokens=True)
        return text

    def vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = self._spelled.get_vocab(with_added_tokens=True)
        return found

    def token_bytes(self) -> NDArray[np.int64]:
        decoders = _decoders(json.loads(self._text).get("decoder"))
        special = {token for token, added in self._spelled.get_added_tokens_decoder().items() if added.special}
        added = self._spelled.get_added_tokens_decoder().keys()
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, token in self._spelled.get_vocab(with_added_tokens=True).items():
            if token in special:
                continue
            sizes[token] = len(piece.encode()) if token in added else _piece_bytes(piece, decoders)
        return sizes

    def _named(self, settings: dict[str, Any], key: str) -> int:
        """The id of the token that a setting names: its text, or an object with it."""
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            return -1
        token = self._spelled.token_to_id(text) if isinstance(text, str) and _is_text(text) else None
        if token is None:
            raise MegaloopError(
                f"tokenizer {self.path}: {key} {printable(text)} in {SETTINGS} is none of its tokens; they do not belong together"
            )
        return int(token)

    def _prefix(self, settings: dict[str, Any]) -> tuple[int, ...]:
        """What is put before a text: by the post-processor, or by transformers' class for Llama, which replaces that."""
        if str(settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
            adds = settings.get("add_bos_token", True) is not False
            return (self.bos_id,) if adds and self.bos_id >= 0 else ()
        with self._named_errors():
            alone = self._spelled.encode("a", add_special_tokens=False).ids
            whole = self._spelled.encode("a").ids
        starts = range(len(whole) - len(alone) + 1)
        start = next((at for at in starts if whole[at : at + len(alone)] == alone), None)
        if start is None or start > _LONGEST_PREFIX or any(token >= self.vocab_size for token in whole):
            raise MegaloopError(
                f"tokenizer {self.path}: its post-processor does more than to put a few of its tokens before and after a text"
            )
        return tuple(whole[:start])

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of the library, whose class says nothing, as ours."""
        try:
            yield
        except BaseException as error:  # plain Exceptions, and panics, which are none
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | GeneratorExit | MegaloopError):
                raise
            raise MegaloopError(
                f"tokenizer {self.path}: it cannot encode a text ({printable(str(error), 200)}); use another"
            ) from None


def write_tokenizer_json(tokenizer: tokenizers.Tokenizer, folder: Path, names: dict[str, str]) -> Path:
    """Write a tokenizer that was made here: ``tokenizer.json``, and settings with which transformers opens it.

    Args:
        names: special tokens by what they are for: ``bos_token``, ``eos_token``, ``unk_token``.

    Returns:
        The ``tokenizer.json``.
    """
    path = folder / TOKENIZER_JSON
    tokenizer.save(str(path))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **names,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return path


def _opened(path: Path, text: str) -> tokenizers.Tokenizer:
    try:
        opened = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library's own errors are plain Exceptions, and a panic of it is none
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise MegaloopError(f"tokenizer {path}: damaged, or no tokenizer.json ({printable(str(error), 200)})") from None
    if getattr(opened.model, "dropout", None) is not None:
        opened.model.dropout = None  # noise for training; the same text is to have the same tokens
    opened.no_truncation()  # a length that the file was saved with is none of ours
    opened.no_padding()
    return opened


def _is_text(text: str) -> bool:
    """Whether this is Unicode: JSON can spell halves of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _settings(path: Path) -> dict[str, Any]:
    """The object in a file beside tokenizer.json; empty where there is no such file."""
    if not os.path.lexists(path):
        return {}
    try:
        if not path.is_file() or path.stat().st_size > _MOST_SETTINGS:
            raise MegaloopError(f"{path}: expected a file of at most {_MOST_SETTINGS:,} bytes")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MegaloopError(f"{path}: cannot be read as JSON ({printable(str(error), 200)})") from None
    if not isinstance(value, dict):
        raise MegaloopError(f"{path}: expected a JSON object")
    return value


def _decoders(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps that make text of tokens, in their order."""
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _piece_bytes(piece: str, decoders: list[dict[str, Any]]) -> int:
    """Bytes of the text of one token. Spaces that a decoder strips or adds at the ends of a text are not counted."""
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds and all(character in _BYTE_CHARACTERS for character in piece):
        return len(piece)
    if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    for decoder in decoders:
        if decoder["type"] == "Replace" and "String" in decoder["pattern"]:
            piece = piece.replace(decoder["pattern"]["String"], decoder["content"])
        elif decoder["type"] == "Metaspace":
            piece = piece.replace(decoder["replacement"], " ")
        elif decoder["type"] == "WordPiece":
            piece = piece.removeprefix(decoder["prefix"])
    return len(piece.encode())


_BYTE_CHARACTERS = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())
"""The 256 characters that stand for bytes in a byte-level vocabulary."""
