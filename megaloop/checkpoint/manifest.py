"""``manifest.json``: what a checkpoint holds, file by file and piece by piece. Its presence makes a checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from itertools import combinations, islice, pairwise, product
from math import prod
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

import xxhash
from pydantic import (
    BaseModel,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from megaloop.checkpoint.recorded import RecordedData, with_recorded
from megaloop.checkpoint.run_state import Count, Entry, RunState
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, Operator
from megaloop.errors import DamagedCheckpoint, MegaloopError
from megaloop.layout.pieces import Box, Piece
from megaloop.layout.topology import Topology
from megaloop.text import printable

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
FORMAT_VERSION = 2
_FIRST_VERSION = 1
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""The dtypes that a checkpoint may hold, by torch's name, and their sizes."""
_LARGEST = 1 << 30
_NO_CHECKSUM = "0" * 32
_MOST_LAYERS = 100_000
_MOST_DIMENSIONS = 8


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\\" in path or not path.isprintable():
        raise ValueError(f"{printable(repr(path))} points outside the checkpoint")
    return path


class FileEntry(Entry):
    """One file: path relative to the checkpoint, size in bytes, xxh3_128 of its content."""

    path: str
    bytes: Count
    checksum: str

    _path_inside = field_validator("path")(_inside)


class PieceEntry(Entry):
    """Where one piece of a tensor lies: ``key`` in ``file``; its box, and the flat range of the box or null."""

    file: str
    key: str
    offset: list[Count]
    shape: list[Count]
    flat: tuple[Count, Count] | None = Field(default=None, strict=False)

    _path_inside = field_validator("file")(_inside)

    def piece(self, name: str, whole: tuple[int, ...]) -> Piece:
        return Piece(name, whole, Box(tuple(self.offset), tuple(self.shape)), self.flat)


class TensorEntry(Entry):
    """One tensor: shape and dtype of the whole, and the pieces that make it up."""

    shape: list[Count]
    dtype: str
    pieces: list[PieceEntry]


class TokenizerEntry(Entry):
    """The file that names the tokenizer, and its SHA-256. Where it lies in a directory, all files there belong to it."""

    file: str
    sha256: str

    _path_inside = field_validator("file")(_inside)

    @property
    def folder(self) -> str:
        """The directory within the checkpoint; empty: the tokenizer is one file."""
        return self.file.rpartition("/")[0]

    def holds(self, path: str) -> bool:
        """Whether a file of the checkpoint belongs to the tokenizer."""
        return path.rpartition("/")[0] == self.folder if self.folder else path == self.file


class GrowthEntry(Entry):
    """Where in its growth a run was: the operator, and the number of its stage, counted from 0.

    A checkpoint that ``megaloop grow`` wrote has no stage.
    """

    operator: Operator
    stage: NonNegativeInt | None = None
    stages: PositiveInt | None = None


class _UnknownDecoder(ValueError):
    """A model or plan that is written as one, but cannot be built: another version may know it."""


def _read_plan(value: dict[str, Any]) -> DepthPlan:
    try:
        order = value["order"]
        if len(order) > _MOST_LAYERS:
            raise ValueError(f"plan.order runs {len(order)} layers, at most {_MOST_LAYERS} are possible")
        if not all(type(layer_id) is int and layer_id < 1 << 31 for layer_id in order):
            raise ValueError("plan.order holds something else than layer ids")
        return DepthPlan.from_json(value)
    except (MegaloopError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _UnknownDecoder(_one_line(error)) from None


def _read_model(value: dict[str, Any]) -> ModelConfig:
    try:
        model = ModelConfig.model_validate(value)
        model.check()
    except ValidationError as error:
        raise _UnknownDecoder(f"model.{_first(error)}") from None
    except MegaloopError as error:
        raise _UnknownDecoder(_one_line(error)) from None
    if model.vocab_size is None:
        raise _UnknownDecoder("model.vocab_size is empty")
    return model


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__, 500)


_Value = TypeVar("_Value")


def _stored_as(
    stored: Any, value: type[_Value], read: Callable[[Any], _Value], write: Callable[[_Value], Any]
) -> GetPydanticSchema:
    """A field that holds a ``value``, and is a ``stored`` in the file: checked as that first, then read."""

    def schema(_source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(read, handler.generate_schema(stored)),
            python_schema=core_schema.is_instance_schema(value),
            serialization=core_schema.plain_serializer_function_ser_schema(write),
        )

    return GetPydanticSchema(schema)


class _Content(Entry):
    """What manifests of all versions hold."""

    format_version: int
    checksum: str = Field(default=_NO_CHECKSUM, pattern=r"^[0-9a-f]{32}$")
    megaloop: str = Field(pattern=r"^[0-9A-Za-z.+!_-]{1,64}$")
    created: str = Field(pattern=r"^[0-9TZ:.+ -]{1,64}$")
    plan: Annotated[DepthPlan, _stored_as(dict[str, Any], DepthPlan, _read_plan, DepthPlan.to_json)]
    growth: GrowthEntry | None
    model: Annotated[ModelConfig, _stored_as(dict[str, Any], ModelConfig, _read_model, ModelConfig.to_json)]
    precision: Literal["fp32", "bf16"]
    topology: Annotated[
        Topology,
        _stored_as(dict[Literal["pp", "tp", "dp"], PositiveInt], Topology, lambda sizes: Topology(**sizes), asdict),
    ]
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
            raise ValueError(f"{printable(self.tokenizer.file)} is not among its files")
        if problem := find_problem(self.tensors):
            raise ValueError(problem)
        for named in self.tensors.values():
            for name, entry in named.items():
                for piece in entry.pieces:
                    if piece.file not in room:
                        raise ValueError(f"{printable(piece.file)} is not among its files")
                    if self.tokenizer and self.tokenizer.holds(piece.file):
                        raise ValueError(f"{printable(piece.file)} is said to hold both the tokenizer and tensors")
                    room[piece.file] -= piece.piece(name, tuple(entry.shape)).numel * ITEM_BYTES[entry.dtype]
        for path, left in room.items():
            if left < 0:
                raise ValueError(f"{printable(path)} is too small for what it should hold")
        return self


class Manifest(_Content):
    """Everything but the numbers; see docs/CHECKPOINTS.md."""

    run: RunState

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.run.step

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        assert self.model.vocab_size is not None, "a manifest without is refused when it is read"
        return self.model.vocab_size

    @property
    def data(self) -> RecordedData:
        """The data of the run, as far as the configuration tells."""
        return RecordedData.of(self.config)


class _Random(Entry):
    seed: Count
    step: Count


class _FirstManifest(_Content):
    """Version 1: the run's state among the other keys, as far as there was one."""

    step: Count
    samples: Count
    tokens: Count
    flops: Count
    skipped: Count = 0
    rng: _Random

    def upgraded(self) -> Manifest:
        """The same as a manifest of today; what only the configuration tells is taken from there."""
        run = RunState(
            step=self.step,
            samples=self.samples,
            tokens=self.tokens,
            flops=self.flops,
            skipped=self.skipped,
            seed=self.rng.seed,
        )
        run = with_recorded(run, self.config)
        kept = {name: getattr(self, name) for name in _Content.model_fields}
        return Manifest.model_construct(**kept | {"format_version": FORMAT_VERSION, "run": run})


def find_problem(tensors: dict[str, dict[str, TensorEntry]]) -> str | None:
    """What is wrong with the pieces: not every value of every tensor there exactly once; None if all is well."""
    names: set[str] = set().union(*tensors.values())
    for state_name, named in tensors.items():
        if missing := sorted(names - set(named)):
            return f"{printable(state_name)} of {printable(missing[0])} is missing"
        for name, entry in named.items():
            if problem := _tensor_problem(name, entry):
                return f"{printable(state_name)} of {printable(name)}: {problem}"
    return None


def _tensor_problem(name: str, entry: TensorEntry) -> str | None:
    if entry.dtype not in ITEM_BYTES:
        return f"unknown dtype {printable(repr(entry.dtype))}, expected one of {', '.join(ITEM_BYTES)}"
    if len(entry.shape) > _MOST_DIMENSIONS:
        return f"{len(entry.shape)} dimensions, expected at most {_MOST_DIMENSIONS}"
    ranges: dict[Box, list[tuple[int, int]]] = defaultdict(list)
    for piece in entry.pieces:
        box = piece.piece(name, tuple(entry.shape)).box
        if not len(box.offset) == len(box.shape) == len(entry.shape) or any(
            begin + size > whole for begin, size, whole in zip(box.offset, box.shape, entry.shape, strict=True)
        ):
            where = f"a piece at {piece.offset} of shape {piece.shape} does not lie in shape {entry.shape}"
            return printable(where)
        held = piece.flat or (0, box.numel)
        if not held[0] < held[1] <= box.numel:
            return f"a piece of values {held[0]} to {held[1]} does not lie in its box of {box.numel}"
        ranges[box].append(held)
    for stretches in ranges.values():
        stretches.sort()
        if any(after[0] < before[1] for before, after in pairwise(stretches)):
            return "the same values twice"
    found, expected = sum(stop - start for held in ranges.values() for start, stop in held), prod(entry.shape)
    if not _tiles(ranges, entry.shape):
        # all is lost already: only so much is spent on saying why
        for one, other in islice(combinations(ranges, 2), 20_000):
            if one.intersect(other):
                return f"boxes at {list(one.offset)} and {list(other.offset)} overlap"
        if found == expected:
            return "its boxes overlap, and leave a gap"
    return None if found == expected else f"{found} of {expected} values"


def _tiles(boxes: Collection[Box], shape: list[int]) -> bool:
    """Whether the boxes cover a tensor of this shape, each value once.

    The function that counts the boxes over each value is known by its differences along all dimensions, which are not
    zero only at the boxes' corners, where each box adds 1 or -1 in turn: it is 1 throughout if and only if the corners
    of all boxes add up to those of the whole. That takes a time in proportion to the boxes, in any number of dimensions.
    """
    corners: dict[tuple[int, ...], int] = defaultdict(int)
    whole = Box.whole(tuple(shape))
    signs = [(ends, -1 if sum(ends) % 2 else 1) for ends in product((0, 1), repeat=len(shape))]
    for box in [whole, *boxes]:
        for ends, sign in signs:
            corner = tuple(at + size * end for at, size, end in zip(box.offset, box.shape, ends, strict=True))
            corners[corner] += -sign if box is whole else sign
    return not any(corners.values())


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's file: JSON whose ``checksum`` is that of the text with 32 zeros in its place."""
    blank = manifest.model_copy(update={"checksum": _NO_CHECKSUM})
    text = json.dumps(blank.model_dump(mode="json"), indent=1).encode()
    return text.replace(_NO_CHECKSUM.encode(), xxhash.xxh3_128_hexdigest(text).encode(), 1)


class _Version(BaseModel):
    format_version: int
    checksum: str = ""
    megaloop: Any = None


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
        if version.format_version not in (_FIRST_VERSION, FORMAT_VERSION):
            _check_checksum(directory, text, version.checksum)  # a flipped bit may look like another version
            raise MegaloopError(
                f"checkpoint {directory}: {MANIFEST} is of format version {printable(version.format_version)}, "
                f"this megaloop reads up to {FORMAT_VERSION}; use the megaloop that wrote it"
            )
        if version.format_version == _FIRST_VERSION:
            manifest = _FirstManifest.model_validate_json(text).upgraded()
        else:
            manifest = Manifest.model_validate_json(text)
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"checkpoint {directory}: no {MANIFEST}; it is no checkpoint, or one whose saving never finished"
        ) from None
    except OSError as error:
        raise MegaloopError(f"checkpoint {directory}: {MANIFEST} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        if (what := _unknown_decoder(error)) is None:
            raise DamagedCheckpoint(
                f"checkpoint {directory}: {MANIFEST} is damaged ({_first(error)}); use another checkpoint"
            ) from None
        _check_checksum(directory, text, version.checksum)  # a flipped bit may look like another decoder
        raise MegaloopError(
            f"checkpoint {directory}: {MANIFEST} describes a decoder that this megaloop does not know ({what}); "
            f"use the megaloop that wrote it ({version.megaloop})"
        ) from None
    _check_checksum(directory, text, manifest.checksum)
    return manifest


def _check_checksum(directory: Path, text: bytes, expected: str) -> None:
    blank = text.replace(expected.encode(), _NO_CHECKSUM.encode(), 1)
    if (found := xxhash.xxh3_128_hexdigest(blank)) != expected:
        raise DamagedCheckpoint(
            f"checkpoint {directory}: {MANIFEST} is altered: its checksum is {found}, "
            f"expected {expected}; use another checkpoint"
        )


def _unknown_decoder(error: ValidationError) -> str | None:
    """What cannot be built, where that is all that is wrong; None: something else is."""
    causes = [problem.get("ctx", {}).get("error") for problem in error.errors()]
    if not all(isinstance(cause, _UnknownDecoder) for cause in causes):
        return None
    return str(causes[-1])  # the model's, where the plan is wrong as well


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, and where; a decoder that is not known only where nothing else is."""
    errors: list[Mapping[str, Any]] = [*error.errors()]
    first = min(errors, key=lambda item: isinstance(item.get("ctx", {}).get("error"), _UnknownDecoder))
    where = printable(".".join(map(str, first["loc"])) or "content")
    return printable(" ".join(f"{where}: {first['msg'].removeprefix('Value error, ')}".split()), 500)


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
