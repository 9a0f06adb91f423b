"""Errors that one rank finds, raised on all of them: no rank waits in a collective for one that gave up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megaloop.errors import MegaloopError
from megaloop.runtime.device import local_device

__all__ = ["all_ranks_agree", "from_rank_0", "highest"]


@contextmanager
def all_ranks_agree() -> Iterator[None]:
    """Run a block that only reads and checks; if it fails on any rank, every rank raises the first one's error.

    The block must hold no collective operation. Errors that no user caused pass through as they are.
    """
    error: str | None = None
    try:
        yield
    except MegaloopError as caught:
        error = str(caught)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((each for each in errors if each is not None), None)
    if first is not None:
        raise MegaloopError(first)


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def highest(*values: float) -> tuple[float, ...]:
    """For each value, the highest that any rank gives: one small all-reduce, cheap enough for every step."""
    if dist.get_world_size() == 1:
        return values
    together = torch.tensor(values, dtype=torch.float64, device=local_device())
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return tuple(together.tolist())
