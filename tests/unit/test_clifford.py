"""Clifford layers against the algebra's multiplication table and its symmetries."""

import pytest
import torch

from scaling.algebra.clifford import (
    PATHS,
    CliffordMLP,
    embed,
    geometric_product,
    grade_0,
    grade_1,
)

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


def test_product_gradients_pass_gradcheck():
    x, y = torch.randn(2, 1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(PATHS, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(geometric_product, (x, y, weights))


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
