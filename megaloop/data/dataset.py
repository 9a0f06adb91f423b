"""A data set on disk: ``data.json`` and MDS shards, as ``megaloop prep`` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from megaloop.data.description import (
    DATA_JSON,
    FORMAT_VERSION,
    Description,
)
from megaloop.data.split import Split, is_name
from megaloop.errors import MegaloopError
from megaloop.text import printable
from megaloop.tokenizer import Tokenizer, file_sha256, load_tokenizer, tokenizer_files
from megaloop.tokenizer.files import FOLDER

__all__ = ["DataSet"]


class _Version(BaseModel):
    """The one key that every version of ``data.json`` has."""

    format_version: int


def _is_file_of_tokenizer(name: str) -> bool:
    """Whether this is a file of the data set, or one in its tokenizer's directory."""
    return is_name(name.removeprefix(f"{FOLDER}/"))


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
            if version not in (FORMAT_VERSION, FORMAT_VERSION + 1):
                raise MegaloopError(
                    f"data {path}: format version {version}, expected {FORMAT_VERSION} or {FORMAT_VERSION + 1}; prepare it again"
                )
            description = Description.model_validate_json(content)
            if version != FORMAT_VERSION + (description.targets is not None):
                raise MegaloopError(
                    f"data {path}: {DATA_JSON} is damaged (targets: not as its version says); prepare it again"
                )
        except (FileNotFoundError, NotADirectoryError):
            raise MegaloopError(
                f"data {path}: no {DATA_JSON} there; make a data set with 'megaloop prep INPUT --out {path}'"
            ) from None
        except OSError as error:
            raise MegaloopError(f"data {path}: {DATA_JSON} cannot be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = printable(".".join(map(str, first["loc"])) or "content", 80)
            raise MegaloopError(
                f"data {path}: {DATA_JSON} is damaged ({where}: {printable(first['msg'])}); prepare it again"
            ) from None
        entry = description.tokenizer
        if not all(_is_file_of_tokenizer(name) for name in (entry.file, *entry.beside)):
            raise MegaloopError(f"data {path}: {DATA_JSON} names a tokenizer outside the data set; prepare it again")
        if description.folder and not is_name(description.folder):
            raise MegaloopError(f"data {path}: {DATA_JSON} names a folder outside the data set; prepare it again")
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
        if wanted != stored and description.targets is not None:
            raise MegaloopError(
                f"data.sequence_length {wanted}: the samples in {path} have {stored} tokens and targets of their own, which rest on "
                f"all that comes before; use {stored}, or prepare the data with --sequence-length {wanted}"
            )
        return cls(path, description, wanted)

    def part(self, name: str) -> Path:
        """Where a file or directory of the data set is: beside data.json, or still in the folder that this names."""
        moving = self.path / self.description.folder / name
        return moving if self.description.folder and moving.exists() else self.path / name

    @property
    def tokenizer(self) -> Path:
        return self.part(self.description.tokenizer.file)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer, its files compared with what prep wrote.

        Raises:
            MegaloopError: a file of it is missing, altered or new.
        """
        entry = self.description.tokenizer
        for name, expected in {entry.file: entry.sha256, **entry.beside}.items():
            try:
                found = file_sha256(self.part(name))
            except OSError:
                raise MegaloopError(f"data {self.path}: {printable(name)} is missing; prepare the data again") from None
            if found != expected:
                raise MegaloopError(
                    f"data {self.path}: {printable(name)} was altered (SHA-256 differs); prepare the data again"
                )
        tokenizer = load_tokenizer(self.tokenizer)
        new = {path.name for path in tokenizer_files(tokenizer.path)} - {
            Path(n).name for n in (entry.file, *entry.beside)
        }
        if new:
            raise MegaloopError(
                f"data {self.path}: {new.pop()} lies with the tokenizer, but prep did not write it; remove it"
            )
        if (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) != (entry.vocab_size, entry.bos_id, entry.eos_id):
            raise MegaloopError(
                f"data {self.path}: data.json gives the tokenizer another size, beginning or end than it has; "
                "prepare the data again"
            )
        return tokenizer

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
            + ("" if self.description.targets is None else f", {self.split('train').targets:,} targets")
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
