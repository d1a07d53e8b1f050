import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.spawn import Crash, run_ranks


def sum_of_ranks(rank: int, world: int, offset: int) -> tuple[int, float]:
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return rank, total.item()


def fail_on_last_rank(rank: int, world: int) -> None:
    if rank == world - 1:
        raise ValueError("the last rank gives up")
    dist.barrier()


def sleep_on_last_rank(rank: int, world: int) -> None:
    if rank == world - 1:
        time.sleep(300)
    dist.barrier()


def crash_on_last_rank(rank: int, world: int) -> None:
    if rank == world - 1:
        os.abort()
    dist.barrier()


def crash_as_the_last_rank_fails(rank: int, world: int) -> None:
    if rank == world - 1:
        raise ValueError("the last rank gives up")
    try:
        dist.barrier()
    except RuntimeError:  # the last rank has told its error and is gone
        os.abort()


def test_results_come_back_in_order_of_rank() -> None:
    assert run_ranks(2, sum_of_ranks, 10) == [(0, 21.0), (1, 21.0)]


def test_failure_of_one_rank_ends_all_and_shows_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="the last rank gives up"):
        run_ranks(2, fail_on_last_rank)


def test_hanging_rank_is_ended_after_the_timeout() -> None:
    with pytest.raises(RuntimeError, match="were not done after"):
        run_ranks(2, sleep_on_last_rank, timeout=3)


def test_a_rank_that_a_library_ends_leaves_its_stacks() -> None:
    with pytest.raises(Crash, match="(?s)Fatal Python error: Aborted.*in crash_on_last_rank"):
        run_ranks(2, crash_on_last_rank)


def test_an_error_is_no_crash_whatever_it_does_to_the_other_ranks() -> None:
    with pytest.raises(RuntimeError, match="the last rank gives up") as raised:
        run_ranks(2, crash_as_the_last_rank_fails)
    assert not isinstance(raised.value, Crash)
