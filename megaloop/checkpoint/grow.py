"""Growing a checkpoint on disk: another checkpoint, deeper, written tensor by tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megaloop.checkpoint.manifest import GrowthEntry
from megaloop.checkpoint.reader import Checkpoint
from megaloop.checkpoint.resolve import resolve_checkpoint
from megaloop.checkpoint.writer import CheckpointInfo, LazyPiece, save_checkpoint
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, Growth, InsertAt, Operator, grow
from megaloop.depth.flops import parameters
from megaloop.errors import MegaloopError
from megaloop.model import parameter_specs
from megaloop.parallel.placement import Box, Piece
from megaloop.parallel.reshard import Moments
from megaloop.parallel.state import GrownState, InitialValues

__all__ = ["GrownCheckpoint", "grow_checkpoint"]


@dataclass(frozen=True)
class GrownCheckpoint:
    """What was written.

    Attributes:
        layers, parameters: after growing; ``*_before``: of the checkpoint that was read.
        bytes: on disk.
    """

    path: str
    step: int
    operator: str
    layers_before: int
    layers: int
    parameters_before: int
    parameters: int
    bytes: int
    seconds: float


def grow_checkpoint(
    checkpoint: Path,
    out: Path,
    operator: Operator,
    layers: int,
    block: int = 4,
    *,
    insert_at: InsertAt = "after",
    moments: Moments = "copy",
    on_bytes: Callable[[str, int, int], None] | None = None,
) -> GrownCheckpoint:
    """Write a deeper copy of a checkpoint, with its step and its place in the data; takes the memory of one tensor.

    The result is bit by bit what a run has after growing in flight at this step.

    Args:
        checkpoint: a checkpoint, or a run (its newest).
        out: must not exist.
        operator, layers, block, insert_at: as :func:`megaloop.depth.grow`.
        moments: Adam's moments of a copied layer: its parent's, or zeros.
        on_bytes: told (what is done, bytes done, bytes in all) as it goes on.

    Raises:
        MegaloopError: a damaged checkpoint (the file is named), a target that cannot be reached, an output that exists,
            a full disk.
    """
    began = time.perf_counter()
    if out.exists():
        raise MegaloopError(f"output {out} already exists; choose another directory")
    tell = on_bytes or (lambda what, done, total: None)
    with Checkpoint.open(resolve_checkpoint(checkpoint)) as source:
        manifest = source.manifest
        model = ModelConfig.model_validate(manifest.model)
        before = DepthPlan.from_json(manifest.plan)
        growth = grow(before, operator, layers, block, insert_at=insert_at)
        if not growth.lineage:
            raise MegaloopError(f"growth: checkpoint {source.path} has {layers} layers already; choose a deeper target")
        source.check_tensors(parameter_specs(model, before, model.vocab_size or 0))
        source.verify(partial(tell, "verifying"))
        pieces = list(_pieces(source, growth, model, moments))
        info = CheckpointInfo(
            step=manifest.step,
            tokens=manifest.tokens,
            samples=manifest.samples,
            flops=manifest.flops,
            plan=growth.plan,
            model=model,
            seed=manifest.rng["seed"],
            topology={"pp": 1, "tp": 1, "dp": 1},
            precision=manifest.precision,
            config=manifest.config,
            growth=GrowthEntry(operator=operator),
        )
        total, done = sum(each.bytes for each in pieces), 0

        def count(piece: LazyPiece) -> Tensor:
            nonlocal done
            values = piece.read()
            done += piece.bytes
            tell("writing", done, total)
            return values

        counted = [LazyPiece(each.kind, each.piece, each.dtype, partial(count, each)) for each in pieces]
        saved = save_checkpoint(out, counted, info, tokenizer=source.tokenizer)
    return GrownCheckpoint(
        path=str(out),
        step=manifest.step,
        operator=operator,
        layers_before=before.layers,
        layers=growth.plan.layers,
        parameters_before=parameters(before, model),
        parameters=parameters(growth.plan, model),
        bytes=saved.bytes,
        seconds=time.perf_counter() - began,
    )


def _pieces(source: Checkpoint, growth: Growth, model: ModelConfig, moments: Moments) -> Iterator[LazyPiece]:
    """Every tensor of the grown model, whole, with the state that it takes over; kinds as the checkpoint has them."""
    rows = model.vocab_size or 0
    fresh = InitialValues(model, source.manifest.rng["seed"], growth.plan, rows)
    state = GrownState(source, growth, fresh, moments)
    for kind, stored in source.manifest.tensors.items():
        dtype = getattr(torch, next(iter(stored.values())).dtype)
        for name, spec in parameter_specs(model, growth.plan, rows).items():
            piece = Piece(name, spec.shape, Box.whole(spec.shape))
            yield LazyPiece(kind, piece, dtype, partial(_read, state, kind, piece, dtype))


def _read(state: GrownState, kind: str, piece: Piece, dtype: torch.dtype) -> Tensor:
    """The values of a tensor; zeros where it starts without any (moments)."""
    values = state.read_piece(kind, piece)
    return torch.zeros(piece.shape, dtype=dtype) if values is None else values.to(dtype)
