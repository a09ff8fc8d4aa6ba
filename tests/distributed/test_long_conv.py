"""The distributed long convolutions against their one-process twins: values and every gradient.

The groups are the last ranks of the pool, so they do not start at rank 0 (but for all eight).
"""

import pytest
import torch
import torch.distributed as dist

from data_pipeline.errors import ConfigError
from scaling.ops.long_conv import geometric_long_conv, scalar_long_conv, vector_long_conv
from scaling.parallel.collectives import traffic
from scaling.parallel.shard import SequenceShard, redistribute, redistribute_batch
from tests.small_models import small_batch

WORLDS = (1, 2, 3, 4, 8)
LENGTHS = (1, 2, 7, 97, 120)


def _scalar(tensors, *arguments):
    return (scalar_long_conv(tensors[0], tensors[1], *arguments),)


def _vector(tensors, *arguments):
    return (vector_long_conv(tensors[2], tensors[3], *arguments),)


def _geometric(tensors, *arguments):
    return geometric_long_conv((tensors[0], tensors[2]), (tensors[1], tensors[3]), *arguments)


def compare(group, n, channels, padding, row_lengths, dtype):
    """Largest error of values and gradients over all operators, relative to each tensor's norm."""
    generator = torch.Generator().manual_seed(n * 10 + channels)
    rows = 2 if row_lengths is None else len(row_lengths)
    shapes = [(rows, channels, n)] * 2 + [(rows, channels, 3, n)] * 2
    full = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    lengths = None if row_lengths is None else torch.tensor(row_lengths)
    shard = SequenceShard(n, group)
    worst = 0.0
    for operator in (_scalar, _vector, _geometric):
        whole = [x.clone().requires_grad_() for x in full]
        local = [shard.scatter(x).requires_grad_() for x in full]
        expected = operator(whole, None, padding, lengths)
        results = operator(local, shard, padding, lengths)
        weights = [torch.randn(u.shape, generator=generator).to(dtype) for u in expected]
        sum((u * w).sum() for u, w in zip(expected, weights, strict=True)).backward()
        sum((u * shard.scatter(w)).sum() for u, w in zip(results, weights, strict=True)).backward()
        pairs = list(zip(results, expected, strict=True))
        pairs += [(a.grad, b.grad) for a, b in zip(local, whole, strict=True) if b.grad is not None]
        for a, b in pairs:
            assert a is not None
            error = (shard.gather(a.detach()) - b.detach()).norm() / b.detach().norm().clamp(
                min=1e-9
            )
            worst = max(worst, error.item())
    return worst


def case_grid(group, dtype, tolerance):
    failures = []
    for n in LENGTHS if dtype == torch.float64 else LENGTHS[-2:]:
        for padding in ("circular", "causal"):
            for channels in (1, 3):
                uneven = [n, max(n - 3, 0), (n + 1) // 2]
                for row_lengths in (None, uneven):
                    error = compare(group, n, channels, padding, row_lengths, dtype)
                    if not error <= tolerance:
                        failures.append((n, padding, channels, row_lengths, error))
    return failures


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("world", WORLDS)
def test_results_and_gradients_do_not_depend_on_the_number_of_ranks(
    distributed, world, dtype, tolerance
):
    """Lengths below, equal to and beyond the number of ranks; prime, uneven; fewer channels than
    ranks; rows of unequal length."""
    for failures in distributed(case_grid, world, dtype, tolerance):
        assert not failures


def count_exchanges(group):
    shard = SequenceShard(4 * 1024, group)
    q = torch.randn(1, 2, 3, shard.n_local, requires_grad=True)
    traffic.reset()
    u = vector_long_conv(q, q.flip(1), shard)
    forward = traffic.snapshot()["long_conv"]
    u.sum().backward()
    return forward, traffic.snapshot()["long_conv"]


def test_three_exchanges_forward_and_three_backward_of_the_data_own_volume(distributed):
    """A circular convolution of a fast length sends (P-1)/P of each operand, plus one bin."""
    for forward, both in distributed(count_exchanges, 4):
        assert (forward.calls, both.calls) == (3, 6)
        slice_ = -(-(1024 // 2 + 1) // 4)
        operand = 3 * 2 * 3 * slice_ * 8  # ranks × channels × components × bins × complex64
        assert (forward.bytes, both.bytes) == (3 * operand, 6 * operand)
        assert operand <= 1.01 * 3 / 4 * (2 * 3 * 1024 * 4)


def unusual_inputs(group):
    """Half precision, strided inputs, a second derivative, no channels."""
    shard = SequenceShard(50, group)
    full = torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(1)).double()
    strided = full[:, shard.index].permute(2, 0, 1)
    whole = full.permute(2, 0, 1)
    u = vector_long_conv(strided, strided.flip(0), shard)
    expected = shard.scatter(vector_long_conv(whole, whole.flip(0)))
    assert torch.allclose(u, expected, atol=1e-12)
    half = vector_long_conv(strided.bfloat16(), strided.flip(0).bfloat16(), shard)
    assert half.dtype == torch.bfloat16
    assert (half.double() - expected).norm() < 0.02 * expected.norm()
    empty = scalar_long_conv(
        torch.zeros(2, 0, shard.n_local), torch.zeros(2, 0, shard.n_local), shard
    )
    assert empty.shape == (2, 0, shard.n_local)
    q = torch.randn(3, shard.n_local, requires_grad=True)
    u = vector_long_conv(q, q.detach().flip(1), shard)
    with pytest.raises(ConfigError, match="second derivative"):
        torch.autograd.grad(u.sum(), q, create_graph=True)


def test_unusual_inputs(distributed):
    distributed(unusual_inputs, 3)


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
            assert torch.equal(shard.owner(shard.index), torch.full_like(shard.index, shard.rank))
        for cast in (torch.int64, torch.float32, torch.bool):
            moved = redistribute(contiguous.scatter(full).to(cast), contiguous, cyclic)
            assert torch.equal(moved, cyclic.scatter(full).to(cast))
            back = redistribute(moved, cyclic, contiguous)
            assert torch.equal(back, contiguous.scatter(full).to(cast))
    batch = small_batch([23, 5])
    shards = [SequenceShard(23, group, kind) for kind in ("contiguous", "cyclic")]
    moved = redistribute_batch(batch.map(shards[0].scatter), *shards)
    for field, value in vars(batch.map(shards[1].scatter)).items():
        assert torch.equal(getattr(moved, field).nan_to_num(), value.nan_to_num())


@pytest.mark.parametrize("world", WORLDS)
def test_layouts_hold_every_token_once_and_change_into_each_other(distributed, world):
    distributed(layouts, world)
    distributed(identity_of_the_adjoint, world)
