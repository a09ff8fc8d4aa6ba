"""Clifford layers against the algebra's multiplication table and its symmetries."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from scaling.algebra import norms, product
from scaling.algebra.clifford import (
    PATHS,
    CliffordMLP,
    GeometricProduct,
    MVLayerNorm,
    MVLinear,
    MVSiLU,
    Normalization,
    embed,
    geometric_product,
    grade_0,
    grade_1,
)
from scaling.experiments.cases.clifford import ERROR, SPEED, Clifford
from scaling.experiments.experiment import Point
from scaling.experiments.naive import clifford_mlp, dense_product
from tests import processes

ROOT = Path(__file__).parents[3]

BLADES = (0b000, 0b001, 0b010, 0b100, 0b110, 0b101, 0b011, 0b111)
"""Basis blades of the components s, v1..v3, b1..b3, p as bit masks of e1, e2, e3."""
DUAL_SIGN = (1, 1, 1, 1, 1, -1, 1, 1)  # the second component of b is -e13


def table() -> torch.Tensor:
    """(8, 8, 8): left component, right component -> result, by counting swaps of basis vectors."""
    result = torch.zeros(8, 8, 8, dtype=torch.float64)
    for i, left in enumerate(BLADES):
        for j, right in enumerate(BLADES):
            swaps = sum((left >> e + 1).bit_count() * (right >> e & 1) for e in range(3))
            k = BLADES.index(left ^ right)
            result[i, j, k] = (-1) ** swaps * DUAL_SIGN[i] * DUAL_SIGN[j] * DUAL_SIGN[k]
    return result


def test_the_product_is_the_multiplication_table():
    x, y = torch.randn(2, 2, 8, 3, 5, dtype=torch.float64)
    expected = torch.einsum("bicn,bjcn,ijk->bkcn", x, y, table())
    assert torch.allclose(geometric_product(x, y), expected, atol=1e-14)
    assert int(table().ne(0).sum()) == 64


def test_every_path_scales_one_product_of_grades():
    """The 20 paths split the 64 terms: they sum to the product, and each gives one grade."""
    x, y = torch.randn(2, 1, 8, 1, 4, dtype=torch.float64)
    paths = torch.eye(PATHS, dtype=torch.float64).unsqueeze(-1)
    parts = [geometric_product(x, y, path) for path in paths]
    assert torch.allclose(torch.stack(parts).sum(0), geometric_product(x, y), atol=1e-14)
    grades = torch.tensor([0, 1, 1, 1, 2, 2, 2, 3])
    for part in parts:
        assert len(grades[part.abs().sum((0, 2, 3)) > 0].unique()) == 1


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def layers(components: int) -> list:
    """Every layer with its own backward pass, what it takes, and what it takes unseen."""
    x = partial(normal, 2, components, 2, 2)
    first = normal(2, 1, 2, 2)
    scaled = partial(geometric_product, first=first, scale=0.7)
    linear = MVLinear(2, 3).double()
    scalars = MVLinear(2, 3, bias=False, grades=1).double()
    return [
        (scaled, (x(), normal(2, 4, 2, 2), normal(PATHS, 2)), [first]),
        (norms.gate, (x(), normal(4, 2, 1), normal(4, 2, 1)), []),
        (norms.normalize, (x(), torch.sigmoid(normal(4, 2, 1))), []),
        (partial(norms.layer_norm, components=components), (x(), normal(2, 1)), []),
        (partial(norms.layer_norm, components=1), (x(), normal(2, 1)), []),
        (linear, (x(),), list(linear.parameters())),
        (scalars, (x(),), list(scalars.parameters())),
    ]


@pytest.mark.parametrize("components", [4, 8])
def test_gradients_pass_gradcheck_in_tiles(components, monkeypatch):
    monkeypatch.setattr(product, "TILE", 1)  # every row, channel and token is one
    for layer, given, further in layers(components):

        def value(*inputs, layer=layer, given=given):
            return layer(*inputs[: len(given)])

        assert torch.autograd.gradcheck(value, (*given, *further))


@pytest.mark.parametrize("components", [1, 4, 7, 8])
def test_what_a_compiler_is_given_is_the_same(components, monkeypatch):
    for layer, given, further in layers(components):
        found = []
        for compiling in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda answer=compiling: answer)
            value = layer(*given)
            weights = torch.linspace(-1, 2, value.numel()).view_as(value)
            found.append([value, *torch.autograd.grad((value * weights).sum(), [*given, *further])])
        for eager, compiled in zip(*found, strict=True):
            assert torch.allclose(eager, compiled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("left, right, result", [(1, 4, 4), (4, 1, 4), (4, 4, 7), (7, 4, 8)])
def test_grades_that_are_absent_are_zero(left, right, result):
    """In operands, in the product, and in every layer."""

    def whole(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 8 - x.shape[1]))

    def agree(part: torch.Tensor, full: torch.Tensor) -> bool:
        return torch.allclose(whole(part), full, atol=1e-14)

    x, y, weights = normal(2, left, 3, 5), normal(2, right, 3, 5), normal(PATHS, 3)
    part = geometric_product(x, y, weights)
    assert part.shape[1] == result
    assert agree(part, geometric_product(whole(x), whole(y), weights))
    for layer in (MVLinear(3, 4), MVSiLU(3), Normalization(3), GeometricProduct(3), MVLayerNorm(3)):
        assert agree(layer.double()(x), layer(whole(x)))
    for final in (True, False):
        torch.manual_seed(0)
        full = CliffordMLP(3, 4, 2, final=final).double()
        for grades in (1, 2):
            mlp = CliffordMLP(3, 4, 2, final=final, grades=grades).double()
            mlp.load_state_dict(full.state_dict())
            assert torch.allclose(mlp(x), full(whole(x))[:, : mlp(x).shape[1]], atol=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_values_and_gradients_are_those_of_the_dense_table(dtype, tolerance):
    def last(x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 2, 1).flatten(0, 1)

    def dense(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return dense_product(last(x), last(y), weights)

    x, y = torch.randn(2, 2, 8, 16, 50, dtype=dtype, requires_grad=True)
    mlp = CliffordMLP(16, 8, 5).to(dtype)
    for ours, theirs, given in (
        (lambda *z: last(geometric_product(*z)), dense, [x, y, normal(PATHS, 16).to(dtype)]),
        (lambda *z: mlp(z[0]), lambda *z: clifford_mlp(mlp, z[0]), [x, *mlp.parameters()]),
    ):
        values = ours(*given), theirs(*given)
        grad = torch.randn_like(values[0])
        found, expected = ([v, *torch.autograd.grad(v, given, grad)] for v in values)
        for a, b in zip(found, expected, strict=True):
            assert torch.linalg.norm(a - b) <= tolerance * torch.linalg.norm(b)


def test_the_bench_compares_ours_with_the_dense_table():
    case = Clifford([16], channels=4, hidden=[4], compiled=False, seconds=1e-3)
    rows = list(case.measure(Point(length=16), torch.device("cpu")))
    assert [row["case"] for row in rows] == [
        f"product, eager: {ERROR}",
        f"product, eager: {SPEED}",
        f"Clifford MLP of 4, eager: {SPEED}",
    ]
    assert rows[0]["value"] < 1e-6
    assert all(row["ratio"] > 0 for row in rows[1:])


def test_autocast_multiplies_matrices_in_bfloat16():
    """What it costs is their rounding; parameters get gradients of their own precision."""
    mlp, x = CliffordMLP(3, 8, 4), torch.randn(2, 4, 3, 6, requires_grad=True)
    expected = mlp(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = mlp(x)
    assert found.dtype == torch.bfloat16
    assert 0 < torch.linalg.norm(found - expected) < 0.05 * torch.linalg.norm(expected)
    gradients = [
        torch.autograd.grad(y.float().sin().sum(), [x, *mlp.parameters()])
        for y in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        assert torch.linalg.norm(a - b) < 0.1 * torch.linalg.norm(b)


@pytest.mark.parametrize("final", [True, False])
def test_a_clifford_mlp_commutes_with_rotations_and_reflections(final):
    mlp = CliffordMLP(3, 8, 4, final=final).double()
    f, x = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 3, 5, dtype=torch.float64)
    for sign in (1, -1):
        rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
        rotation = rotation * torch.linalg.det(rotation) * sign
        plain, turned = mlp(embed(f, x)), mlp(embed(f, rotation @ x))
        assert torch.allclose(grade_0(turned), grade_0(plain), atol=1e-12)
        assert torch.allclose(grade_1(turned), rotation @ grade_1(plain), atol=1e-12)


@pytest.mark.parametrize("widths, parameters", [((17, 128, 51), 192_961), ((17, 128, 17), 155_867)])
def test_parameter_counts_are_those_of_the_definition(widths, parameters):
    mlp = CliffordMLP(*widths, final=False)
    assert sum(p.numel() for p in mlp.parameters()) == parameters


def test_without_a_final_map_the_output_forgets_the_scale():
    mlp = CliffordMLP(3, 8, 4, final=False)
    f, x = torch.randn(2, 3, 5), torch.randn(2, 3, 3, 5)
    for scale in (0.1, 100.0):
        norms = mlp(embed(scale * f, scale * x)).square().sum(1).sqrt()
        assert torch.allclose(norms.mean(1), torch.ones(2, 5), atol=1e-3)


def test_a_compiler_takes_a_clifford_mlp_as_one_graph():
    """In a process whose functions are not watched: watching them breaks every graph."""
    script = """
import torch
from scaling.algebra.clifford import CliffordMLP
run = torch.compile(CliffordMLP(3, 4, 3), fullgraph=True, backend="eager")
run(torch.randn(1, 4, 3, 8)).sum().backward()
"""
    ended = processes.run([sys.executable, "-W", "error::UserWarning", "-c", script], cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-2000:]
