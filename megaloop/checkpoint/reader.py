"""Reading a checkpoint: any piece of any tensor, whatever topology wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaloop.checkpoint.manifest import Manifest, PieceEntry, TensorEntry, read_manifest
from megaloop.errors import MegaloopError
from megaloop.parallel.placement import Box, Piece

__all__ = ["Checkpoint", "file_checksum"]

_BLOCK = 8 << 20


class Checkpoint:
    """An opened checkpoint. Tensors are read when asked for, straight from the files, one at a time.

    Attributes:
        path: its directory.
        manifest: what it holds.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    @classmethod
    def open(cls, path: Path, verify: Literal["sizes", "checksums"] = "sizes") -> Checkpoint:
        """Open a checkpoint's directory.

        Args:
            verify: ``checksums`` reads every byte of every file; ``sizes`` only looks at their sizes.

        Raises:
            MegaloopError: no checkpoint, or a file that is missing, truncated, altered or outside (it is named).
        """
        checkpoint = cls(path, read_manifest(path))
        for entry in checkpoint.manifest.files:
            file = path / entry.path
            try:
                if not file.resolve(strict=True).is_relative_to(path.resolve()):
                    raise MegaloopError(f"checkpoint {path}: {entry.path} points outside the checkpoint")
                size = file.stat().st_size
            except FileNotFoundError:
                raise MegaloopError(f"checkpoint {path}: {entry.path} is missing; use another checkpoint") from None
            if size != entry.bytes:
                how = "truncated" if size < entry.bytes else "altered"
                raise MegaloopError(
                    f"checkpoint {path}: {entry.path} is {how}: {size} bytes, expected {entry.bytes}; use another checkpoint"
                )
            if verify == "checksums" and (found := file_checksum(file)) != entry.checksum:
                raise MegaloopError(
                    f"checkpoint {path}: {entry.path} is altered: its checksum is {found}, "
                    f"expected {entry.checksum}; use another checkpoint"
                )
        return checkpoint

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's file, if the checkpoint holds one."""
        entry = self.manifest.tokenizer
        return self.path / entry.file if entry else None

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind, in the order in which they were saved; empty if there are none."""
        return list(self.manifest.tensors.get(kind, {}))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return tuple(self._entry(kind, name).shape)

    def read(self, kind: str, name: str, box: Box | None = None) -> Tensor:
        """A box of a tensor (the whole by default), in the stored dtype, on the CPU."""
        entry = self._entry(kind, name)
        whole = tuple(entry.shape)
        box = box or Box.whole(whole)
        out: Tensor | None = None
        filled = 0
        for each in entry.pieces:
            piece = each.piece(name, whole)
            common = piece.box.intersect(box)
            if common is None:
                continue
            if out is None:
                out = torch.empty(box.shape, dtype=_dtype(entry, self.path))
            filled += self._copy(each, piece, box, common, out)
        if out is None or filled != box.numel:
            raise MegaloopError(
                f"checkpoint {self.path}: {kind} {name} holds {filled} of {box.numel} values asked for; it is damaged"
            )
        return out

    def read_piece(self, kind: str, piece: Piece) -> Tensor | None:
        """A piece's values: shaped like its box, or flat; None where the checkpoint holds no such tensor."""
        if piece.name not in self.manifest.tensors.get(kind, {}):
            return None
        values = self.read(kind, piece.name, piece.box)
        return values if piece.flat is None else values.reshape(-1)[slice(*piece.flat)]

    def _copy(self, entry: PieceEntry, piece: Piece, box: Box, common: Box, out: Tensor) -> int:
        """Copy what a stored piece has of ``common`` into ``out`` (which holds ``box``); returns how many values."""
        if piece.flat is None:
            out[common.within(box)] = self._slice(entry, common.within(piece.box))
            return common.numel
        start, stop = piece.flat
        stored = self._slice(entry, (slice(None),))
        if piece.box == box:
            out.view(-1)[start:stop] = stored
            return stop - start
        # a fragment of another box: mark where its values belong, and take those that lie in the common region
        values = torch.zeros(piece.box.numel, dtype=stored.dtype)
        there = torch.zeros(piece.box.numel, dtype=torch.bool)
        values[start:stop], there[start:stop] = stored, True
        index = common.within(piece.box)
        wanted = there.view(piece.box.shape)[index]
        out[common.within(box)] = torch.where(wanted, values.view(piece.box.shape)[index], out[common.within(box)])
        return int(wanted.sum())

    def _slice(self, entry: PieceEntry, index: tuple[slice, ...]) -> Tensor:
        expected = [entry.flat[1] - entry.flat[0]] if entry.flat else list(entry.shape)
        try:
            if entry.file not in self._files:
                self._files[entry.file] = self._stack.enter_context(safe_open(self.path / entry.file, framework="pt"))
            stored = self._files[entry.file].get_slice(entry.key)
            if list(stored.get_shape()) != expected:
                raise MegaloopError(
                    f"checkpoint {self.path}: {entry.file} holds {entry.key} as {stored.get_shape()}, "
                    f"the manifest says {expected}; it is damaged"
                )
            values: Tensor = stored[index]
            return values
        except (SafetensorError, OSError) as error:
            raise MegaloopError(f"checkpoint {self.path}: {entry.file} is damaged ({error})") from None

    def _entry(self, kind: str, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[kind][name]
        except KeyError:
            raise MegaloopError(f"checkpoint {self.path}: holds no {kind} of {name}") from None

    def close(self) -> None:
        """Close its files."""
        self._files.clear()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _dtype(entry: TensorEntry, path: Path) -> torch.dtype:
    try:
        return _DTYPES[entry.dtype]
    except KeyError:
        raise MegaloopError(f"checkpoint {path}: unknown dtype {entry.dtype!r}; expected {sorted(_DTYPES)}") from None


def file_checksum(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal; the file is read in blocks."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
