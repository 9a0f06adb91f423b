"""The tests' own ranks: results come back in order, failures show, and nothing hangs."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from megaloop.errors import MegaloopError
from tests.distributed import RankError, RankPool, run_ranks


def _sum_of_ranks(offset: float) -> torch.Tensor:
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return value


def _process_id() -> int:
    return os.getpid()


def _fail_on(rank: int) -> None:
    if rank in (-1, dist.get_rank()):
        raise MegaloopError(f"rank {dist.get_rank()} gave up")


def _fail_while_others_wait(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("alone")
    dist.barrier()


def _die(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _leave_the_group() -> None:
    dist.destroy_process_group()


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(2, _sum_of_ranks, 0.5)
    assert [result.item() for result in results] == [2.0, 2.0]


def test_a_pool_keeps_its_processes(ranks_2: RankPool) -> None:
    first = ranks_2.run(_process_id)
    assert ranks_2.run(_sum_of_ranks, 0)[0].item() == 1.0
    assert ranks_2.run(_process_id) == first


def test_a_pool_starts_anew_when_its_ranks_have_left_the_group() -> None:
    with RankPool(2) as pool:
        first = pool.run(_process_id)
        pool.run(_leave_the_group)
        assert pool.run(_sum_of_ranks, 0)[0].item() == 1.0
        assert pool.run(_process_id) != first


def test_an_error_on_every_rank_leaves_the_pool_in_use(ranks_2: RankPool) -> None:
    first = ranks_2.run(_process_id)
    with pytest.raises(RankError, match="gave up") as caught:
        ranks_2.run(_fail_on, -1)
    assert isinstance(caught.value.error, MegaloopError)
    assert ranks_2.run(_process_id) == first


@pytest.mark.slow
@pytest.mark.parametrize(("function", "what"), [(_fail_while_others_wait, "alone"), (_die, "SIGKILL")])
def test_one_failing_rank_is_named_and_the_others_do_not_hang(function: object, what: str) -> None:
    with RankPool(2) as pool:
        with pytest.raises(RankError, match=what) as caught:
            pool.run(function, 1)  # type: ignore[arg-type]
        assert caught.value.rank == 1
        assert pool.run(_sum_of_ranks, 0)[0].item() == 1.0
