"""``manifest.json``: what a checkpoint holds, file by file and piece by piece. Its presence makes a checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import combinations, pairwise
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

import xxhash
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, Operator
from megaloop.errors import DamagedCheckpoint, MegaloopError
from megaloop.parallel.placement import Box, Piece

__all__ = [
    "MANIFEST",
    "FileEntry",
    "GrowthEntry",
    "Manifest",
    "PieceEntry",
    "TensorEntry",
    "TokenizerEntry",
    "encode_manifest",
    "find_problem",
    "read_manifest",
]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""The dtypes that a checkpoint may hold, by torch's name, and their sizes."""
_LARGEST = 1 << 30
_NO_CHECKSUM = "0" * 32


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\\" in path or not path.isprintable():
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

    _path_inside = field_validator("file")(_inside)

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


class GrowthEntry(_Model):
    """Where in its growth a run was: the operator, and the number of its stage, counted from 0.

    A checkpoint that ``megaloop grow`` wrote has no stage.
    """

    operator: Operator
    stage: NonNegativeInt | None = None
    stages: PositiveInt | None = None


class Manifest(_Model):
    """Everything but the numbers; see docs/CHECKPOINTS.md."""

    format_version: int
    checksum: str = Field(default=_NO_CHECKSUM, pattern=r"^[0-9a-f]{32}$")
    megaloop: str
    created: str
    step: NonNegativeInt
    samples: NonNegativeInt
    tokens: NonNegativeInt
    flops: NonNegativeInt
    skipped: NonNegativeInt = 0
    plan: dict[str, Any]
    growth: GrowthEntry | None
    model: dict[str, Any]
    precision: Literal["fp32", "bf16"]
    rng: dict[str, int]
    topology: dict[str, int]
    tokenizer: TokenizerEntry | None
    config: dict[str, Any]
    files: list[FileEntry]
    tensors: dict[str, dict[str, TensorEntry]]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        room = {entry.path: entry.bytes for entry in self.files}
        if len(room) != len(self.files):
            raise ValueError("a file is listed twice")
        if self.tokenizer and self.tokenizer.file not in room:
            raise ValueError(f"{self.tokenizer.file} is not among its files")
        if problem := find_problem(self.tensors):
            raise ValueError(problem)
        for named in self.tensors.values():
            for name, entry in named.items():
                for each in entry.pieces:
                    if each.file not in room:
                        raise ValueError(f"{each.file} is not among its files")
                    room[each.file] -= each.piece(name, tuple(entry.shape)).numel * ITEM_BYTES[entry.dtype]
        for path, left in room.items():
            if left < 0:
                raise ValueError(f"{path} is too small for what it should hold")
        return self


def find_problem(tensors: dict[str, dict[str, TensorEntry]]) -> str | None:
    """What is wrong with the pieces: not every value of every tensor there exactly once; None if all is well."""
    names: set[str] = set().union(*tensors.values())
    for kind, named in tensors.items():
        if missing := sorted(names - set(named)):
            return f"{kind} of {missing[0]} is missing"
        for name, entry in named.items():
            if problem := _tensor_problem(name, entry):
                return f"{kind} of {name}: {problem}"
    return None


def _tensor_problem(name: str, entry: TensorEntry) -> str | None:
    if entry.dtype not in ITEM_BYTES:
        return f"unknown dtype {entry.dtype!r}, expected one of {', '.join(ITEM_BYTES)}"
    ranges: dict[Box, list[tuple[int, int]]] = defaultdict(list)
    for each in entry.pieces:
        box = each.piece(name, tuple(entry.shape)).box
        if not len(box.offset) == len(box.shape) == len(entry.shape) or any(
            begin + size > whole for begin, size, whole in zip(box.offset, box.shape, entry.shape, strict=True)
        ):
            return f"a piece at {each.offset} of shape {each.shape} does not lie in shape {entry.shape}"
        held = each.flat or (0, box.numel)
        if not held[0] < held[1] <= box.numel:
            return f"a piece of values {held[0]} to {held[1]} does not lie in its box of {box.numel}"
        ranges[box].append(held)
    for one, other in combinations(ranges, 2):
        if one.intersect(other):
            return f"boxes at {list(one.offset)} and {list(other.offset)} overlap"
    for each_range in ranges.values():
        each_range.sort()
        if any(after[0] < before[1] for before, after in pairwise(each_range)):
            return "the same values twice"
    found, expected = sum(stop - start for held in ranges.values() for start, stop in held), prod(entry.shape)
    return None if found == expected else f"{found} of {expected} values"


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's file: JSON whose ``checksum`` is that of the text with 32 zeros in its place."""
    blank = manifest.model_copy(update={"checksum": _NO_CHECKSUM})
    text = json.dumps(blank.model_dump(mode="json"), indent=1).encode()
    return text.replace(_NO_CHECKSUM.encode(), xxhash.xxh3_128_hexdigest(text).encode(), 1)


class _Version(BaseModel):
    format_version: int
    checksum: str = ""


def read_manifest(directory: Path) -> Manifest:
    """Read and validate a checkpoint's manifest.

    Raises:
        DamagedCheckpoint: it is missing, altered, or does not hang together.
        MegaloopError: it cannot be read, is of another version, or describes a decoder that is not known here.
    """
    path = directory / MANIFEST
    try:
        text = _read_text(directory, path)
        version = _Version.model_validate_json(text)
        if version.format_version != FORMAT_VERSION:
            _check_checksum(directory, text, version.checksum)  # a flipped bit may look like another version
            raise MegaloopError(
                f"checkpoint {directory}: {MANIFEST} is of format version {version.format_version}, "
                f"this megaloop reads {FORMAT_VERSION}; use the megaloop that wrote it"
            )
        manifest = Manifest.model_validate_json(text)
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"checkpoint {directory}: no {MANIFEST}; it is no checkpoint, or one whose saving never finished"
        ) from None
    except OSError as error:
        raise MegaloopError(f"checkpoint {directory}: {MANIFEST} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        what = " ".join(f"{where}: {first['msg'].removeprefix('Value error, ')}".split())
        raise DamagedCheckpoint(
            f"checkpoint {directory}: {MANIFEST} is damaged ({what}); use another checkpoint"
        ) from None
    _check_checksum(directory, text, manifest.checksum)
    _check_decoder(directory, manifest)
    return manifest


def _check_checksum(directory: Path, text: bytes, expected: str) -> None:
    blank = text.replace(expected.encode(), _NO_CHECKSUM.encode(), 1)
    if (found := xxhash.xxh3_128_hexdigest(blank)) != expected:
        raise DamagedCheckpoint(
            f"checkpoint {directory}: {MANIFEST} is altered: its checksum is {found}, "
            f"expected {expected}; use another checkpoint"
        )


def _check_decoder(directory: Path, manifest: Manifest) -> None:
    """Refuse a model or plan that cannot be built: whoever opens a checkpoint may rely on both."""
    try:
        model = ModelConfig.model_validate(manifest.model)
        model.check()
        if model.vocab_size is None:
            raise ValueError("model.vocab_size is empty")
        if not all(type(layer_id) is int for layer_id in manifest.plan["order"]):
            raise ValueError("plan.order holds something else than layer ids")
        DepthPlan.from_json(manifest.plan)
    except (MegaloopError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise MegaloopError(
            f"checkpoint {directory}: {MANIFEST} describes a decoder that this megaloop does not know ({what}); "
            f"use the megaloop that wrote it ({manifest.megaloop})"
        ) from None


def _read_text(directory: Path, path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError
    if not path.is_file() or not path.resolve().is_relative_to(directory.resolve()):
        raise DamagedCheckpoint(
            f"checkpoint {directory}: {MANIFEST} is no file of the checkpoint; use another checkpoint"
        )
    if path.stat().st_size > _LARGEST:
        raise DamagedCheckpoint(f"checkpoint {directory}: {MANIFEST} is implausibly large; it is no manifest")
    return path.read_bytes()
