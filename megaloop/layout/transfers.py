"""What must move when the plan or the topology changes: placements, and the transfers between two of them.

Everything here is a pure function of the two placements, so every rank computes the same transfers by itself, and
``megaloop plan`` computes them for ranks that do not exist. :mod:`megaloop.parallel.exchange` carries them out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megaloop.depth import Growth
from megaloop.layout.pieces import Box, Piece
from megaloop.layout.placement import Placement
from megaloop.model.parameters import grown_from

__all__ = [
    "Moments",
    "Reshard",
    "Transfer",
    "takes_zeros",
    "transfers",
]

Moments = Literal["copy", "zero"]
_Slot = tuple[str, str]  # (kind, name of a tensor)


@dataclass(frozen=True)
class Transfer:
    """A region of a tensor of the plan before that goes from one rank to another.

    Attributes:
        state_name: one of :data:`megaloop.layout.pieces.STATE_NAMES`.
        name: the tensor.
        box: the region of it.
        source, target: ranks.
        bytes: its size.
    """

    state_name: str
    name: str
    box: Box
    source: int
    target: int
    bytes: int


@dataclass(frozen=True)
class Reshard:
    """What moves between two placements.

    Attributes:
        transfers: in the order in which all ranks carry them out, tensor by tensor.
        in_place: bytes that each rank needs and holds already.
    """

    transfers: tuple[Transfer, ...]
    in_place: tuple[int, ...]

    def received(self) -> tuple[int, ...]:
        """Bytes that each rank receives."""
        return self._sum(lambda transfer: transfer.target)

    def sent(self) -> tuple[int, ...]:
        """Bytes that each rank sends."""
        return self._sum(lambda transfer: transfer.source)

    def _sum(self, rank: Callable[[Transfer], int]) -> tuple[int, ...]:
        total = [0] * len(self.in_place)
        for transfer in self.transfers:
            total[rank(transfer)] += transfer.bytes
        return tuple(total)


def takes_zeros(state_name: str, name: str, source: str, moments: Moments) -> bool:
    """Whether a parameter's state of this kind starts from zeros: the moments of a copied layer, where asked for."""
    return moments == "zero" and name != source and state_name in ("exp_avg", "exp_avg_sq")


def transfers(
    old: Placement, new: Placement, growth: Growth, *, weight_bytes: int, moments: Moments = "copy"
) -> Reshard:
    """What must go from where to where, so that every rank has what the new placement gives it.

    A new layer is fed by the layer that it is a copy of. What a rank holds already does not move, and what it
    needs twice (a layer and its copy) comes once: the bytes are the least possible. Where several ranks hold what
    one needs, the one that has the fewest bytes to send so far sends it.

    Args:
        old, new: placements on the same ranks.
        weight_bytes: bytes of one element of the weights in the training dtype; masters and moments have 4.
    """
    world = old.topology.world_size
    load = [0] * world
    in_place = [0] * world
    planned: list[Transfer] = []
    for (state_name, source), needed in _needs(new, growth, moments).items():
        size = weight_bytes if state_name == "model" else 4
        holders = old.holders[state_name, source]
        held: dict[int, list[Piece]] = defaultdict(list)
        for holder in holders:
            for rank in holder.ranks:
                held[rank].append(holder.piece)
        rectangles = [(box, holder.ranks) for holder in holders for box, _ in holder.piece.rectangles()]
        known: dict[tuple[tuple[Piece, ...], tuple[Piece, ...]], tuple[list[Box], int]] = {}
        for rank, pieces in sorted(needed.items()):
            key = (tuple(pieces), tuple(held.get(rank, ())))
            if key not in known:
                known[key] = _missing(*key)
            missing, wanted = known[key]
            in_place[rank] += size * (wanted - sum(box.numel for box in missing))
            for box in missing:
                for part, sender in _senders(box, rectangles, load):
                    planned.append(Transfer(state_name, source, part, sender, rank, size * part.numel))
                    load[sender] += planned[-1].bytes
    return Reshard(tuple(planned), tuple(in_place))


def _needs(new: Placement, growth: Growth, moments: Moments) -> dict[_Slot, dict[int, list[Piece]]]:
    """By (kind, tensor of the plan before): which pieces of it each rank needs, in the new placement's order."""
    needs: dict[_Slot, dict[int, list[Piece]]] = {}
    for (state_name, name), holders in new.holders.items():
        source = grown_from(name, growth)
        if source is None or takes_zeros(state_name, name, source, moments):
            continue
        slot = needs.setdefault((state_name, source), {})
        for holder in holders:
            piece = Piece(source, holder.piece.shape, holder.piece.box, holder.piece.flat)
            for rank in holder.ranks:
                slot.setdefault(rank, []).append(piece)
    return needs


def _missing(needed: Iterable[Piece], held: Iterable[Piece]) -> tuple[list[Box], int]:
    """(regions that are needed and not held, number of needed elements); what is needed twice counts once."""
    wanted: list[Box] = []
    for piece in dict.fromkeys(needed):
        regions = [box for box, _ in piece.rectangles()]
        wanted += _without(regions, wanted) if wanted else regions
    count = sum(box.numel for box in wanted)
    return _without(wanted, [box for piece in held for box, _ in piece.rectangles()]), count


def _without(regions: Iterable[Box], taken: Sequence[Box]) -> list[Box]:
    left = list(regions)
    for other in taken:
        left = [rest for box in left for rest in box.minus(other)]
    return left


def _senders(
    box: Box, holders: Sequence[tuple[Box, tuple[int, ...]]], load: Sequence[int]
) -> Iterator[tuple[Box, int]]:
    """Cut a region by who holds it, each part with the rank that sends it: the one with the least to send so far."""
    left = [box]
    while left:
        region = left.pop()
        candidates = [
            (min((load[rank], rank) for rank in ranks), common)
            for held, ranks in holders
            if (common := held.intersect(region))
        ]
        if not candidates:
            raise RuntimeError(f"no rank holds {region}")
        (_, sender), part = min(candidates, key=lambda candidate: (*candidate[0], candidate[1].offset))
        yield part, sender
        left.extend(region.minus(part))
