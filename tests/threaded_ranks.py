"""Ranks that are threads of this process: values and gradients of many small cases in little time.

Each rank calls the collectives of torch.distributed, which hand tensors from thread to thread.
What only real processes show (asynchronous exchanges, sub-groups, a killed rank) is not shown here,
and counters of a module are shared by all ranks.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from time import monotonic
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, _set_thread_isolation_mode
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
    store = HashStore()

    def serve(rank: int) -> None:
        try:
            _set_thread_isolation_mode(True)
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            try:
                results[rank] = function(None, *args)
                dist.barrier()
            finally:
                dist.destroy_process_group()
        except BaseException as error:  # SystemExit: another rank's error has ended this one
            if not isinstance(error, SystemExit):
                errors.append(f"rank {rank}: {traceback.format_exc()}")
            threaded.ProcessLocalGroup.exception_handle(error)

    with _threads_for_ranks():
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
def _threads_for_ranks() -> Iterator[None]:
    """torch.distributed keeps its groups by thread inside, and is as before afterwards."""
    threaded.ProcessLocalGroup.reset()
    threaded._install_threaded_pg()
    try:
        yield
    finally:
        threaded._uninstall_threaded_pg()
