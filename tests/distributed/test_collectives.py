"""Collectives carry any dtype, but show the backend real numbers alone; every rank counts its own.

Also on the threaded process group, whose ranks are threads of one process: run as a script.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scaling.ops import geometric_long_conv
from scaling.parallel import collectives
from scaling.parallel.collectives import Exchange, all_gather, all_reduce_sum, all_to_all
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import ExchangeCount, measuring
from tests.processes import run

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float64, torch.complex64, torch.bool, torch.int64)


def every_dtype(group: Any) -> dict[str, ExchangeCount]:
    """Exchanges of all dtypes on one rank, with their values and gradients checked."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    ranks = torch.arange(size)
    counts = [1 + (p == 1) for p in range(size)]  # two rows for rank 1
    mine = [counts[rank]] * size
    with measuring() as measured:
        for dtype in DTYPES:
            floats = dtype.is_floating_point or dtype.is_complex
            x = torch.full((sum(counts), 3), rank).to(dtype).requires_grad_(floats)
            received = all_to_all(x, counts, mine, group, "rows")
            senders = ranks.repeat_interleave(counts[rank])
            assert torch.equal(received, senders[:, None].expand(-1, 3).to(dtype))
            stacked = all_gather(x[0], group, "gather")
            assert torch.equal(stacked, ranks[:, None].expand(-1, 3).to(dtype))
            if floats:
                total = all_reduce_sum(x[0], group, "sum")
                assert torch.equal(total, ranks.sum().expand(3).to(dtype))
                (received.real.sum() + stacked.real.sum() + total.real.sum()).backward()
                assert x.grad is not None
                expected = torch.ones_like(x)
                expected[0] += 2 * size
                assert torch.equal(x.grad, expected)
        shard = SequenceShard(64, group)
        qs, ks = torch.randn(2, 1, 2, shard.n_local, requires_grad=True)
        q, k = torch.randn(2, 1, 2, 3, shard.n_local, requires_grad=True)
        results = geometric_long_conv((qs, q), (ks, k), shard)
        torch.stack([u.sum() for u in results]).sum().backward()
    return dict(measured.exchanges)


def only_real_numbers(group: Any) -> None:
    """gloo takes complex numbers where NCCL knows none, so the test looks at what it is given."""
    seen: set[torch.dtype] = set()
    names = ("all_to_all_single", "all_reduce", "all_gather_into_tensor", "broadcast")
    originals = {name: getattr(dist, name) for name in names}

    def watched(call: Any) -> Any:
        def watch(*tensors: Any, **options: Any) -> Any:
            seen.update(x.dtype for x in tensors if isinstance(x, torch.Tensor))
            return call(*tensors, **options)

        return watch

    assert collectives.dist is dist
    for name, call in originals.items():
        setattr(dist, name, watched(call))
    try:
        every_dtype(group)
    finally:
        for name, call in originals.items():
            setattr(dist, name, call)
    assert seen == {torch.float32, torch.float64, torch.int64, torch.uint8}


@pytest.mark.parametrize("world", [2, 3])
def test_every_dtype_arrives_and_none_is_complex_or_boolean_on_the_wire(distributed, world):
    distributed(only_real_numbers, world)


def arrives_unwaited_for(group: Any) -> None:
    """An exchange says by itself that it has arrived, and the time until then is its own."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    with measuring() as measured:
        exchange = Exchange(torch.full((size, 2), rank), [1] * size, [1] * size, group, "rows")
        deadline = monotonic() + 30
        while (arrived := exchange._transfer._arrived) is None:
            assert monotonic() < deadline, "nobody notes the arrival"
            sleep(0.01)
        assert torch.equal(exchange.wait()[:, 0], torch.arange(size))
    assert exchange._transfer._arrived == arrived  # waiting does not move it
    assert measured.transfer_s == exchange._transfer.seconds() > 0


@pytest.mark.parametrize("world", [2, 3])
def test_an_exchange_notes_its_arrival_before_anybody_waits(distributed, world):
    distributed(arrives_unwaited_for, world)


def test_threads_that_are_ranks_exchange_and_count_each_its_own():
    ended = run([sys.executable, __file__], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stdout + ended.stderr


def on_threads(world: int = 4) -> None:
    """Rank 1 gets two rows of each, so it sends fewer bytes than the others."""
    from torch._C._distributed_c10d import (
        HashStore,
        _set_thread_isolation_mode,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg

    _install_threaded_pg()
    _set_thread_isolation_mode(True)
    store = HashStore()

    def rank(number: int) -> dict[str, ExchangeCount]:
        dist.init_process_group("threaded", rank=number, world_size=world, store=store)
        try:
            return every_dtype(dist.group.WORLD)
        finally:
            dist.destroy_process_group()

    with ThreadPoolExecutor(world) as threads:
        found = list(threads.map(rank, range(world), timeout=60))
    # A row is 3 numbers: of 8 + 8 + 1 + 8 bytes there, of 8 + 8 bytes back.
    for number, counts in enumerate(found):
        forward, back = world - (number == 1), (world - 1) * (1 + (number == 1))
        sent = 3 * (25 * forward + 16 * back)
        assert counts["rows"].calls == len(DTYPES) + 2 and counts["rows"].bytes == sent
        assert counts["long_conv"].calls == 4


if __name__ == "__main__":
    on_threads()
