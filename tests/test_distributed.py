"""The spawn helper itself: results by rank, tracebacks shown, deadlocks ended."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import spawn


def sum_of_ranks(rank: int, world_size: int, offset: int) -> dict[str, torch.Tensor]:
    total = torch.tensor([rank + offset], dtype=torch.float64)
    dist.all_reduce(total)
    return {"total": total, "threads": torch.tensor(torch.get_num_threads())}


def fail_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise RuntimeError("the reason to be shown")
    dist.barrier()


def deadlock(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.barrier()
    else:
        time.sleep(60)


def die(rank: int, world_size: int) -> None:
    os._exit(3)


def test_results_come_back_by_rank() -> None:
    results = spawn(sum_of_ranks, 2, 10)
    assert [int(result["total"]) for result in results] == [21, 21]
    assert all(int(result["threads"]) == 1 for result in results)


def test_a_failing_rank_shows_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*the reason to be shown"):
        spawn(fail_on_rank_one, 2)


def test_a_deadlock_ends_at_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank"):
        spawn(deadlock, 2, timeout=6.0)
    assert time.monotonic() - start < 30


def test_a_dead_process_is_reported() -> None:
    with pytest.raises(AssertionError, match="died"):
        spawn(die, 2)
