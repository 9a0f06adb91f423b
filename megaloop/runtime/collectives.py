"""What ranks tell each other besides tensors, and errors that one of them finds, raised on all.

Whatever goes from rank 0 to all, or from each to all, as Python objects goes through here. On a process that is no rank
(``torch.distributed`` is not initialised) these are as on the only rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from megaloop.errors import MegaloopError
from megaloop.runtime.device import local_device

__all__ = ["all_reduce_max", "broadcast_object", "gather_objects", "raise_on_all_ranks"]

T = TypeVar("T")


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, by rank, on every rank of ``group`` (None: of all)."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def all_reduce_max(*values: float) -> tuple[float, ...]:
    """For each value, the highest that any rank gives: one small all-reduce, cheap enough for every step."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    together = torch.tensor(values, dtype=torch.float64, device=local_device())
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return tuple(together.tolist())


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Run a block that only reads and checks; if it fails on any rank, every rank raises the first one's error.

    No rank waits in a collective for one that gave up. The block must hold no collective operation. Errors that no user
    caused pass through as they are.
    """
    error: str | None = None
    try:
        yield
    except MegaloopError as caught:
        error = str(caught)
    first = next((problem for problem in gather_objects(error) if problem is not None), None)
    if first is not None:
        raise MegaloopError(first)
