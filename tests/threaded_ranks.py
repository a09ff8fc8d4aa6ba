"""Ranks that are threads of this process: values and gradients of many small cases in little time.

Each rank calls the collectives of torch.distributed, which hand tensors from thread to thread. One
rank computes at a time, until it waits in a collective: threads that compete for the interpreter's
lock at every operation take several times as long.
What only real processes show (asynchronous exchanges, sub-groups, a killed rank) is not shown here,
and counters of a module are shared by all ranks.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, Thread
from time import monotonic
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    HashStore,
    _set_thread_isolation_mode,  # pyright: ignore[reportAttributeAccessIssue]
)
from torch.testing._internal.distributed import multi_threaded_pg as threaded

PATIENCE = 60.0
"""Seconds for one case."""


def run_threaded(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Runs function(group, *args) on `world` threads; their results by rank.

    group: None, which is all of these ranks. The first error of any rank fails the test, under the
    rank's number; so do ranks that have no result after PATIENCE seconds.
    """
    results: dict[int, Any] = {}
    errors: list[str] = []
    store, turn = HashStore(), Lock()

    def serve(rank: int) -> None:
        try:
            _set_thread_isolation_mode(True)
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            try:
                with turn:
                    results[rank] = function(None, *args)
                    dist.barrier()
            finally:
                dist.destroy_process_group()
        except BaseException as error:  # SystemExit: another rank's error has ended this one
            if not isinstance(error, SystemExit):
                errors.append(f"rank {rank}: {traceback.format_exc()}")
            threaded.ProcessLocalGroup.exception_handle(error)

    with _threads_for_ranks(turn):
        ranks = [Thread(target=serve, args=(rank,), daemon=True) for rank in range(world)]
        for thread in ranks:
            thread.start()
        deadline = monotonic() + PATIENCE
        for thread in ranks:
            thread.join(max(0.0, deadline - monotonic()))
        late = [rank for rank, thread in enumerate(ranks) if thread.is_alive()]
        if late:
            threaded.ProcessLocalGroup.exception_handle(TimeoutError())
            errors.append(f"no answer from ranks {late} after {PATIENCE} s")
    if errors:
        pytest.fail(errors[0], pytrace=False)
    return [results[rank] for rank in range(world)]


@contextmanager
def _threads_for_ranks(turn: Lock) -> Iterator[None]:
    """torch.distributed keeps its groups by thread inside, and is as before afterwards. A rank that
    waits in a collective gives its turn away."""
    join = threaded.Collective.join

    def wait(collective: threaded.Collective, rank: int, data: Any) -> Any:
        turn.release()
        try:
            return join(collective, rank, data)
        finally:
            turn.acquire()

    threaded.ProcessLocalGroup.reset()
    threaded._install_threaded_pg()
    with (
        patch.object(threaded.Collective, "join", wait),
        patch.object(threaded.AllToAllBase, "work", _all_to_all),
    ):
        try:
            yield
        finally:
            threaded._uninstall_threaded_pg()


@torch.no_grad()
def _all_to_all(_: Any, buffers: Sequence[tuple[Any, ...]]) -> None:
    """What torch's own does, without making tensors of the counts for every pair of ranks."""

    def blocks(buffer: Tensor, counts: list[int]) -> Sequence[Tensor]:
        return buffer.split(counts or [len(buffer) // len(buffers)] * len(buffers))

    sent = [blocks(source, counts) for _, source, _, counts in buffers]
    for rank, (goal, _, counts, _) in enumerate(buffers):
        for other, block in enumerate(blocks(goal, counts)):
            block.copy_(sent[other][rank])
