"""Verify that what several ranks hold is bit-identical on all of them.

Replicas drift when one rank's gradient misses a reduction; the loss hides it for thousands of steps. Each
rank hashes what it holds, and ranks that hold the same compare.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

import torch
import xxhash

from megaloop.layout.pieces import StatePiece
from megaloop.runtime.collectives import gather_objects

__all__ = ["differing_replicas"]

# (kind, name, offset of the box): ranks with equal keys hold the same values where their ranges overlap
_Key = tuple[str, str, tuple[int, ...]]


def differing_replicas(pieces: Iterable[StatePiece]) -> list[str]:
    """Names of tensors (``kind name``) of which two ranks hold the same element with different bits.

    Collective over all ranks; the same answer everywhere. Model weights are compared across data-parallel
    ranks, norms across tensor-parallel ones, the tied embedding across both ends of the pipeline; masters and
    moments likewise. Fragments that overlap only in part (the two ends' ZeRO fragments of the tied
    embedding) are cut at every rank's boundaries and compared cut by cut.
    """
    mine = {(held.state_name, held.piece.name, held.piece.box.offset): held for held in pieces}
    bounds: dict[_Key, set[int]] = defaultdict(set)
    for held in gather_objects({key: _range(piece) for key, piece in mine.items()}):
        for key, (start, stop) in held.items():
            bounds[key] |= {start, stop}
    digests: dict[tuple[_Key, int], str] = {}
    for key, piece in mine.items():
        start, stop = _range(piece)
        values = piece.data.detach().reshape(-1)
        for low, high in pairwise(sorted(bounds[key])):
            if start <= low and high <= stop:
                digests[key, low] = _digest(values[low - start : high - start])
    seen: dict[tuple[_Key, int], set[str]] = defaultdict(set)
    for held_digests in gather_objects(digests):
        for cut, digest in held_digests.items():
            seen[cut].add(digest)
    return sorted({f"{state_name} {name}" for ((state_name, name, _), _), found in seen.items() if len(found) > 1})


def _range(piece: StatePiece) -> tuple[int, int]:
    return piece.piece.flat or (0, piece.piece.box.numel)


def _digest(values: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(values.cpu().contiguous().view(torch.uint8).numpy().data)
