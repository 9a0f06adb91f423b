"""Reading a checkpoint: any piece of any tensor, whatever topology wrote it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaloop.checkpoint.manifest import FileEntry, Manifest, PieceEntry, TensorEntry, read_manifest
from megaloop.checkpoint.resolve import is_step_name, step_name, step_of
from megaloop.checkpoint.tensor_file import DTYPE_CODES
from megaloop.errors import DamagedCheckpoint, MegaloopError
from megaloop.layout.pieces import Box, Piece
from megaloop.model import ParameterSpec
from megaloop.text import printable
from megaloop.tokenizer import Tokenizer, load_tokenizer

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
        self._tokenizer_checked = False
        self._stack = ExitStack()

    @classmethod
    def open(cls, path: Path, verify: Literal["sizes", "checksums"] = "sizes") -> Checkpoint:
        """Open a checkpoint's directory.

        Args:
            verify: ``checksums`` reads every byte of every file; ``sizes`` only looks at their sizes.

        Raises:
            DamagedCheckpoint: a file that is missing, truncated, altered or outside (it is named).
            MegaloopError: no checkpoint, or one that cannot be read.
        """
        checkpoint = cls(path, read_manifest(path))
        step = checkpoint.manifest.step
        if is_step_name(path.name) and step_of(path) != step:  # what is newest, and what may go, is told from the names
            raise MegaloopError(
                f"checkpoint {path}: its name says step {step_of(path)}, but it was saved at step {step}; "
                f"rename it to {step_name(step)}, or move it out of its run"
            )
        for entry in checkpoint.manifest.files:
            _check_file(path, entry, verify)
        return checkpoint

    def verify(
        self, on_bytes: Callable[[int, int], None] = lambda done, total: None, share: int = 0, of: int = 1
    ) -> None:
        """Read every byte of every file and compare the checksums; tells (bytes done, bytes in all).

        Args:
            share, of: read only every ``of``-th file, from number ``share`` on: ranks together read all.

        Raises:
            DamagedCheckpoint, MegaloopError: as :meth:`open` with ``verify="checksums"``.
        """
        files = self.manifest.files[share::of]
        done, total = 0, sum(entry.bytes for entry in files)
        for entry in files:
            _check_file(self.path, entry, "checksums", partial(_advance, on_bytes, done, total))
            done += entry.bytes

    def check_values(self, state_names: Collection[str] | None = None, share: int = 0, of: int = 1) -> None:
        """Read every stored piece: its file describes it as the manifest does, and all its numbers are finite.

        Args:
            state_names: of state; None: all.
            share, of: only of every ``of``-th file, as :meth:`verify`.

        Raises:
            MegaloopError: names the tensor that holds a NaN or an infinity.
        """
        files = {entry.path for entry in self.manifest.files[share::of]}
        for state_name, named in self.manifest.tensors.items():
            if state_names is not None and state_name not in state_names:
                continue
            for name, entry in named.items():
                for piece in entry.pieces:
                    if piece.file in files and not _all_finite(self._stored(piece, entry.dtype)):
                        raise MegaloopError(
                            f"checkpoint {self.path}: {printable(state_name)} of {printable(name)} holds numbers that are not finite; "
                            "nothing can be learnt or written with it: use another checkpoint"
                        )

    def check_tensors(self, specs: Mapping[str, ParameterSpec]) -> None:
        """Raise MegaloopError unless the checkpoint holds exactly the parameters of ``specs``, in their shapes."""
        for state_name in self.manifest.tensors:
            found = {name: self.shape(state_name, name) for name in self.names(state_name)}
            for name in sorted(specs.keys() | found.keys()):
                expected = specs[name].shape if name in specs else None
                if found.get(name) != expected:
                    raise MegaloopError(
                        f"checkpoint {self.path}: {printable(state_name)} of {printable(name)} is "
                        f"{printable(found.get(name, 'not there'))}, "
                        f"its plan asks for {expected or 'no such tensor'}; use another checkpoint"
                    )

    @property
    def tokenizer(self) -> Path | None:
        """The file that names the tokenizer, if the checkpoint holds one; all its files are compared with those that were saved.

        Raises:
            DamagedCheckpoint: they are others.
        """
        entry = self.manifest.tokenizer
        if entry is None:
            return None
        if not self._tokenizer_checked:
            own = [file for file in self.manifest.files if entry.holds(file.path)]
            for file in own:
                _check_file(self.path, file, "checksums")
            known = {file.path for file in own}
            if entry.folder and (
                new := sorted({f"{entry.folder}/{name}" for name in os.listdir(self.path / entry.folder)} - known)
            ):
                raise DamagedCheckpoint(
                    f"checkpoint {self.path}: {printable(new[0])} lies with the tokenizer, but was not saved with it; remove it"
                )
            self._tokenizer_checked = True
        return self.path / entry.file

    def open_tokenizer(self, purpose: str) -> Tokenizer:
        """The tokenizer.

        Args:
            purpose: what needs one, for the error: ``generate writes text``.

        Raises:
            MegaloopError: the checkpoint holds none, or a damaged one.
        """
        if self.tokenizer is None:
            raise MegaloopError(
                f"checkpoint {self.path} holds no tokenizer, and {purpose}; import the model with one: "
                "megaloop import MODEL --out CKPT --tokenizer PATH"
            )
        return load_tokenizer(self.tokenizer)

    def check_tokenizer(self, data: Path, sha256: str) -> None:
        """Raise MegaloopError where data was prepared with another tokenizer; a checkpoint without one takes any."""
        entry = self.manifest.tokenizer
        if entry is not None and entry.sha256 != sha256:
            raise MegaloopError(
                f"data {data} has another tokenizer (SHA-256 {printable(sha256[:12])}) than checkpoint {self.path} "
                f"({printable(entry.sha256[:12])}); prepare the data again with --tokenizer {self.path / entry.file}"
            )

    def names(self, state_name: str) -> list[str]:
        """Names of the tensors of a kind, in the order in which they were saved; empty if there are none."""
        return list(self.manifest.tensors.get(state_name, {}))

    def shape(self, state_name: str, name: str) -> tuple[int, ...]:
        return tuple(self._entry(state_name, name).shape)

    def read(self, state_name: str, name: str, box: Box | None = None) -> Tensor:
        """A box of a tensor (the whole by default), in the stored dtype, on the CPU.

        Takes the memory of the box and of one stored piece.
        """
        entry = self._entry(state_name, name)
        whole = tuple(entry.shape)
        box = box or Box.whole(whole)
        out = torch.empty(box.shape, dtype=getattr(torch, entry.dtype))
        filled = sum(self._copy(piece, entry.dtype, piece.piece(name, whole), box, out) for piece in entry.pieces)
        if filled != box.numel:
            raise MegaloopError(
                f"checkpoint {self.path}: {printable(state_name)} {printable(name)} holds {filled} of {box.numel} values asked for "
                f"(at {box.offset}, of shape {box.shape}); it is damaged"
            )
        return out

    def read_piece(self, state_name: str, piece: Piece) -> Tensor | None:
        """A piece's values: shaped like its box, or flat; None where the checkpoint holds no such tensor."""
        if piece.name not in self.manifest.tensors.get(state_name, {}):
            return None
        if piece.flat is None:
            return self.read(state_name, piece.name, piece.box)
        start, stop = piece.flat
        out = torch.empty(stop - start, dtype=getattr(torch, self._entry(state_name, piece.name).dtype))
        for part, at in piece.rectangles():
            out[at - start : at - start + part.numel] = self.read(state_name, piece.name, part).view(-1)
        return out

    def _copy(self, entry: PieceEntry, dtype: str, piece: Piece, box: Box, out: Tensor) -> int:
        """Copy what a stored piece has of ``box`` into ``out``, which holds the box; returns how many values."""
        if piece.flat is None:
            if common := piece.box.intersect(box):
                out[common.within(box)] = self._slice(entry, dtype, common.within(piece.box))
            return common.numel if common else 0
        copied = 0
        for part, at in piece.rectangles():
            common = part.intersect(box)
            if common is None:
                continue
            # the rows of the part that are wanted lie one after another in the file
            rows, *columns = common.within(part) or (slice(0, 1),)
            row = prod(part.shape[1:])
            first = at - piece.flat[0] + rows.start * row
            stored = self._slice(entry, dtype, (slice(first, first + (rows.stop - rows.start) * row),))
            values = stored.view(rows.stop - rows.start, *part.shape[1:])[(slice(None), *columns)]
            out[common.within(box)] = values.reshape(common.shape)
            copied += common.numel
        return copied

    def _stored(self, entry: PieceEntry, dtype: str) -> Tensor:
        """All that is stored of a piece."""
        dimensions = 1 if entry.flat else len(entry.shape)
        return self._slice(entry, dtype, (slice(None),) * dimensions)

    def _slice(self, entry: PieceEntry, dtype: str, index: tuple[slice, ...]) -> Tensor:
        shape = [entry.flat[1] - entry.flat[0]] if entry.flat else list(entry.shape)
        try:
            if entry.file not in self._files:
                self._files[entry.file] = self._stack.enter_context(safe_open(self.path / entry.file, framework="pt"))
            stored = self._files[entry.file].get_slice(entry.key)
            found, expected = (stored.get_dtype(), stored.get_shape()), (DTYPE_CODES[dtype], shape)
            if found != expected:
                raise MegaloopError(
                    f"checkpoint {self.path}: {printable(entry.file)} holds {printable(entry.key)} as {found[0]} {found[1]}, "
                    f"the manifest says {expected[0]} {expected[1]}; it is damaged"
                )
            values: Tensor = stored[index]
            return values
        except (SafetensorError, OSError) as error:
            what = printable(" ".join(str(error).split()))
            raise MegaloopError(f"checkpoint {self.path}: {printable(entry.file)} is damaged ({what})") from None

    def _entry(self, state_name: str, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[state_name][name]
        except KeyError:
            raise MegaloopError(
                f"checkpoint {self.path}: holds no {printable(state_name)} of {printable(name)}"
            ) from None

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


def _all_finite(values: Tensor) -> bool:
    # a sum is finite only if all its terms are, and takes no memory; where it overflows, they are looked at one by one
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def _advance(on_bytes: Callable[[int, int], None], before: int, total: int, count: int) -> None:
    on_bytes(before + count, total)


def _check_file(
    path: Path,
    entry: FileEntry,
    verify: Literal["sizes", "checksums"],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    file = path / entry.path
    what = f"checkpoint {path}: {printable(entry.path)}"
    try:
        if not file.resolve(strict=True).is_relative_to(path.resolve()):
            raise DamagedCheckpoint(f"{what} points outside the checkpoint; use another checkpoint")
        if not file.is_file():
            raise DamagedCheckpoint(f"{what} is no file; use another checkpoint")
        size = file.stat().st_size
        if size != entry.bytes:
            how = "truncated" if size < entry.bytes else "altered"
            raise DamagedCheckpoint(f"{what} is {how}: {size} bytes, expected {entry.bytes}; use another checkpoint")
        if verify == "checksums" and (found := file_checksum(file, on_bytes)) != entry.checksum:
            raise DamagedCheckpoint(
                f"{what} is altered: its checksum is {found}, expected {printable(entry.checksum)}; use another checkpoint"
            )
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{what} is missing; use another checkpoint") from None
    except RuntimeError as error:  # so pathlib reports a circle of links
        raise DamagedCheckpoint(f"{what} cannot be read ({error}); use another checkpoint") from None
    except OSError as error:
        # a disk that gives its bytes back no more is damage; one that may not be read is for its owner to fix
        state_name = DamagedCheckpoint if error.errno in (errno.EIO, errno.ENOTDIR, errno.ELOOP) else MegaloopError
        raise state_name(f"{what} cannot be read ({error.strerror}); use another checkpoint") from None


def file_checksum(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """xxh3_128 of a file, in hexadecimal; the file is read in blocks, and ``on_bytes`` told how much of it."""
    digest, done = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            on_bytes(done)
    return digest.hexdigest()
