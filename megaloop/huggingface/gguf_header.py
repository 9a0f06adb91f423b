"""What a GGUF file says of itself, read with bounds: nothing of it is believed before it has been checked.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file may come from anywhere, so that sizes
which lie, endless arrays, deep nesting, names given twice and tensors outside of the file are found here, in a time and
memory that the limits below bound, before any library looks at it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

from megaloop.errors import MegaloopError
from megaloop.text import printable, quoted

__all__ = ["QUANTISATIONS", "GgufHeader", "GgufTensor", "read_header"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_KEYS = 4096
_MOST_TENSORS = 65_536
_MOST_ELEMENTS = 1 << 21
"""Of all arrays of the metadata together; a tokenizer of 262,144 tokens has about 1.3 million."""
_MOST_BYTES = 1 << 26
"""Of the header: metadata and descriptions of tensors."""
_LONGEST_NAME = 256
_DEEPEST = 4
_MOST_DIMENSIONS = 4
_LARGEST_ALIGNMENT = 1 << 16
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL = 7
QUANTISATIONS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1),
    25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""By ggml's number of a tensor's type: its name, how many values a block holds, and how many bytes that takes."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: the slowest dimension first, as numpy has it (the file has the fastest first).
        kind: ggml's number of its type, a key of :data:`QUANTISATIONS`.
        start: of its bytes, from the beginning of the file.
        bytes: how many.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of the values along the fastest dimension."""
        _, block, size = QUANTISATIONS[self.kind]
        return self.shape[-1] // block * size


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors by name; every tensor lies inside of the file, and no two overlap."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Bad(Exception):
    """What is wrong with the file."""


def read_header(path: Path) -> GgufHeader:
    """Read and check a file's header.

    Raises:
        MegaloopError: it is no file, cannot be read, is no GGUF file of a version known here, is cut off, or its counts,
            lengths, types, offsets or names make no sense or go beyond the limits.
    """
    try:
        if not path.is_file():
            raise MegaloopError(f"{path}: no such file")
        with path.open("rb") as file:
            return _Cursor(file, path.stat().st_size).header()
    except OSError as error:
        raise MegaloopError(f"{path}: cannot be read ({error.strerror})") from None
    except _Bad as problem:
        raise MegaloopError(f"{path}: damaged, or no GGUF file ({problem}); use another copy") from None


class _Cursor:
    """A place in the header, and what may still be read."""

    def __init__(self, file: BufferedReader, size: int):
        self._file = file
        self._size = size
        self._at = 0
        self._elements = 0

    def header(self) -> GgufHeader:
        if self._take(4, "its magic number") != _MAGIC:
            raise _Bad("it does not begin with GGUF")
        version = self._number("I", "its version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            raise _Bad("it is big-endian" if swapped in _VERSIONS else f"its version is {version}, 2 and 3 can be read")
        tensors = self._count("tensors", _MOST_TENSORS)
        keys = self._count("keys", _MOST_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name("a key")
            if key in metadata:
                raise _Bad(f"key {printable(key)} is there twice")
            metadata[key] = self._value(self._number("I", "a type"), key)
        described = [self._tensor() for _ in range(tensors)]
        return GgufHeader(metadata, _placed(described, self._start_of_data(metadata), self._size))

    def _take(self, size: int, what: str) -> bytes:
        if size > self._size - self._at:
            raise _Bad(f"it ends within {what}: {size} bytes at {self._at}, of {self._size}")
        if self._at + size > _MOST_BYTES:
            raise _Bad(f"its header takes more than {_MOST_BYTES} bytes")
        data = self._file.read(size)
        if len(data) != size:
            raise _Bad(f"it ends within {what}")
        self._at += size
        return data

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"), what))[0]

    def _count(self, what: str, most: int) -> int:
        count: int = self._number("Q", f"its number of {what}")
        if count > most:
            raise _Bad(f"it says that it has {count} {what}, at most {most} are possible")
        return count

    def _string(self, what: str, longest: int = _MOST_BYTES) -> str:
        size = self._number("Q", f"the length of {what}")
        if size > longest:
            raise _Bad(f"{what} is said to have {size} bytes, at most {longest} are possible")
        try:
            return self._take(size, what).decode()
        except UnicodeDecodeError:
            raise _Bad(f"{what} is not UTF-8") from None

    def _name(self, what: str) -> str:
        return self._string(f"the name of {what}", _LONGEST_NAME)

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        what = f"the value of {printable(key)}"
        if kind == _STRING:
            return self._string(what)
        if kind == _ARRAY:
            return self._array(key, depth)
        if kind not in _SCALARS:
            raise _Bad(f"{what} is of type {kind}, which there is not")
        value = self._number(_SCALARS[kind], what)
        return _as_bool(value, what) if kind == _BOOL else value

    def _array(self, key: str, depth: int) -> list[Any]:
        what = f"the value of {printable(key)}"
        if depth == _DEEPEST:
            raise _Bad(f"{what} is nested more than {_DEEPEST} deep")
        kind, count = self._number("I", what), self._number("Q", what)
        self._elements += count
        if self._elements > _MOST_ELEMENTS:
            raise _Bad(f"{what} is said to have {count} elements, at most {_MOST_ELEMENTS} are possible in all")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            values = list(struct.unpack(code, self._take(struct.calcsize(code), what)))
            return [_as_bool(value, what) for value in values] if kind == _BOOL else values
        return [self._value(kind, key, depth + 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, kind, offset) as the file says it; the kind is known."""
        name = self._name("a tensor")
        what = f"tensor {printable(name)}"
        dimensions = self._number("I", what)
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise _Bad(f"{what} has {dimensions} dimensions, 1 to {_MOST_DIMENSIONS} are possible")
        shape = tuple(self._number("Q", what) for _ in range(dimensions))[::-1]
        kind, offset = self._number("I", what), self._number("Q", what)
        if kind not in QUANTISATIONS:
            raise _Bad(f"{what} has the quantisation of number {kind}, which cannot be read")
        return name, shape, kind, offset

    def _start_of_data(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment % 8:
            raise _Bad(f"general.alignment is {quoted(alignment)}, expected a multiple of 8")
        return -(-self._at // alignment) * alignment


def _as_bool(value: int, what: str) -> bool:
    if value not in (0, 1):
        raise _Bad(f"{what} is {value}, expected true or false as 1 or 0")
    return bool(value)


def _placed(described: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int) -> dict[str, GgufTensor]:
    """The tensors, each inside of the file and none upon another."""
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in described:
        what = f"tensor {printable(name)}"
        label, block, block_bytes = QUANTISATIONS[kind]
        if name in tensors:
            raise _Bad(f"{what} is there twice")
        if 0 in shape or shape[-1] % block:
            raise _Bad(f"{what} is {label} of shape {shape}, whose rows are no multiple of {block} values")
        needed = prod(shape) // block * block_bytes
        if start + offset + needed > size:
            raise _Bad(f"{what} lies at {start + offset} to {start + offset + needed}, the file has {size} bytes")
        tensors[name] = GgufTensor(name, shape, kind, start + offset, needed)
    order: Callable[[GgufTensor], int] = lambda tensor: tensor.start  # noqa: E731
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=order):
        if tensor.start < end:
            raise _Bad(f"tensors {printable(before)} and {printable(tensor.name)} overlap")
        end, before = tensor.start + tensor.bytes, tensor.name
    return tensors
