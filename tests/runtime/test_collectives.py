"""Objects from rank to rank, and errors of one rank on all."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megaloop.errors import MegaloopError
from megaloop.runtime.collectives import all_reduce_max, broadcast_object, gather_objects, raise_on_all_ranks
from tests.distributed import RankPool


def _exchange() -> tuple[Any, Any, Any]:
    rank = dist.get_rank()
    return broadcast_object({"rank": rank}), gather_objects(f"rank {rank}"), all_reduce_max(rank, -rank)


def _fail_on_rank_1() -> str:
    try:
        with raise_on_all_ranks():
            if dist.get_rank() == 1:
                raise MegaloopError("found on rank 1")
    except MegaloopError as error:
        return str(error)
    return "none"


def test_values_go_from_rank_0_to_all_and_from_each_to_all(ranks_2: RankPool) -> None:
    assert ranks_2.run(_exchange) == [({"rank": 0}, ["rank 0", "rank 1"], (1.0, 0.0))] * 2


def test_an_error_of_one_rank_is_raised_on_all(ranks_2: RankPool) -> None:
    assert ranks_2.run(_fail_on_rank_1) == ["found on rank 1"] * 2


def test_a_process_that_is_no_rank_is_alone() -> None:
    assert broadcast_object(1) == 1
    assert gather_objects(1) == [1]
    assert all_reduce_max(1.0, 2.0) == (1.0, 2.0)
    with pytest.raises(MegaloopError, match="alone"), raise_on_all_ranks():
        raise MegaloopError("alone")
