"""Writing a safetensors file tensor by tensor, its checksum on the way.

The library's own ``save_file`` wants all tensors in main memory at once, refuses two that share storage, and leaves
the checksum to a second pass over the file. The format is a length, a JSON header and the tensors' bytes:
https://github.com/huggingface/safetensors#format. Reading is left to the library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import xxhash
from torch import Tensor

from megaloop.files import fsync_file

__all__ = ["DTYPE_CODES", "LazyTensor", "Tell", "counted", "write_tensors"]

Tell = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""

DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16"}
"""The dtypes that are written, by torch's name, and what safetensors calls them."""
_BLOCK = 8 << 20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written; ``read`` is called when its turn comes, and gives it on any device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Lazy(Protocol):
    """A tensor, or a piece of one, that is read when its turn comes."""

    @property
    def bytes(self) -> int: ...

    @property
    def read(self) -> Callable[[], Tensor]: ...


_L = TypeVar("_L", bound=Lazy)


def counted(lazy: Sequence[_L], tell: Tell | None, what: str = "writing") -> list[_L]:
    """The same, and ``tell`` hears of each that was read."""
    total, done = sum(one.bytes for one in lazy), 0

    def read(one: _L) -> Tensor:
        nonlocal done
        values = one.read()
        done += one.bytes
        if tell is not None:
            tell(what, done, total)
        return values

    return [replace(one, read=partial(read, one)) for one in lazy]  # type: ignore[type-var]  # dataclasses


def write_tensors(path: Path, tensors: Iterable[LazyTensor], about: str = "") -> tuple[int, str]:
    """Write a file and sync it to disk; takes the main memory of one tensor, where they come from elsewhere.

    Args:
        about: a line for the file's metadata.

    Returns:
        The file's bytes and its xxh3_128 in hexadecimal.

    Raises:
        OSError: the disk is full, or fails.
        ValueError: a dtype other than those of :data:`DTYPE_CODES`, or a tensor that is not what it said.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # keeps every tensor aligned to its items
    header = _header(ordered, {"format": "pt", **({"megaloop": about} if about else {})})
    digest, size = xxhash.xxh3_128(header), len(header)
    with path.open("wb") as file:
        file.write(header)
        for run in ordered:
            values = run.read().detach()
            if tuple(values.shape) != run.shape or values.dtype != run.dtype:
                raise ValueError(f"{run.name} is {values.dtype} {tuple(values.shape)}, announced as {run.shape}")
            content = _content(values)
            for start in range(0, len(content), _BLOCK):
                block = content[start : start + _BLOCK]
                file.write(block)
                digest.update(block)
            size += len(content)
        fsync_file(file)
    return size, digest.hexdigest()


def _content(values: Tensor) -> memoryview:
    """A tensor's bytes in row-major order; a copy only where it is elsewhere or lies otherwise."""
    values = values.to("cpu").contiguous()
    # a dimension of size 1 may have any stride and count as contiguous, but not for a view of another dtype
    flat = values.as_strided((values.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def _header(tensors: list[LazyTensor], metadata: dict[str, str]) -> bytes:
    """The file up to the first tensor's bytes."""
    entries: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPE_CODES:
            raise ValueError(f"{tensor.name} is {dtype}; only {' and '.join(DTYPE_CODES)} can be written")
        if tensor.name in entries:
            raise ValueError(f"two tensors are called {tensor.name}")
        offsets = [at, at + tensor.bytes]
        entries[tensor.name] = {"dtype": DTYPE_CODES[dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
