"""The threads that stand in for ranks."""

from time import sleep

import pytest
import torch
import torch.distributed as dist

from tests import threaded_ranks
from tests.threaded_ranks import run_threaded


def total(group, start):
    x = torch.tensor([start + dist.get_rank(group)])
    dist.all_reduce(x, group=group)
    return dist.get_rank(group), dist.get_world_size(group), x.item()


def test_every_thread_is_a_rank_and_nothing_is_left_behind():
    for world in (1, 3, 8):
        expected = 10 * world + world * (world - 1) // 2
        assert run_threaded(total, world, 10) == [(r, world, expected) for r in range(world)]
        assert not dist.is_initialized()
        assert torch.autograd.is_multithreading_enabled()


def fail(group, failing):
    if dist.get_rank(group) == failing:
        raise ValueError("a rank's own words")
    dist.barrier(group)


def test_an_error_names_its_rank_and_ends_the_others():
    with pytest.raises(pytest.fail.Exception, match=r"rank 2: (.|\n)*a rank's own words"):
        run_threaded(fail, 4, 2)
    assert run_threaded(total, 2, 0) == [(0, 2, 1), (1, 2, 1)]


def come_late(group):
    if dist.get_rank(group) == 1:
        sleep(1)
    dist.barrier(group)


def test_ranks_that_wait_too_long_are_named(monkeypatch):
    monkeypatch.setattr(threaded_ranks, "PATIENCE", 0.3)
    with pytest.raises(pytest.fail.Exception, match=r"no answer from ranks \[0, 1\]"):
        run_threaded(come_late, 2)
