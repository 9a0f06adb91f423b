"""Saving a checkpoint: every rank writes what it owns, the manifest comes last, and only a complete one exists."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megaloop import __version__
from megaloop.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileEntry,
    GrowthEntry,
    Manifest,
    PieceEntry,
    TensorEntry,
    TokenizerEntry,
    encode_manifest,
    find_problem,
)
from megaloop.checkpoint.reader import file_checksum
from megaloop.checkpoint.resolve import is_step_name, list_checkpoints, remove_checkpoint
from megaloop.checkpoint.run_state import RunState
from megaloop.checkpoint.tensor_file import LazyTensor, write_tensors
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.files import fsync_path, replace_file
from megaloop.layout.pieces import Piece, StatePiece
from megaloop.layout.topology import Topology
from megaloop.runtime.collectives import gather_objects
from megaloop.tokenizer import copy_tokenizer, file_sha256

__all__ = ["CheckpointInfo", "LazyPiece", "SaveResult", "save_checkpoint"]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says besides its tensors; the manifest's fields of the same names.

    None has a default: what is left out would be lost.
    """

    run: RunState
    plan: DepthPlan
    model: ModelConfig
    topology: Topology
    precision: Literal["fp32", "bf16"]
    config: dict[str, Any]
    growth: GrowthEntry | None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.run.step


@dataclass(frozen=True)
class LazyPiece:
    """A piece that is read when its turn comes to be written.

    Attributes:
        state_name, piece: as in :class:`megaloop.layout.pieces.StatePiece`.
        dtype: of the values.
        read: gives them, shaped like the box, or flat for a fragment.
    """

    state_name: str
    piece: Piece
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, state: StatePiece) -> Self:
        return cls(state.state_name, state.piece, state.data.dtype, lambda: state.data)

    @property
    def bytes(self) -> int:
        return self.piece.numel * self.dtype.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in which the values are stored."""
        return self.piece.box.shape if self.piece.flat is None else (self.piece.numel,)


@dataclass(frozen=True)
class SaveResult:
    """A saved checkpoint: where, how many bytes in all, how long it took."""

    path: Path
    bytes: int
    seconds: float


# what a rank tells of its files: entries, and (kind, name, shape, dtype, piece) for each tensor
_Index = tuple[list[FileEntry], list[tuple[str, str, list[int], str, PieceEntry]]]


def save_checkpoint(
    directory: Path,
    pieces: Iterable[StatePiece | LazyPiece],
    info: CheckpointInfo,
    tokenizer: Path | None = None,
    *,
    then: Callable[[], object] = lambda: None,
    group: dist.ProcessGroup | None = None,
) -> SaveResult:
    """Save a checkpoint; collective over all ranks where torch.distributed is initialised.

    Ranks write ``model/rank-N.safetensors`` and ``optim/rank-N.safetensors`` into a hidden directory beside
    the final one. When all have written and synced, rank 0 writes the manifest and renames the directory.
    Interrupted anywhere before that rename, it is as if the save had not begun. A checkpoint that is there
    already under the same name is replaced: it is moved to ``.NAME.replaced`` first, and deleted last.

    Args:
        directory: the final name, on a file system that all ranks share.
        pieces: this rank's state; those without ``writes`` are left to other ranks.
        tokenizer: the file that names the tokenizer to keep with it.
        then: called by rank 0 once the checkpoint has its name; for what that makes superfluous.
        group: the ranks; None: all, over the default process group.

    Raises:
        MegaloopError: on every rank, if any rank cannot write; nothing is left behind. Or from ``then``.
        RuntimeError: on every rank, if one fails otherwise, or if the pieces of all ranks leave a value out
            or hold it twice.
    """
    began = time.perf_counter()
    rank = dist.get_rank() if dist.is_initialized() else 0
    partial = _beside(directory, "partial")
    try:
        _collective(directory, lambda: _begin(directory, partial) if rank == 0 else None, group)
        indices = _collective(directory, lambda: _write_rank(partial, pieces, rank), group)
        manifest = _collective(
            directory, lambda: _finish(partial, directory, indices, info, tokenizer) if rank == 0 else None, group
        )
    except Exception:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    _collective(directory, lambda: then() if rank == 0 else None, group, "saved, but older ones are in the way")
    return SaveResult(directory, manifest[0], time.perf_counter() - began)


@dataclass(frozen=True)
class _Failure:
    """Why a rank could not do its part; ``expected`` if that is of the user's making, such as a full disk."""

    text: str
    expected: bool


def _collective(
    directory: Path, work: Callable[[], Any], group: dist.ProcessGroup | None, outcome: str = "not saved"
) -> list[Any]:
    """Run ``work`` on every rank; its results by rank, or the same error on all of them."""
    result: Any = None
    cause: Exception | None = None
    try:
        result = work()
    except OSError as error:
        result, cause = _Failure(error.strerror or str(error), True), error
    except MegaloopError as error:
        result, cause = _Failure(" ".join(str(error).split()), True), error
    except Exception as error:  # a mistake of ours: the other ranks wait, and must hear of it
        result, cause = _Failure(f"{type(error).__name__}: {error}", False), error
    outcomes = gather_objects(result, group)
    for rank, reported in enumerate(outcomes):
        if isinstance(reported, _Failure) and not reported.expected:
            raise RuntimeError(f"checkpoint {directory} {outcome}: rank {rank}: {reported.text}") from cause
    failed = {rank: reported.text for rank, reported in enumerate(outcomes) if isinstance(reported, _Failure)}
    if failed:
        complete = list_checkpoints(directory.parent)
        last = f"the last complete checkpoint is {complete[-1].name}" if complete else "there is no earlier checkpoint"
        raise MegaloopError(
            f"checkpoint {directory} {outcome}: {next(iter(failed.values()))} ({_ranks(list(failed))}); {last}; "
            "make room or fix the permissions, then go on with --resume"
        ) from cause
    return outcomes


def _ranks(ranks: list[int]) -> str:
    """``rank 3``, or ``ranks 3, 4, 5 and 9 more``: a full disk often stops several."""
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:3]))}{more}"


def _begin(directory: Path, partial: Path) -> None:
    """Make the hidden directory, after clearing what saves that were killed have left."""
    leftovers = [partial]
    if is_step_name(directory.name) and directory.parent.is_dir():
        leftovers = [entry for entry in directory.parent.iterdir() if is_step_name(entry.stem.removeprefix("."))]
    for entry in leftovers:
        if entry.suffix == ".replaced" and not entry.with_name(entry.stem[1:]).exists():
            entry.rename(entry.with_name(entry.stem[1:]))
        elif entry.suffix in (".partial", ".replaced") and entry.exists():
            shutil.rmtree(entry)
    for group in ("model", "optim"):
        (partial / group).mkdir(parents=True)


def _write_rank(partial: Path, pieces: Iterable[StatePiece | LazyPiece], rank: int) -> _Index:
    """Write this rank's two files and describe them."""
    groups: dict[str, dict[str, LazyTensor]] = {"model": {}, "optim": {}}
    tensors = []
    for item in pieces:
        if isinstance(item, StatePiece):
            if not item.writes:
                continue
            item = LazyPiece.of(item)
        if item.piece.numel == 0:
            continue
        piece = item.piece
        group = "model" if item.state_name == "model" else "optim"
        key = piece.name if group == "model" else f"{item.state_name}/{piece.name}"
        if key in groups[group]:  # a rank may hold several pieces of a tensor
            key = f"{key}#{len(groups[group])}"
        groups[group][key] = LazyTensor(key, item.shape, item.dtype, item.read)
        entry = PieceEntry(
            file=f"{group}/rank-{rank:05d}.safetensors",
            key=key,
            offset=list(piece.box.offset),
            shape=list(piece.box.shape),
            flat=piece.flat,
        )
        dtype = str(item.dtype).removeprefix("torch.")
        tensors.append((item.state_name, piece.name, list(piece.shape), dtype, entry))
    files = []
    for group, values in groups.items():
        if values:
            path = partial / group / f"rank-{rank:05d}.safetensors"
            size, checksum = write_tensors(path, values.values(), f"{group} state of rank {rank}")
            files.append(FileEntry(path=path.relative_to(partial).as_posix(), bytes=size, checksum=checksum))
    return files, tensors


def _finish(partial: Path, directory: Path, indices: list[_Index], info: CheckpointInfo, tokenizer: Path | None) -> int:
    """Write the manifest and give the checkpoint its name; returns its bytes."""
    files = [entry for entries, _ in indices for entry in entries]
    tensors: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for _, described in indices:
        for state_name, name, shape, dtype, piece in described:
            entry = tensors[state_name].setdefault(name, TensorEntry(shape=shape, dtype=dtype, pieces=[]))
            entry.pieces.append(piece)
            if (entry.shape, entry.dtype) != (shape, dtype):
                raise RuntimeError(
                    f"ranks disagree about {state_name} of {name}: {entry.shape} {entry.dtype}, {shape} {dtype}"
                )
    if problem := find_problem(tensors):
        raise RuntimeError(f"the ranks' pieces do not make up a checkpoint: {problem}")
    token_entry = None
    if tokenizer is not None:
        copies = copy_tokenizer(tokenizer, partial)
        files += [_entry(partial, copy) for copy in copies]
        fsync_path(copies[0].parent)
        token_entry = TokenizerEntry(file=copies[0].relative_to(partial).as_posix(), sha256=file_sha256(copies[0]))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        megaloop=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=info.run,
        plan=info.plan,
        growth=info.growth,
        model=info.model,
        precision=info.precision,
        topology=info.topology,
        tokenizer=token_entry,
        config=info.config,
        files=files,
        tensors=dict(tensors),
    )
    text = encode_manifest(manifest)
    replace_file(partial / MANIFEST, text)
    for folder in (partial / "model", partial / "optim", partial):
        fsync_path(folder)
    _publish(partial, directory)
    return sum(entry.bytes for entry in files) + len(text)


def _publish(partial: Path, directory: Path) -> None:
    """Rename ``partial`` to ``directory``. What had that name keeps existing until the new one has it."""
    old = _beside(directory, "replaced")
    if old.exists():
        shutil.rmtree(old)
    if directory.exists():
        directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    fsync_path(directory.parent)
    if old.exists():
        remove_checkpoint(old)


def _beside(directory: Path, suffix: str) -> Path:
    """A hidden name beside a checkpoint, which nothing takes for one."""
    return directory.with_name(f".{directory.name}.{suffix}")


def _entry(partial: Path, path: Path) -> FileEntry:
    """Sync a file and describe it."""
    fsync_path(path)
    return FileEntry(path=path.relative_to(partial).as_posix(), bytes=path.stat().st_size, checksum=file_checksum(path))
