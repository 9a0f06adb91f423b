"""``manifest.json``: what a checkpoint holds, file by file and piece by piece. Its presence makes a checkpoint."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator

from megaloop.errors import MegaloopError
from megaloop.parallel.placement import Box, Piece

__all__ = ["MANIFEST", "FileEntry", "Manifest", "PieceEntry", "TensorEntry", "TokenizerEntry", "read_manifest"]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_LARGEST = 1 << 30


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\\" in path or "\x00" in path:
        raise ValueError(f"{path!r} points outside the checkpoint")
    return path


class FileEntry(_Model):
    """One file: path relative to the checkpoint, size in bytes, xxh3_128 of its content."""

    path: str
    bytes: NonNegativeInt
    checksum: str

    _path_inside = field_validator("path")(_inside)


class PieceEntry(_Model):
    """Where one piece of a tensor lies: ``key`` in ``file``; its box, and the flat range of the box or null."""

    file: str
    key: str
    offset: list[NonNegativeInt]
    shape: list[NonNegativeInt]
    flat: tuple[NonNegativeInt, NonNegativeInt] | None = Field(default=None, strict=False)

    def piece(self, name: str, whole: tuple[int, ...]) -> Piece:
        return Piece(name, whole, Box(tuple(self.offset), tuple(self.shape)), self.flat)


class TensorEntry(_Model):
    """One tensor: shape and dtype of the whole, and the pieces that make it up."""

    shape: list[NonNegativeInt]
    dtype: str
    pieces: list[PieceEntry]


class TokenizerEntry(_Model):
    """The sentencepiece model that the tokens came from."""

    file: str
    sha256: str

    _path_inside = field_validator("file")(_inside)


class Manifest(_Model):
    """Everything but the numbers; see docs/CHECKPOINTS.md."""

    format_version: int
    megaloop: str
    created: str
    step: NonNegativeInt
    samples: NonNegativeInt
    tokens: NonNegativeInt
    flops: NonNegativeInt
    plan: dict[str, Any]
    growth: None
    model: dict[str, Any]
    precision: str
    rng: dict[str, int]
    topology: dict[str, int]
    tokenizer: TokenizerEntry | None
    config: dict[str, Any]
    files: list[FileEntry]
    tensors: dict[str, dict[str, TensorEntry]]


def read_manifest(directory: Path) -> Manifest:
    """Read and validate a checkpoint's manifest.

    Raises:
        MegaloopError: it is missing, not JSON, of another version, or does not describe a checkpoint.
    """
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _LARGEST:
            raise MegaloopError(f"checkpoint {directory}: {MANIFEST} is implausibly large; it is no manifest")
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise MegaloopError(
            f"checkpoint {directory}: no {MANIFEST}; it is no checkpoint, or one whose saving never finished"
        ) from None
    except OSError as error:
        raise MegaloopError(f"checkpoint {directory}: {MANIFEST} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise MegaloopError(f"checkpoint {directory}: {MANIFEST} is damaged ({where}: {first['msg']})") from None
    if manifest.format_version != FORMAT_VERSION:
        raise MegaloopError(
            f"checkpoint {directory}: format version {manifest.format_version}, this megaloop reads {FORMAT_VERSION}; "
            "use the megaloop that wrote it"
        )
    return manifest
