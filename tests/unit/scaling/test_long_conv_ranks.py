"""The distributed long convolutions against one process: values and every gradient, on ranks that
are threads; what they send, and that they never wait for a device."""

from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.long_conv.operators import geometric_long_conv, scalar_long_conv, vector_long_conv
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import measuring
from tests.long_conv_cases import TERMS, TOLERANCE, Case
from tests.threaded_ranks import run_threaded


def random_case(random: Random) -> Case:
    """Lengths below, equal to and beyond the number of ranks, prime, fast, awkward; fewer channels
    than ranks; rows of unequal length, packed and empty ones; one chunk of channels or many."""
    operator = random.choice(["scalar", "vector", "geometric", "geometric"])
    n = random.choice([random.randint(1, 70), random.randint(1, 8), random.choice([97, 128, 240])])
    rows = random.randint(1, 3)
    options: dict[str, Any] = {
        "padding": random.choice(["circular", "causal"]),
        "workspace_bytes": random.choice([1 << 13, 1 << 30, 1 << 30]),
    }
    kind = random.choice(["whole", "whole", "tensor", "lengths", "bodies"])
    lengths = [random.randint(0, n) for _ in range(rows)]
    if kind in ("tensor", "lengths"):
        options["lengths"] = torch.tensor(lengths) if kind == "tensor" else tuple(lengths)
    if kind == "bodies":
        cuts = [sorted(random.choices(range(n + 1), k=random.randint(0, 5))) for _ in range(rows)]
        options["bodies"] = [[b - a for a, b in zip([0, *cut], cut, strict=False)] for cut in cuts]
    if operator == "geometric":
        options["terms"] = random.choice(list(TERMS))
    dtype = random.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    static = random.random() < 0.3
    channels, seed = random.randint(1, 5), random.randrange(1 << 30)
    return Case(operator, n, channels, rows, static, dtype, options, seed)


def errors_of(group: Any, cases: list[Case]) -> list[float]:
    return [case.error(group) for case in cases]


def check(world: int, cases: list[Case]) -> None:
    for errors in run_threaded(errors_of, world, cases):
        for error, case in zip(errors, cases, strict=True):
            assert error <= TOLERANCE[case.dtype], f"{error} on {world} ranks: {case}"


@pytest.mark.parametrize("world, cases", list(enumerate((12, 190, 120, 75, 45, 25, 20, 15), 1)))
@pytest.mark.usefixtures("without_annotations")
def test_any_call_equals_its_one_process_twin(world, cases):
    random = Random(world)
    check(world, [random_case(random) for _ in range(cases)])


def call_with_unusual_inputs(group: Any) -> None:
    """Strided tensors, no channels, no rows, no tokens."""
    shard = SequenceShard(50, group)
    full = torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(1)).double()
    strided, whole = full[:, shard.index].permute(2, 0, 1), full.permute(2, 0, 1)
    u = vector_long_conv(strided, strided.flip(0), shard)
    assert torch.allclose(u, shard.scatter(vector_long_conv(whole, whole.flip(0))), atol=1e-12)
    for shape in ((2, 0, shard.n_local), (0, 2, shard.n_local)):
        assert scalar_long_conv(torch.zeros(shape), torch.zeros(shape), shard).shape == shape
    nothing = SequenceShard(0, group)
    assert scalar_long_conv(torch.zeros(2, 0), torch.zeros(2, 0), nothing).shape == (2, 0)


def test_unusual_inputs():
    run_threaded(call_with_unusual_inputs, 3)


def poison_other_bodies(group: Any, bodies: list[list[int]]) -> None:
    """A body's values and gradients do not change by a bit when the others turn to NaN."""
    shard = SequenceShard(64, group)
    full = torch.randn(2, 1, 2, 3, 64, generator=torch.Generator().manual_seed(2))
    body = torch.zeros(64, dtype=torch.bool)
    start = sum(bodies[0][:2])
    body[start : start + bodies[0][2]] = True
    mine = shard.scatter(body)
    found = []
    for poison in (full, full.masked_fill(~body, torch.nan)):
        q, k = (x.clone().requires_grad_() for x in shard.scatter(poison))
        u = vector_long_conv(q, k, shard, bodies=bodies)
        (u[..., mine] ** 2).sum().backward()
        assert q.grad is not None and k.grad is not None
        found.append([u[..., mine], q.grad[..., mine], k.grad[..., mine]])
        if poison is full:  # what another body's token does to this one is exactly nothing
            assert not q.grad[..., ~mine].count_nonzero()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_bodies_do_not_leak_into_each_other(world):
    run_threaded(poison_other_bodies, world, [[5, 9, 17, 1, 20]])


@pytest.fixture
def rank_of_eight_on_meta():
    """Rank 3 of 8, with a device that has shapes but no values: whatever waits for one raises."""
    fake = {"extended_api": True, "devices": ["cpu", "meta"]}
    dist.Backend.register_backend("fake_meta", fake_pg._create_fake_pg, **fake)
    dist.init_process_group("fake_meta", store=fake_pg.FakeStore(), rank=3, world_size=8)
    yield
    dist.destroy_process_group()


class Operations(TorchDispatchMode):
    """Names of the operations; none may copy between the host and a device, which waits."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


MIXED = {"bodies": [[20, 0, 33], [1, 40, 7, 50], [100]]}
OPTIONS = [
    {},
    {"lengths": (100, 7, 64)},
    {"lengths": (100, 100, 100)},
    MIXED,
    {"lengths": [0, 0, 0]},
]


def on_meta(static: bool, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """Values and gradients of a geometric convolution of 100 tokens."""
    shard = SequenceShard(100)
    q, k = (3, 2), (2,) if static else (3, 2)
    x = [
        torch.empty(*shape, shard.n_local, device="meta", dtype=dtype, requires_grad=True)
        for shape in (q, k, (*q, 3), (*k, 3))
    ]
    results = geometric_long_conv((x[0], x[2]), (x[1], x[3]), shard, **options)
    return [*results, *torch.autograd.grad([u.sum() for u in results], x)]


@pytest.mark.parametrize("padding", ["circular", "causal"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.usefixtures("rank_of_eight_on_meta")
def test_nothing_waits_for_the_device(padding, static):
    for options in OPTIONS:
        assert all(x.is_meta for x in on_meta(static, padding=padding, **options))
    with pytest.raises(RuntimeError, match="meta"):
        on_meta(static, lengths=torch.empty(3, dtype=torch.int64, device="meta"))


@pytest.mark.usefixtures("rank_of_eight_on_meta")
def test_bodies_of_many_lengths_cost_as_many_exchanges_as_one_row():
    for options in OPTIONS:
        with measuring() as measured:
            on_meta(False, **options)
        assert measured.exchanges["long_conv"].calls == 4


@pytest.mark.usefixtures("rank_of_eight_on_meta")
def test_no_complex_and_no_half_precision_number_is_exchanged(monkeypatch):
    """NCCL knows no complex numbers; spectra of half precision would lose all digits."""
    sent, exchange = [], dist.all_to_all_single

    def spy(output, source, *args, **kwargs):
        sent.extend([output.dtype, source.dtype])
        return exchange(output, source, *args, **kwargs)

    for name in dir(dist):
        if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "isend")):
            monkeypatch.setattr(dist, name, None)  # no other is called
    monkeypatch.setattr(dist, "all_to_all_single", spy)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        on_meta(False, dtype, bodies=MIXED["bodies"])
        on_meta(True, dtype)
    assert set(sent) == {torch.float32} and len(sent) == 6 * 4 * 2


@pytest.mark.usefixtures("rank_of_eight_on_meta")
def test_no_matrix_product_of_spectra_runs_where_tf32_may_be_switched_on(monkeypatch):
    """The transform over the ranks is a Fourier transform on a device, whatever the flags say."""
    usual = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.backends.cuda.matmul.allow_tf32
        with Operations() as operations:
            on_meta(False, bodies=MIXED["bodies"])
    finally:
        torch.set_float32_matmul_precision(usual)
    assert "_fft_c2c" in operations.names
    assert not operations.names & {"mm", "bmm", "addmm", "baddbmm", "matmul", "einsum", "dot", "mv"}
