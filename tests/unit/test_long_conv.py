"""The local long convolutions against the sum that defines them."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scaling.ops.long_conv import geometric_long_conv, scalar_long_conv, vector_long_conv

LENGTHS = (1, 2, 7, 16, 97, 120)


def direct_sum(product: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, wrap: bool):
    """u_i = sum_j product(q_j, k_{i-j}), O(N²), tokens last."""
    n = q.shape[-1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    shifted = k[..., (i - j) % n]  # (..., i, j)
    if not wrap:
        shifted = shifted * (i >= j)
    return product(q.unsqueeze(-2).expand(shifted.shape), shifted).sum(-1)


def cross(q: Tensor, k: Tensor) -> Tensor:
    return torch.linalg.cross(q, k, dim=-3)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("padding", ["circular", "causal"])
@pytest.mark.parametrize("n", LENGTHS)
def test_convolutions_are_the_sums_that_define_them(n, padding):
    """Scalar, vector and geometric; float64; 1 and 3 channels."""
    wrap = padding == "circular"
    for channels in (1, 3):
        qs, ks = torch.randn(2, 2, channels, n, dtype=torch.float64)
        q, k = torch.randn(2, 2, channels, 3, n, dtype=torch.float64)
        scalar = direct_sum(torch.mul, qs, ks, wrap)
        assert relative(scalar_long_conv(qs, ks, padding=padding), scalar) < 1e-14
        axial = direct_sum(cross, q, k, wrap)
        assert relative(vector_long_conv(q, k, padding=padding), axial) < 1e-14
        a = scalar + direct_sum(torch.mul, q, k, wrap).sum(-2)
        u = direct_sum(torch.mul, qs.unsqueeze(-2).expand_as(q), k, wrap)
        u = u + direct_sum(torch.mul, q, ks.unsqueeze(-2).expand_as(k), wrap)
        results = geometric_long_conv((qs, q), (ks, k), padding=padding)
        for result, expected in zip(results, (a, u, axial), strict=True):
            assert relative(result, expected) < 1e-14


@pytest.mark.parametrize("padding", ["circular", "causal"])
def test_every_row_wraps_at_its_own_length_whatever_its_padding_holds(padding):
    lengths = torch.tensor([13, 7, 1, 0, 12])
    q, k = torch.randn(2, 5, 2, 3, 13, dtype=torch.float64)
    for x in (q, k):
        x[
            torch.arange(13).expand(5, 13)[:, None, None].expand(x.shape)
            >= lengths.view(-1, 1, 1, 1)
        ] = torch.nan
    q.requires_grad_()
    u = vector_long_conv(q, k, padding=padding, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = vector_long_conv(q[row, ..., :n], k[row, ..., :n], padding=padding)
        assert torch.allclose(u[row, ..., :n], alone, atol=1e-12)
        assert (u[row, ..., n:] == 0).all()
    u.square().sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_gradients_pass_gradcheck():
    q, k = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    s, t = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 3])
    for padding in ("circular", "causal"):
        for rows in (None, lengths):
            assert torch.autograd.gradcheck(
                lambda q, k, p=padding, r=rows: vector_long_conv(q, k, None, p, r), (q, k)
            )
            assert torch.autograd.gradcheck(
                lambda s, t, p=padding, r=rows: scalar_long_conv(s, t, None, p, r), (s, t)
            )
            assert torch.autograd.gradcheck(
                lambda s, q, t, k, p=padding, r=rows: geometric_long_conv(
                    (s, q), (t, k), None, p, r
                ),
                (s, q, t, k),
            )


def test_known_properties_of_the_cross_convolution():
    """u(q, k) = -u(k, q), u(q, q) = 0, shifts of q shift u, rotations of both rotate u."""
    q, k = torch.randn(2, 4, 3, 31, dtype=torch.float64)
    u = vector_long_conv(q, k)
    assert relative(vector_long_conv(k, q), -u) < 1e-14
    assert vector_long_conv(q, q).norm() < 1e-12
    assert relative(vector_long_conv(q.roll(5, -1), k), u.roll(5, -1)) < 1e-14
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    rotated = vector_long_conv(rotation @ q, rotation @ k)
    assert relative(rotated, torch.linalg.det(rotation) * rotation @ u) < 1e-14


def test_float32_keeps_its_digits_on_centred_input_and_half_is_transformed_in_float32():
    q, k = torch.randn(2, 1, 3, 1 << 16, dtype=torch.float64)
    u = vector_long_conv(q, k)
    assert relative(vector_long_conv(q.float(), k.float()).double(), u) < 1e-6
    result = vector_long_conv(q.bfloat16(), k.bfloat16())
    assert result.dtype == torch.bfloat16
    rounded = vector_long_conv(q.bfloat16().double(), k.bfloat16().double())
    assert relative(result.double(), rounded) < 3e-3  # one rounding of the result, 2^-9


WRONG = {
    "vector_long_conv(x, x[..., :4])": "ShapeError: q (1, 3, 5) and k (1, 3, 4)",
    "vector_long_conv(x[:, :2], x[:, :2])": "ShapeError: vectors need shape (..., 3, n)",
    "scalar_long_conv(x, x, padding='mirror')": "ConfigError: unknown padding 'mirror'",
    "scalar_long_conv(x, x, lengths=torch.tensor([5, 5]))": "ShapeError: lengths (2,)",
    "scalar_long_conv(x, x, lengths=torch.tensor([6]))": "ShapeError: lengths [6] must lie between",
    "scalar_long_conv(x, x, SequenceShard(6))": "ShapeError: SequenceShard(6, rank 0 of 1, cyclic)",
    "scalar_long_conv(x, x, SequenceShard(5, layout='contiguous'))": "ConfigError: a long conv",
    "scalar_long_conv(x.long(), x.long())": "ShapeError: q torch.int64 and k torch.int64",
    "scalar_long_conv(x, x.double())": "ShapeError: q torch.float32 and k torch.float64",
    "scalar_long_conv(x, x, lengths=torch.tensor([3.5]))": "ShapeError: lengths are torch.float32",
    "geometric_long_conv((x, x), (x, x))": "ShapeError: scalars (1, 3, 5) and vectors (1, 3, 5)",
}


def test_wrong_arguments_are_named():
    """In a process of its own: there the annotations are not checked, as with a user."""
    program = f"""
import torch
from scaling.ops import *
from scaling.parallel import SequenceShard
x = torch.zeros(1, 3, 5)
for call in {list(WRONG)}:
    try:
        eval(call)
    except ValueError as error:
        print(f"{{type(error).__name__}}: {{error}}")
    else:
        print("no error")
"""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    for call, said, expected in zip(WRONG, output, WRONG.values(), strict=True):
        assert said.startswith(expected), call
