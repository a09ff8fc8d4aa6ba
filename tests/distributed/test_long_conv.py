"""What only real processes show of the distributed long convolutions: exchanges under way, groups
that do not start at rank 0, a killed rank, and the bytes that each rank sends.

The groups are the last ranks of the pool, so they do not start at rank 0 (but for all eight).
"""

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.long_conv.operators import geometric_long_conv, scalar_long_conv
from scaling.parallel.shard import SequenceShard, redistribute, redistribute_batch
from scaling.parallel.telemetry import measuring
from tests.long_conv_cases import TOLERANCE, Case
from tests.small_models import small_batch

WORLDS = (1, 2, 3, 4, 5, 8)


def error(group: Any, case: Case) -> float:
    return case.error(group)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_results_and_gradients_are_those_of_one_process(distributed, world):
    """A few calls whose exchanges are under way while other channels are transformed."""
    small = {"workspace_bytes": 1}
    bodies = {"bodies": [[300, 0, 500], [97]], "padding": "causal"}
    for case in (
        Case("vector", 1000, 3, 2, False, torch.float64, small, seed=0),
        Case("geometric", 997, 3, 2, True, torch.float64, bodies | small, seed=1),
        Case("scalar", world * 4096, 3, 1, False, torch.float32, {}, seed=2),
    ):
        assert max(distributed(error, world, case)) <= TOLERANCE[case.dtype]


def die(group):
    """The rank before the last is killed while the others are on their way."""
    shard = SequenceShard(1000, group)
    q = torch.randn(2, shard.n_local, requires_grad=True)
    scalar_long_conv(q, q, shard)
    if shard.rank == shard.size - 2:
        os.kill(os.getpid(), signal.SIGKILL)
    scalar_long_conv(q, q, shard).sum().backward()


def test_a_killed_rank_is_an_error_not_a_hang(distributed):
    try:
        with pytest.raises((pytest.fail.Exception, EOFError)):
            distributed(die, 3)
    finally:
        distributed.stop()  # the next case gets new ranks


def count_exchanges(group, options):
    """Calls and bytes forward, and together with backward; N = 4096 a channel and rank."""
    shard = SequenceShard(dist.get_world_size(group) * 4096, group)
    qs, ks = torch.randn(2, 2, shard.n_local, requires_grad=True)
    q, k = torch.randn(2, 2, 3, shard.n_local, requires_grad=True)
    with measuring() as both:
        with measuring() as forward:
            results = geometric_long_conv((qs, q), (ks, k), shard, **options)
        torch.autograd.backward([u.sum() for u in results])
    return forward.exchanges["long_conv"], both.exchanges["long_conv"]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_exchanges_are_as_few_and_as_small_as_the_formulas_say(distributed, world):
    """Circular and fast: a complex number for each of the L // 2 + 1 bins of L = 4096 tokens of the
    operands and the result, (P-1)/P of them, in 2 all-to-alls forward and 2 backward a chunk;
    padding doubles L."""
    for options, calls, length in (
        ({}, 2, 4096),
        ({"workspace_bytes": 1}, 4, 4096),
        ({"padding": "causal"}, 2, 8192),
    ):
        counts = distributed(count_exchanges, world, options)
        bins = 2 * 8 * (length // 2 + 1) * (world - 1)  # bytes of 2 channels, sent by all ranks
        assert sum(forward.bytes for forward, _ in counts) == 15 * bins
        assert sum(both.bytes for _, both in counts) == 30 * bins
        for forward, both in counts:
            assert (forward.calls, both.calls) == (calls, 2 * calls)
            assert abs(both.bytes - 30 * bins / world) <= 30 * 2 * 8 * world  # even shares


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes())
        return result


def largest_buffer(group, n):
    shard = SequenceShard(n, group)
    q, k = torch.randn(2, shard.n_local, requires_grad=True)
    with Largest() as largest:
        scalar_long_conv(q, k, shard).sum().backward()
    return largest.numel / 4


def test_no_rank_holds_a_buffer_of_full_length(distributed):
    """Two operands and their spectra are at most four numbers a local token; N is eight."""
    for largest in distributed(largest_buffer, 8, 1 << 14):
        assert largest <= 4.1 * (1 << 14) / 8


def identity_of_the_adjoint(group):
    """<A x, y> = <x, A^T y> summed over the ranks, for the exchange that everything rests on."""
    source, target = (SequenceShard(23, group, layout) for layout in ("contiguous", "cyclic"))
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    x = torch.randn(2, source.n_local, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, target.n_local, generator=generator, dtype=torch.float64)
    there = (redistribute(x, source, target) * y).sum()
    there.backward()
    assert x.grad is not None
    sums = torch.stack([there.detach(), (x.detach() * x.grad).sum()])
    dist.all_reduce(sums, group=group)
    assert torch.isclose(sums[0], sums[1], atol=1e-12)


def layouts(group):
    """Contents name their place, so a misplaced token is seen; any dtype; there and back."""
    for n in (0, 1, 5, 23, 64):
        full = torch.arange(2 * n).reshape(2, n)
        cyclic, contiguous = (SequenceShard(n, group, kind) for kind in ("cyclic", "contiguous"))
        for shard in (cyclic, contiguous):
            assert torch.equal(shard.gather(shard.scatter(full)), full)
            assert torch.equal(shard.index, shard.scatter(torch.arange(n)))
        for cast in (torch.int64, torch.float32, torch.bool):
            moved = redistribute(contiguous.scatter(full).to(cast), contiguous, cyclic)
            assert torch.equal(moved, cyclic.scatter(full).to(cast))
            back = redistribute(moved, cyclic, contiguous)
            assert torch.equal(back, contiguous.scatter(full).to(cast))
    batch = small_batch([23, 5])
    shards = [SequenceShard(23, group, kind) for kind in ("contiguous", "cyclic")]
    moved = redistribute_batch(batch.map(shards[0].scatter), *shards)
    for field, value in batch.map(shards[1].scatter).tensors.items():
        assert torch.equal(getattr(moved, field).nan_to_num(), value.nan_to_num())


@pytest.mark.parametrize("world", WORLDS)
def test_layouts_hold_every_token_once_and_change_into_each_other(distributed, world):
    distributed(layouts, world)
    distributed(identity_of_the_adjoint, world)
