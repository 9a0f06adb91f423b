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
    sources = _regions((state_piece.state_name, state_piece.piece.name, state_piece) for state_piece in old)
    targets: list[tuple[str, str, StatePiece]] = []
    for state_piece in new:
        name = state_piece.piece.name
        source = grown_from(name, growth)
        if source is None:
            values = fresh.read_piece(state_piece.state_name, state_piece.piece)
            if values is None:
                state_piece.data.zero_()
            else:
                state_piece.data.copy_(values.view(state_piece.data.shape))
        elif takes_zeros(state_piece.state_name, name, source, moments):
            state_piece.data.zero_()
        else:
            targets.append((state_piece.state_name, source, state_piece))
    wanted = _regions(targets)
    for slot, regions in wanted.items():
        for box, values in regions:
            for held, held_values in sources.get(slot, ()):
                _copy(held, held_values, box, values)
    return _run(plan.transfers, sources, wanted)


def _regions(pieces: Iterable[tuple[str, str, StatePiece]]) -> _Regions:
    found: _Regions = defaultdict(list)
    for state_name, name, piece in pieces:
        found[state_name, name].extend(piece.regions())
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
    limit = max((transfer.bytes for transfer in transfers), default=0)
    peak = 0
    for window in _windows((transfer for transfer in transfers if rank in (transfer.source, transfer.target)), limit):
        operations, incoming = [], []
        for transfer in window:
            if transfer.source == rank:
                buffer = _outgoing(transfer, sources)
                operations.append(dist.P2POp(dist.isend, buffer, transfer.target))
            else:
                like = wanted[transfer.state_name, transfer.name][0][1]
                buffer = torch.empty(transfer.box.shape, dtype=like.dtype, device=like.device)
                incoming.append(_Incoming(transfer, buffer))
                operations.append(dist.P2POp(dist.irecv, buffer, transfer.source))
        peak = max(peak, sum(value.bytes for value in window))
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        for arrived in incoming:
            slot = (arrived.transfer.state_name, arrived.transfer.name)
            for box, values in wanted[slot]:
                _copy(arrived.transfer.box, arrived.buffer, box, values)
    return peak


def _windows(transfers: Iterable[Transfer], limit: int) -> Iterator[list[Transfer]]:
    """Consecutive transfers, as many at a time as ``limit`` bytes allow."""
    window: list[Transfer] = []
    size = 0
    for transfer in transfers:
        if window and size + transfer.bytes > limit:
            yield window
            window, size = [], 0
        window.append(transfer)
        size += transfer.bytes
    if window:
        yield window


def _outgoing(transfer: Transfer, sources: _Regions) -> Tensor:
    """The values to send: a view where they lie together, else a copy."""
    for box, values in sources[transfer.state_name, transfer.name]:
        if box.intersect(transfer.box) == transfer.box:
            return values[transfer.box.within(box)].contiguous()
    raise RuntimeError(
        f"this rank does not hold {transfer.state_name} {transfer.name} {transfer.box}, which it is to send"
    )
