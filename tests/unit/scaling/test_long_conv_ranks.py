"""The distributed long convolutions against one process: values and every gradient, on ranks that
are threads; what they send, and that they never wait for a device."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

import jaxtyping
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.long_conv import transform
from scaling.long_conv.operators import geometric_long_conv, scalar_long_conv, vector_long_conv
from scaling.parallel.collectives import traffic
from scaling.parallel.shard import SequenceShard
from tests.threaded_ranks import run_threaded

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
TERMS = {  # names of the operands that they take
    None: ("qs", "ks", "q", "k"),
    ("scalar",): ("qs", "ks"),
    ("dot", "cross"): ("q", "k"),
    ("scale",): ("qs", "k"),
    ("scalar", "scale"): ("qs", "ks", "q"),
}


@dataclass
class Case:
    """A call and what one process makes of it."""

    operator: str
    length: int
    channels: int
    rows: int
    static: bool
    dtype: torch.dtype
    options: dict[str, Any]
    seed: int
    operands: dict[str, Tensor] = field(default_factory=dict, repr=False)
    weights: list[Tensor] = field(default_factory=list, repr=False)
    expected: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        q = (self.rows, self.channels)
        k = (self.channels,) if self.static else q
        vectors, n = {"scalar": (), "vector": (3,)}.get(self.operator), self.length
        if vectors is not None:
            self.operands = {"q": numbers(*q, *vectors, n), "k": numbers(*k, *vectors, n)}
        else:
            shapes = {"qs": (*q, n), "ks": (*k, n), "q": (*q, 3, n), "k": (*k, 3, n)}
            names = TERMS[self.options.get("terms")]
            self.operands = {name: numbers(*shapes[name]) for name in names}
        whole = {name: x.clone().requires_grad_() for name, x in self.operands.items()}
        results = self.call(whole, None)
        self.weights = [numbers(*u.shape) for u in results]
        torch.autograd.backward(results, self.weights)
        self.expected = [*(u.detach() for u in results), *gradients(whole)]

    def call(self, x: dict[str, Tensor], shard: SequenceShard | None) -> tuple[Tensor, ...]:
        if self.operator == "geometric":
            q, k = (x.get("qs"), x.get("q")), (x.get("ks"), x.get("k"))
            return geometric_long_conv(q, k, shard, **self.options)
        one = scalar_long_conv if self.operator == "scalar" else vector_long_conv
        return (one(x["q"], x["k"], shard, **self.options),)

    def error(self, group: Any) -> float:
        """Largest one of this rank's values and gradients, relative to the whole tensor's norm."""
        shard = SequenceShard(self.length, group)
        local = {name: shard.scatter(x).requires_grad_() for name, x in self.operands.items()}
        results = self.call(local, shard)
        torch.autograd.backward(results, [shard.scatter(x) for x in self.weights])
        errors = [
            ((a - shard.scatter(b)).double().norm() / b.double().norm().clamp(min=1e-9)).item()
            for a, b in zip([*results, *gradients(local)], self.expected, strict=True)
        ]
        return max(errors) if all(error == error for error in errors) else float("inf")


def gradients(tensors: dict[str, Tensor]) -> list[Tensor]:
    assert all(x.grad is not None for x in tensors.values())
    return [x.grad for x in tensors.values() if x.grad is not None]


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


@pytest.fixture
def without_annotations(monkeypatch):
    """They are checked at every other test's calls; here that would take most of the time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("world, cases", list(enumerate((120, 110, 90, 60, 40, 30, 25, 25), 1)))
@pytest.mark.usefixtures("without_annotations")
def test_any_call_equals_its_one_process_twin(world, cases):
    random = Random(world)
    check(world, [random_case(random) for _ in range(cases)])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_phases_of_a_rank_change_nothing(world, monkeypatch):
    """Every rank cuts its tokens into phases of its own, as for the lengths that MKL gets wrong."""
    monkeypatch.setattr(transform, "MKL_LIMIT", 8)
    check(
        world,
        [
            Case("geometric", n * world, 2, 2, static, torch.float64, options, seed=n)
            for n in (8, 32)
            for static in (False, True)
            for options in ({}, {"padding": "causal"}, {"bodies": [[n // 2, n // 2 - 1], [n]]})
        ],
    )


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
        traffic.reset()
        on_meta(False, **options)
        assert traffic.snapshot()["long_conv"].calls == 4


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
        on_meta(False, dtype, **MIXED)
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
            on_meta(False, **MIXED)
    finally:
        torch.set_float32_matmul_precision(usual)
    assert "_fft_c2c" in operations.names
    assert not operations.names & {"mm", "bmm", "addmm", "baddbmm", "matmul", "einsum", "dot", "mv"}
