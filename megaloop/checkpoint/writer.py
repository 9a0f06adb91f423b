"""Saving a checkpoint: every rank writes what it owns, the manifest comes last, and only a whole one exists."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from megaloop import __version__
from megaloop.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileEntry,
    Manifest,
    PieceEntry,
    TensorEntry,
    TokenizerEntry,
)
from megaloop.checkpoint.reader import file_checksum
from megaloop.checkpoint.resolve import list_checkpoints
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.parallel.placement import StatePiece

__all__ = ["CheckpointInfo", "SaveResult", "save_checkpoint"]

TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says besides its tensors; the manifest's fields of the same names."""

    step: int
    tokens: int
    samples: int
    flops: int
    plan: DepthPlan
    model: ModelConfig
    seed: int
    topology: dict[str, int]
    precision: str
    config: dict[str, Any]


@dataclass(frozen=True)
class SaveResult:
    """A saved checkpoint: where, how many bytes in all, how long it took."""

    path: Path
    bytes: int
    seconds: float


# what a rank tells of its files: entries, and (kind, name, shape, dtype, piece) for each tensor
_Index = tuple[list[FileEntry], list[tuple[str, str, list[int], str, PieceEntry]]]


def save_checkpoint(
    directory: Path, pieces: Iterable[StatePiece], info: CheckpointInfo, tokenizer: Path | None = None
) -> SaveResult:
    """Save a checkpoint; collective over all ranks where torch.distributed is initialised.

    Ranks write ``model/rank-N.safetensors`` and ``optim/rank-N.safetensors`` into a hidden directory beside
    the final one. When all have written and synced, rank 0 writes the manifest and renames the directory.
    Interrupted anywhere before that rename, it is as if the save had not begun. A checkpoint that is there
    already under the same name is replaced.

    Args:
        directory: the final name, on a file system that all ranks share.
        pieces: this rank's state; those without ``writes`` are left to other ranks.
        tokenizer: a sentencepiece model to keep with it.

    Raises:
        MegaloopError: on every rank, if any rank cannot write; nothing is left behind.
    """
    began = time.perf_counter()
    rank = dist.get_rank() if dist.is_initialized() else 0
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        _together(directory, lambda: _begin(partial) if rank == 0 else None)
        indices = _together(directory, lambda: _write_rank(partial, pieces, rank))
        manifest = _together(
            directory, lambda: _finish(partial, directory, indices, info, tokenizer) if rank == 0 else None
        )
    except MegaloopError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return SaveResult(directory, manifest[0], time.perf_counter() - began)


def _together(directory: Path, work: Any) -> list[Any]:
    """Run ``work`` on every rank; its results by rank, or the same error on all of them."""
    failure: str | None = None
    result: Any = None
    try:
        result = work()
    except OSError as error:
        failure = error.strerror or str(error)
    except SafetensorError as error:  # the library reports a full disk as its own error
        failure = str(error)
    if not dist.is_initialized():
        outcomes: list[Any] = [(failure, result)]
    else:
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (failure, result))
    for rank, (error_text, _) in enumerate(outcomes):
        if error_text is not None:
            whole = list_checkpoints(directory.parent)
            last = f"the last whole checkpoint is {whole[-1].name}" if whole else "there is no earlier checkpoint"
            raise MegaloopError(
                f"checkpoint {directory} not saved: {error_text} (rank {rank}); {last}; "
                "make room or mend the permissions, then go on with --resume"
            )
    return [value for _, value in outcomes]


def _begin(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    for group in ("model", "optim"):
        (partial / group).mkdir(parents=True)


def _write_rank(partial: Path, pieces: Iterable[StatePiece], rank: int) -> _Index:
    """Write this rank's two files and describe them."""
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optim": {}}
    tensors = []
    for each in pieces:
        if not each.writes or each.data.numel() == 0:
            continue
        piece = each.piece
        group = "model" if each.kind == "model" else "optim"
        key = piece.name if group == "model" else f"{each.kind}/{piece.name}"
        groups[group][key] = each.data.detach().to("cpu").contiguous()
        entry = PieceEntry(
            file=f"{group}/rank-{rank:05d}.safetensors",
            key=key,
            offset=list(piece.box.offset),
            shape=list(piece.box.shape),
            flat=piece.flat,
        )
        dtype = str(each.data.dtype).removeprefix("torch.")
        tensors.append((each.kind, piece.name, list(piece.shape), dtype, entry))
    files = []
    for group, values in groups.items():
        if values:
            path = partial / group / f"rank-{rank:05d}.safetensors"
            save_file(values, path, metadata={"format": "pt", "megaloop": f"{group} state of rank {rank}"})
            files.append(_entry(partial, path))
    return files, tensors


def _finish(partial: Path, directory: Path, indices: list[_Index], info: CheckpointInfo, tokenizer: Path | None) -> int:
    """Write the manifest and give the checkpoint its name; returns its bytes."""
    files = [entry for entries, _ in indices for entry in entries]
    tensors: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for _, described in indices:
        for kind, name, shape, dtype, piece in described:
            entry = tensors[kind].setdefault(name, TensorEntry(shape=shape, dtype=dtype, pieces=[]))
            entry.pieces.append(piece)
    _check_complete(tensors)
    token_entry = None
    if tokenizer is not None:
        copy = partial / TOKENIZER
        shutil.copyfile(tokenizer, copy)
        files.append(_entry(partial, copy))
        token_entry = TokenizerEntry(file=TOKENIZER, sha256=hashlib.sha256(copy.read_bytes()).hexdigest())
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        megaloop=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        step=info.step,
        samples=info.samples,
        tokens=info.tokens,
        flops=info.flops,
        plan=info.plan.to_json(),
        growth=None,
        model=info.model.model_dump(mode="json"),
        precision=info.precision,
        rng={"seed": info.seed, "step": info.step},
        topology=info.topology,
        tokenizer=token_entry,
        config=info.config,
        files=files,
        tensors=dict(tensors),
    )
    text = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()
    temporary = partial / f".{MANIFEST}.tmp"
    with temporary.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(partial / MANIFEST)
    for folder in (partial / "model", partial / "optim", partial):
        _sync_directory(folder)
    if directory.exists():
        remove_checkpoint(directory)
    partial.rename(directory)
    _sync_directory(directory.parent)
    return sum(entry.bytes for entry in files) + len(text)


def _entry(partial: Path, path: Path) -> FileEntry:
    """Sync a file and describe it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(path=path.relative_to(partial).as_posix(), bytes=path.stat().st_size, checksum=file_checksum(path))


def _check_complete(tensors: dict[str, dict[str, TensorEntry]]) -> None:
    """Every value of every tensor is there, and none twice: else the ranks disagree about who saves what."""
    for kind, named in tensors.items():
        for name, entry in named.items():
            ranges: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
            for each in entry.pieces:
                piece = each.piece(name, tuple(entry.shape))
                ranges[piece.box.offset, piece.box.shape].append(piece.flat or (0, piece.box.numel))
            total = 0
            for held in ranges.values():
                held.sort()
                overlap = any(second[0] < first[1] for first, second in pairwise(held))
                if overlap:
                    raise RuntimeError(f"two ranks saved the same values of {kind} {name}")
                total += sum(stop - start for start, stop in held)
            if total != torch.Size(entry.shape).numel():
                raise RuntimeError(f"ranks saved {total} of {torch.Size(entry.shape).numel()} values of {kind} {name}")


def remove_checkpoint(directory: Path) -> None:
    """Delete a checkpoint, the manifest first: half deleted, it does not exist."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
