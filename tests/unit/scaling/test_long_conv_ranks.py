"""The distributed long convolutions against one process: values and every gradient, on ranks that
are threads; what they send, and that they never wait for a device."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from scaling.long_conv import transform
from scaling.long_conv.operators import geometric_long_conv, scalar_long_conv, vector_long_conv
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


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.usefixtures("without_annotations")
def test_any_call_equals_its_one_process_twin(world):
    random = Random(world)
    check(world, [random_case(random) for _ in range(65)])


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
