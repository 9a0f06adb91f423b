"""Changing the depth of a checkpoint on disk, by growing or by loops: another checkpoint, written tensor by tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megaloop.checkpoint.manifest import GrowthEntry
from megaloop.checkpoint.reader import Checkpoint
from megaloop.checkpoint.resolve import resolve_checkpoint
from megaloop.checkpoint.tensor_file import Tell, counted
from megaloop.checkpoint.writer import CheckpointInfo, LazyPiece, save_checkpoint
from megaloop.depth import DepthPlan, DepthSpec, Growth, InsertAt, Operator, grow, reorder, unloop, untie
from megaloop.depth.flops import parameters
from megaloop.errors import MegaloopError
from megaloop.layout.pieces import Box, Piece
from megaloop.layout.sources import GrownState, InitialValues
from megaloop.layout.topology import Topology
from megaloop.layout.transfers import Moments
from megaloop.model import parameter_specs

__all__ = ["GrownCheckpoint", "LoopedCheckpoint", "grow_checkpoint", "loop_checkpoint"]


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


@dataclass(frozen=True)
class LoopedCheckpoint:
    """What was written.

    Attributes:
        depth: layers and loop, by places (24, 10-4x2-10); ``*_before``: of the checkpoint that was read.
        effective_depth: layers that run.
        bytes: on disk.
    """

    path: str
    step: int
    depth_before: str
    depth: str
    layers: int
    effective_depth: int
    parameters: int
    bytes: int
    seconds: float


def grow_checkpoint(
    checkpoint: Path,
    out: Path,
    operator: Operator,
    depth: DepthSpec,
    block: int = 4,
    *,
    insert_at: InsertAt = "after",
    moments: Moments = "copy",
    on_bytes: Tell | None = None,
) -> GrownCheckpoint:
    """Write a deeper copy of a checkpoint, with its step and its place in the data; takes the memory of one tensor.

    The result is bit by bit what a run has after growing in flight at this step.

    Args:
        checkpoint: a checkpoint, or a run (its newest).
        out: must not exist.
        operator, block, insert_at: as :func:`megaloop.depth.grow`.
        depth: layers to grow to; with a loop (``4-8x4-4``) where the grown model has one.
        moments: Adam's moments of a copied layer: its parent's, or zeros.
        on_bytes: told (what is done, bytes done, bytes in all) as it goes on.

    Raises:
        MegaloopError: a damaged checkpoint (the file is named), a target that cannot be reached, an output that exists,
            a full disk.
    """
    began = time.perf_counter()
    before = DepthPlan.plain(1)

    def deepen(source: Checkpoint, plan: DepthPlan) -> Growth:
        nonlocal before
        before = plan
        if plan.loop is not None and not depth.is_looped:
            raise MegaloopError(
                f"growth: checkpoint {source.path} is looped, {plan.notation}; say which loop the grown one has, for example "
                f"--depth {plan.loop.start + block}-{plan.loop.block}x{plan.loop.iterations}-{plan.depth - plan.loop.stop}"
            )
        grown = grow(unloop(plan), operator, depth.layers, block, insert_at=insert_at)
        if not grown.lineage:
            raise MegaloopError(
                f"growth: checkpoint {source.path} has {depth.layers} layers already; choose a deeper target"
            )
        after = reorder(grown.plan, depth, plan.style)
        return Growth(after, grown.lineage).loop_of(plan)

    info, size = _rewrite(checkpoint, out, deepen, moments, on_bytes, GrowthEntry(operator=operator))
    return GrownCheckpoint(
        path=str(out),
        step=info.step,
        operator=operator,
        layers_before=before.layers,
        layers=info.plan.layers,
        parameters_before=parameters(before, info.model),
        parameters=parameters(info.plan, info.model),
        bytes=size,
        seconds=time.perf_counter() - began,
    )


def loop_checkpoint(
    checkpoint: Path,
    out: Path,
    depth: DepthSpec | None,
    *,
    changes: Mapping[str, Any] = MappingProxyType({}),
    moments: Moments = "copy",
    on_bytes: Tell | None = None,
) -> LoopedCheckpoint:
    """Write a copy of a checkpoint whose layers run in another order; with its step and its place in the data.

    The result is bit by bit what a run has after a depth event at this step.

    Args:
        checkpoint, out, on_bytes: as :func:`grow_checkpoint`.
        depth: the same layers as a loop (``10-4x2-10``) or without (``24``); None: repetitions become layers (``untie``).
        changes: of the loop's style, by the names of :class:`megaloop.depth.LoopStyle`; otherwise it goes on as it did. A loop
            that is there already can only lose its gate.
        moments: Adam's moments of layers that were repetitions: those of the layer that they repeated, or zeros.

    Raises:
        MegaloopError: as :func:`grow_checkpoint`; a depth that would drop or add layers, or that is there already.
    """
    began = time.perf_counter()
    before = ""

    def change(source: Checkpoint, plan: DepthPlan) -> Growth:
        nonlocal before
        before = plan.notation
        if depth is None:
            return untie(plan)
        if changes.get("gate") is False and not plan.style.gate:
            raise MegaloopError(f"loop: checkpoint {source.path} has no gate to drop; leave --no-gate out")
        after = reorder(plan, depth, replace(plan.style, **changes))
        if after == plan:
            raise MegaloopError(f"loop: checkpoint {source.path} is {plan.notation} already; choose another depth")
        if plan.is_looped and after.is_looped and replace(after.style, gate=plan.style.gate) != plan.style:
            raise MegaloopError(
                f"loop: checkpoint {source.path} is looped, {plan.notation}, and its loop goes on as it was trained; leave "
                f"{', '.join('--' + name.replace('_', '-') for name in changes if name != 'gate')} out"
            )
        return Growth.reordered(plan, after)

    info, size = _rewrite(checkpoint, out, change, moments, on_bytes)
    return LoopedCheckpoint(
        path=str(out),
        step=info.step,
        depth_before=before,
        depth=info.plan.notation,
        layers=info.plan.layers,
        effective_depth=info.plan.depth,
        parameters=parameters(info.plan, info.model),
        bytes=size,
        seconds=time.perf_counter() - began,
    )


def _rewrite(
    checkpoint: Path,
    out: Path,
    change: Callable[[Checkpoint, DepthPlan], Growth],
    moments: Moments,
    on_bytes: Tell | None,
    grown: GrowthEntry | None = None,
) -> tuple[CheckpointInfo, int]:
    """Write a checkpoint anew with the plan that ``change`` makes of its own; what was saved, and its bytes."""
    if out.exists():
        raise MegaloopError(f"output {out} already exists; choose another directory")
    tell = on_bytes or (lambda what, done, total: None)
    with Checkpoint.open(resolve_checkpoint(checkpoint)) as source:
        manifest = source.manifest
        growth = change(source, manifest.plan)
        source.check_tensors(parameter_specs(manifest.model, manifest.plan, manifest.vocab_size))
        source.verify(partial(tell, "verifying"))
        pieces = list(_pieces(source, growth, moments))
        entry = grown
        if entry is None and manifest.growth is not None:
            entry = GrowthEntry(operator=manifest.growth.operator)
        info = CheckpointInfo(
            run=manifest.run.at_depth(growth.plan, grown is not None),
            plan=growth.plan,
            model=manifest.model,
            topology=Topology(),
            precision=manifest.precision,
            config=manifest.config,
            growth=entry,
        )
        saved = save_checkpoint(out, counted(pieces, tell), info, tokenizer=source.tokenizer)
    return info, saved.bytes


def _pieces(source: Checkpoint, growth: Growth, moments: Moments) -> Iterator[LazyPiece]:
    """Every tensor of the grown model, whole, with the state that it takes over; kinds as the checkpoint has them."""
    model, rows = source.manifest.model, source.manifest.vocab_size
    fresh = InitialValues(model, source.manifest.run.seed, growth.plan, rows)
    state = GrownState(source, growth, fresh, moments)
    for state_name, stored in source.manifest.tensors.items():
        dtype = getattr(torch, next(iter(stored.values())).dtype)
        for name, spec in parameter_specs(model, growth.plan, rows).items():
            piece = Piece(name, spec.shape, Box.whole(spec.shape))
            yield LazyPiece(state_name, piece, dtype, partial(_read, state, state_name, piece, dtype))


def _read(state: GrownState, state_name: str, piece: Piece, dtype: torch.dtype) -> Tensor:
    """The values of a tensor; zeros where it starts without any (moments)."""
    values = state.read_piece(state_name, piece)
    return torch.zeros(piece.shape, dtype=dtype) if values is None else values.to(dtype)
