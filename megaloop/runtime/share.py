"""Work in parts that ranks share: each takes every n-th part, and all get all results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from megaloop.runtime.collectives import gather_objects

__all__ = ["OnPart", "rank", "share_over_ranks", "world_size"]

T = TypeVar("T")
OnPart = Callable[[str, int, int], None]
"""Called with what is under way, how many of its parts are done, and how many there are."""


def rank() -> int:
    """This process's number; 0 where there are no ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are; 1 where there are none."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share_over_ranks(label: str, parts: Sequence[T], run: Callable[[int, T], Any], on_part: OnPart) -> list[Any]:
    """``run`` on the number and the value of every part, the ranks in turn; all results on every rank, in order."""
    own: dict[int, Any] = {}
    for number in range(rank(), len(parts), world_size()):
        on_part(label, number, len(parts))
        own[number] = run(number, parts[number])
    on_part(label, len(parts), len(parts))
    results = {number: result for of_rank in gather_objects(own) for number, result in of_rank.items()}
    return [results[number] for number in range(len(parts))]
