"""The distributed long convolutions against their one-process twins: values and every gradient.

The groups are the last ranks of the pool, so they do not start at rank 0 (but for all eight).
"""

from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.errors import ConfigError
from scaling.long_conv import transform
from scaling.long_conv.operators import geometric_long_conv, scalar_long_conv, vector_long_conv
from scaling.parallel.collectives import traffic
from scaling.parallel.shard import SequenceShard, redistribute, redistribute_batch
from tests.small_models import small_batch

WORLDS = (1, 2, 3, 4, 5, 8)


def _scalar(tensors, shard, **options):
    return (scalar_long_conv(tensors[0], tensors[1], shard, **options),)


def _vector(tensors, shard, **options):
    return (vector_long_conv(tensors[2], tensors[3], shard, **options),)


def _geometric(tensors, shard, **options):
    q, k = (tensors[0], tensors[2]), (tensors[1], tensors[3])
    return geometric_long_conv(q, k, shard, **options)


def compare(group, operator, n, channels, rows=2, static=False, dtype=torch.float64, **options):
    """Largest error of values and gradients, relative to each tensor's norm; on the first rank,
    the only one that computes the whole."""
    generator = torch.Generator().manual_seed(n * 10 + channels)
    batch = (rows, channels)
    kernel = (channels,) if static else batch
    shapes = [(*batch, n), (*kernel, n), (*batch, 3, n), (*kernel, 3, n)]
    full = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    shard = SequenceShard(n, group)
    local = [shard.scatter(x).requires_grad_() for x in full]
    results = operator(local, shard, **options)
    weights = [
        torch.randn(*u.shape[:-1], n, generator=generator, dtype=torch.float64).to(dtype)
        for u in results
    ]
    torch.autograd.backward(results, [shard.scatter(w) for w in weights])
    found = [*results, *[x.grad for x in local if x.grad is not None]]
    sizes = [prod(x.shape[:-1]) for x in found]
    together = shard.gather(torch.cat([x.detach().flatten(0, -2) for x in found]))
    if shard.rank != 0:
        return 0.0
    whole = [x.requires_grad_() for x in full]
    expected = operator(whole, None, **options)
    torch.autograd.backward(expected, weights)
    expected = [*expected, *[x.grad for x in whole if x.grad is not None]]
    return max(
        ((a - b.flatten(0, -2)).norm() / b.norm().clamp(min=1e-9)).item()
        for a, b in zip(together.split(sizes), expected, strict=True)
    )


def grid():
    """Lengths below, equal to and beyond the number of ranks; prime, uneven, awkward; fewer
    channels than ranks; rows of unequal length. The largest length has one case of each kind."""
    for n in (1, 2, 7, 97, 1000, 4096):
        for operator in (_scalar, _vector, _geometric) if n < 1000 else (_geometric,):
            for channels in (1, 3, 8) if operator is _geometric else (3,):
                for padding in ("circular", "causal"):
                    for lengths in (None, [n, max(n - 3, 0), (n + 1) // 2]):
                        yield operator, n, channels, padding, lengths
    yield _geometric, 65537, 8, "circular", None
    yield _geometric, 65537, 3, "causal", None
    yield _geometric, 65537, 1, "circular", [65537, 4096, 50000]


def case_grid(group, dtype, tolerance):
    failures = []
    for operator, n, channels, padding, lengths in grid():
        if dtype == torch.float32 and (channels == 3 or n not in (97, 4096, 65537)):
            continue
        rows = 1 if lengths is None else 3
        lengths = None if lengths is None else torch.tensor(lengths)
        error = compare(
            group, operator, n, channels, rows, dtype=dtype, padding=padding, lengths=lengths
        )
        if not error <= tolerance:
            failures.append((operator.__name__, n, channels, padding, lengths, error))
    return failures


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("world", WORLDS)
def test_results_and_gradients_do_not_depend_on_the_number_of_ranks(
    distributed, world, dtype, tolerance
):
    for failures in distributed(case_grid, world, dtype, tolerance):
        assert not failures


def case_split(group):
    """Every rank cuts its tokens into phases of its own, as for the lengths that MKL gets wrong."""
    usual, transform.MKL_LIMIT = transform.MKL_LIMIT, 8
    try:
        errors = [
            compare(group, _geometric, n * dist.get_world_size(group), 2, **options)
            for n in (8, 32)
            for options in ({}, {"padding": "causal"}, {"bodies": [[n // 2, n // 2 - 1], [n]]})
        ]
    finally:
        transform.MKL_LIMIT = usual
    return max(errors)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_phases_of_a_rank_change_nothing(distributed, world):
    assert max(distributed(case_split, world)) <= 1e-12


@st.composite
def calls(draw):
    """Any call: operator, size, rows or bodies, static or not, how memory is used."""
    n, channels = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    rows = draw(st.integers(1, 3))
    options = {
        "padding": draw(st.sampled_from(["circular", "causal"])),
        "keep_spectra": draw(st.booleans()),
        "workspace_bytes": draw(st.sampled_from([1, 20_000, 1 << 30])),
    }
    kind = draw(st.sampled_from(["whole", "lengths", "bodies"]))
    if kind == "lengths":
        lengths = st.lists(st.integers(0, n), min_size=rows, max_size=rows)
        options["lengths"] = torch.tensor(draw(lengths))
    if kind == "bodies":
        cuts = st.lists(st.integers(0, n), max_size=5).map(sorted)
        all_cuts = [draw(cuts) for _ in range(rows)]
        options["bodies"] = [
            [b - a for a, b in zip([0, *cut], cut, strict=False)] for cut in all_cuts
        ]
    operator = draw(st.sampled_from([_scalar, _vector, _geometric]))
    return (
        draw(st.sampled_from([2, 3, 5])),
        (operator, n, channels, rows, draw(st.booleans())),
        options,
    )


def one_call(group, arguments, options):
    return compare(group, *arguments, **options)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls())
def test_any_call_equals_its_one_process_twin(distributed, call):
    world, arguments, options = call
    assert max(distributed(one_call, world, arguments, options)) <= 1e-12


def count_exchanges(group, options):
    """Calls and bytes forward, and together with backward; N = 4096 a channel and rank."""
    shard = SequenceShard(dist.get_world_size(group) * 4096, group)
    qs, ks = torch.randn(2, 2, shard.n_local, requires_grad=True)
    q, k = torch.randn(2, 2, 3, shard.n_local, requires_grad=True)
    traffic.reset()
    results = geometric_long_conv((qs, q), (ks, k), shard, **options)
    forward = traffic.snapshot()["long_conv"]
    sum(u.sum() for u in results).backward()
    return forward, traffic.snapshot()["long_conv"]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_exchanges_are_as_few_and_as_small_as_the_formulas_say(distributed, world):
    """Circular and fast: (P-1)/P of the operands' and the result's own bytes, in 2 all-to-alls
    forward and 2 backward a chunk; spectra that are not kept travel twice; padding doubles."""
    token = 2 * 4096 * 4 * (world - 1) // world  # bytes of one number of every channel and token
    for forward, both in distributed(count_exchanges, world, {}):
        assert (forward.calls, both.calls) == (2, 4)
        assert (forward.bytes, both.bytes) == (15 * token, 30 * token)
    for forward, both in distributed(count_exchanges, world, {"workspace_bytes": 1}):
        assert (forward.calls, both.calls) == (4, 8)
        assert (forward.bytes, both.bytes) == (15 * token, 30 * token)
    for forward, both in distributed(count_exchanges, world, {"keep_spectra": False}):
        assert (forward.calls, both.calls) == (2, 4)
        assert (forward.bytes, both.bytes) == (15 * token, 38 * token)
    for forward, both in distributed(count_exchanges, world, {"padding": "causal"}):
        assert (forward.calls, both.calls) == (2, 4)
        assert (forward.bytes, both.bytes) == (30 * token, 60 * token)


def unusual_inputs(group):
    """Half precision, strided inputs, second derivatives, no channels, no tokens."""
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
    for shape in ((2, 0, shard.n_local), (0, 2, shard.n_local)):
        assert scalar_long_conv(torch.zeros(shape), torch.zeros(shape), shard).shape == shape
    nothing = SequenceShard(0, group)
    assert scalar_long_conv(torch.zeros(2, 0), torch.zeros(2, 0), nothing).shape == (2, 0)


def second_derivatives(group, bodies):
    """Of a loss on a gradient, as of forces: everywhere, against one process."""
    n = 23
    shard = SequenceShard(n, group)
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(2, 1, 2, 3, n, generator=generator, dtype=torch.float64)
    found = []
    for part, where in ((shard.scatter(full), shard), (full, None)):
        q, k = (x.clone().requires_grad_() for x in part)
        u = vector_long_conv(q, k, where, bodies=bodies, keep_spectra=False)
        first = torch.autograd.grad(u.pow(3).sum(), (q, k), create_graph=True)
        sum(x.pow(2).sum() for x in first).backward()
        found.append((q.grad, k.grad))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, shard.scatter(b), rtol=1e-11, atol=1e-9)
    q = shard.scatter(full[0]).requires_grad_()
    u = vector_long_conv(q, q.detach().flip(1), shard)
    with pytest.raises(ConfigError, match="keep_spectra=False"):
        torch.autograd.grad(u.sum(), q, create_graph=True)


def test_unusual_inputs(distributed):
    distributed(unusual_inputs, 3)
    distributed(second_derivatives, 3, None)
    distributed(second_derivatives, 3, [[7, 0, 11]])


def nothing_leaks(group, bodies):
    """A body's values and gradients do not change by a bit when the others turn to NaN."""
    n = 64
    shard = SequenceShard(n, group)
    full = torch.randn(2, 1, 2, 3, n, generator=torch.Generator().manual_seed(2))
    body = torch.zeros(n, dtype=torch.bool)
    start = sum(bodies[0][:2])
    body[start : start + bodies[0][2]] = True
    mine = shard.scatter(body)
    found = []
    for poison in (full, full.masked_fill(~body, torch.nan)):
        q, k = (x.clone().requires_grad_() for x in shard.scatter(poison))
        u = vector_long_conv(q, k, shard, bodies=bodies)
        (u[..., mine] ** 2).sum().backward()
        found.append([u[..., mine], q.grad[..., mine], k.grad[..., mine]])
        if poison is full:  # what another body's token does to this one is exactly nothing
            assert not q.grad[..., ~mine].count_nonzero()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_bodies_do_not_leak_into_each_other(distributed, world):
    distributed(nothing_leaks, world, [[5, 9, 17, 1, 20]])


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
