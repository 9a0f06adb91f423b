"""Carrying out a reshard: what is in place is copied, what is missing comes from other ranks, in flight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaloop.depth import Growth
from megaloop.layout.pieces import Box, StatePiece
from megaloop.layout.sources import StateSource
from megaloop.layout.transfers import Moments, Reshard, Transfer, takes_zeros
from megaloop.model import grown_from

__all__ = ["exchange"]

_Regions = dict[tuple[str, str], list[tuple[Box, Tensor]]]  # (kind, tensor of the plan before): regions of it


@torch.no_grad()
def exchange(
    plan: Reshard,
    old: Iterable[StatePiece],
    new: Iterable[StatePiece],
    growth: Growth,
    *,
    fresh: StateSource,
    moments: Moments = "copy",
) -> int:
    """Fill a rank's new state from its old state and from the other ranks; called by every rank.

    Transfers run in windows: the largest tensor's bytes are in flight at most, so that is all the memory that a
    rank needs beyond its old and its new state. Every rank works through the same list from its beginning, so the
    earliest transfer that is not done always has both its ranks at work on it.

    Args:
        plan: the transfers between the two placements.
        old: what this rank holds of the plan before.
        new: what it is to hold, as views to write into.
        fresh: where layers that are no copies get their values from.

    Returns:
        The most bytes that were in buffers at one time.
    """
    sources = _regions((each.kind, each.piece.name, each) for each in old)
    targets: list[tuple[str, str, StatePiece]] = []
    for each in new:
        name = each.piece.name
        source = grown_from(name, growth)
        if source is None:
            values = fresh.read_piece(each.kind, each.piece)
            if values is None:
                each.data.zero_()
            else:
                each.data.copy_(values.view(each.data.shape))
        elif takes_zeros(each.kind, name, source, moments):
            each.data.zero_()
        else:
            targets.append((each.kind, source, each))
    wanted = _regions(targets)
    for slot, regions in wanted.items():
        for box, values in regions:
            for held, held_values in sources.get(slot, ()):
                _copy(held, held_values, box, values)
    return _run(plan.transfers, sources, wanted)


def _regions(pieces: Iterable[tuple[str, str, StatePiece]]) -> _Regions:
    found: _Regions = defaultdict(list)
    for kind, name, piece in pieces:
        found[kind, name].extend(piece.regions())
    return found


def _copy(source: Box, source_values: Tensor, target: Box, target_values: Tensor) -> None:
    """Copy what two regions have in common."""
    if common := source.intersect(target):
        target_values[common.within(target)] = source_values[common.within(source)]


@dataclass(frozen=True)
class _Incoming:
    """A buffer that a transfer fills."""

    transfer: Transfer
    buffer: Tensor


def _run(transfers: tuple[Transfer, ...], sources: _Regions, wanted: _Regions) -> int:
    rank = dist.get_rank()
    limit = max((each.bytes for each in transfers), default=0)
    peak = 0
    for window in _windows((each for each in transfers if rank in (each.source, each.target)), limit):
        operations, incoming = [], []
        for each in window:
            if each.source == rank:
                buffer = _outgoing(each, sources)
                operations.append(dist.P2POp(dist.isend, buffer, each.target))
            else:
                like = wanted[each.kind, each.name][0][1]
                buffer = torch.empty(each.box.shape, dtype=like.dtype, device=like.device)
                incoming.append(_Incoming(each, buffer))
                operations.append(dist.P2POp(dist.irecv, buffer, each.source))
        peak = max(peak, sum(each.bytes for each in window))
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        for arrived in incoming:
            slot = (arrived.transfer.kind, arrived.transfer.name)
            for box, values in wanted[slot]:
                _copy(arrived.transfer.box, arrived.buffer, box, values)
    return peak


def _windows(transfers: Iterable[Transfer], limit: int) -> Iterator[list[Transfer]]:
    """Consecutive transfers, as many at a time as ``limit`` bytes allow."""
    window: list[Transfer] = []
    size = 0
    for each in transfers:
        if window and size + each.bytes > limit:
            yield window
            window, size = [], 0
        window.append(each)
        size += each.bytes
    if window:
        yield window


def _outgoing(transfer: Transfer, sources: _Regions) -> Tensor:
    """The values to send: a view where they lie together, else a copy."""
    for box, values in sources[transfer.kind, transfer.name]:
        if box.intersect(transfer.box) == transfer.box:
            return values[transfer.box.within(box)].contiguous()
    raise RuntimeError(f"this rank does not hold {transfer.kind} {transfer.name} {transfer.box}, which it is to send")
