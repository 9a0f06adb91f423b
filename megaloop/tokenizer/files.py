"""Where a tokenizer lies: the file that names it, and those that belong to it."""

from __future__ import annotations

import shutil
from pathlib import Path

from megaloop.errors import MegaloopError
from megaloop.tokenizer.huggingface import TOKENIZER_JSON, HuggingFaceTokenizer
from megaloop.tokenizer.protocol import Tokenizer
from megaloop.tokenizer.sentencepiece import SentencePieceTokenizer

__all__ = ["FOLDER", "SENTENCEPIECE", "copy_tokenizer", "find_tokenizer", "load_tokenizer", "tokenizer_files"]

SENTENCEPIECE = "tokenizer.model"
FOLDER = "tokenizer"
"""Directory within a checkpoint or a data set that holds the files of a tokenizer of Hugging Face."""
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    SENTENCEPIECE,
)
"""What transformers may write beside a tokenizer.json."""
_MAGIC_GGUF = b"GGUF"


def find_tokenizer(path: Path) -> Path | None:
    """The file that names the tokenizer of a model directory, checkpoint or data set; a file is that file.

    ``tokenizer.json`` comes before ``tokenizer.model``, as in transformers. None: there is none.
    """
    if not path.is_dir():
        return path
    places = [path / TOKENIZER_JSON, path / FOLDER / TOKENIZER_JSON, path / SENTENCEPIECE]
    return next((place for place in places if place.is_file()), None)


def load_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer: a ``tokenizer.json``, a sentencepiece model, or a directory that holds one of them.

    Raises:
        MegaloopError: there is none, or it is damaged.
    """
    found = find_tokenizer(path)
    if found is None:
        raise MegaloopError(f"tokenizer {path}: neither {TOKENIZER_JSON} nor {SENTENCEPIECE} is in that directory")
    if not found.is_file():
        raise MegaloopError(f"tokenizer {path}: no such file; expected a sentencepiece model or a {TOKENIZER_JSON}")
    try:
        return HuggingFaceTokenizer.load(found) if _is_json(found) else SentencePieceTokenizer.load(found)
    except OSError as error:
        raise MegaloopError(f"tokenizer {found}: cannot be read ({error.strerror})") from None


def _is_json(path: Path) -> bool:
    """Whether a file is a tokenizer.json, whatever its name; a sentencepiece model begins with a byte that is no brace."""
    if path.name == TOKENIZER_JSON:
        return True
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def tokenizer_files(path: Path) -> list[Path]:
    """All files of a tokenizer, the one that names it first: what lies beside a tokenizer.json belongs to it."""
    if not _is_json(path):
        return [path]
    return [path, *(beside for name in _BESIDE if (beside := path.with_name(name)).is_file() and _belongs(beside))]


def _belongs(path: Path) -> bool:
    """Whether a file is what its name says: transformers saves the GGUF that a tokenizer came from as tokenizer.model."""
    if path.name != SENTENCEPIECE:
        return True
    with path.open("rb") as file:
        return file.read(len(_MAGIC_GGUF)) != _MAGIC_GGUF


def copy_tokenizer(path: Path, folder: Path) -> list[Path]:
    """Copy a tokenizer to its usual place in a checkpoint or data set.

    Returns:
        The copies, the one that names the tokenizer first: ``tokenizer.model``, or the files in ``tokenizer/``.
    """
    sources = tokenizer_files(path)
    if not _is_json(path):
        places = [folder / SENTENCEPIECE]
    else:
        (folder / FOLDER).mkdir()
        places = [folder / FOLDER / TOKENIZER_JSON, *(folder / FOLDER / path.name for path in sources[1:])]
    for source, place in zip(sources, places, strict=True):
        shutil.copyfile(source, place)
    return places
