"""The local long convolutions against the sum that defines them."""

import subprocess
import sys
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from scaling.long_conv import transform
from scaling.long_conv.convolution import Convolution
from scaling.long_conv.operands import Padding
from scaling.long_conv.operators import geometric_long_conv, scalar_long_conv, vector_long_conv

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
def test_convolutions_are_the_sums_that_define_them(n, padding: Padding):
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
@pytest.mark.parametrize("longest", [12, 13])  # a fast length and one that is padded
def test_every_row_wraps_at_its_own_length_whatever_its_padding_holds(longest, padding):
    lengths = torch.tensor([longest, 7, 1, 0, 11])
    q, k = torch.randn(2, 5, 2, 3, longest, dtype=torch.float64)
    for x in (q, k):
        x[
            torch.arange(longest).expand(5, longest)[:, None, None].expand(x.shape)
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


@pytest.mark.usefixtures("without_annotations")
def test_gradients_pass_gradcheck():
    q, k = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    s, t = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 3])
    for padding in get_args(Padding):
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


def test_float32_keeps_its_digits_on_centred_input_alone():
    """At a million tokens; a mean costs what the docstring says, and taking it out saves all."""
    n, mean = 1 << 20, 50.0
    q, k = torch.randn(2, 1, 3, n, dtype=torch.float64)
    q, k = (x - x.mean(-1, keepdim=True) for x in (q, k))
    u = vector_long_conv(q, k)
    assert relative(vector_long_conv(q.float(), k.float()).double(), u) < 1e-6
    offset = torch.tensor([1.0, -0.4, 0.6], dtype=torch.float64).unsqueeze(-1) * mean
    a, b = q + offset, k - offset.roll(1, 0)
    fluctuation = vector_long_conv(a.float(), b.float()).double() - n * cross_of_means(a, b)
    lost = relative(fluctuation, u) / relative(vector_long_conv(q.float(), k.float()).double(), u)
    assert 1e3 < lost < 10 * mean * n**0.5


def cross_of_means(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.cross(a.mean(-1), b.mean(-1), dim=-1).unsqueeze(-1)


@pytest.mark.parametrize("n", [8, 32, 256])
def test_transforms_that_are_joined_by_hand_are_torchs(n, monkeypatch):
    """As for the lengths that MKL gets wrong on some processors."""
    monkeypatch.setattr(transform, "MKL_LIMIT", 8)
    monkeypatch.setattr(transform, "MKL_LOSES_DIGITS", True)
    x = torch.randn(2, 3, n)
    bins = torch.fft.rfft(x)
    assert relative(transform.rfft(x), bins) < 1e-6 and relative(transform.irfft(bins, n), x) < 1e-6
    q, k = torch.randn(2, 1, 3, n)
    exact = vector_long_conv(q.double(), k.double())
    assert relative(vector_long_conv(q, k).double(), exact) < 1e-6


def test_half_precision_is_transformed_in_float32(monkeypatch):
    """Also where autocast computes in half precision around it."""
    transformed, rfft = [], torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x: transformed.append(x.dtype) or rfft(x))
    q, k = torch.randn(2, 1, 3, 1 << 12, dtype=torch.float64)
    for autocast in (False, True):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                result = vector_long_conv(q.to(dtype), k.to(dtype))
            assert result.dtype == dtype
            rounded = vector_long_conv(q.to(dtype).double(), k.to(dtype).double())
            assert relative(result.double(), rounded) < 3e-3  # one rounding of the result, 2^-9
    expected = vector_long_conv(q.float(), k.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vector_long_conv(q.float(), k.float()), expected)
    assert set(transformed) == {torch.float32, torch.float64}


def test_a_huge_future_token_leaks_into_the_past_by_float32_rounding_alone():
    """docs/long_convolution.md says how much; float64 leaks nothing that matters."""
    n = 1 << 14
    q, k = torch.randn(2, 1, n, dtype=torch.float64)
    spiked = q.clone()
    spiked[..., -1] = 1e6
    leaks = []
    for dtype in (torch.float32, torch.float64):
        u, v = (scalar_long_conv(x.to(dtype), k.to(dtype), padding="causal") for x in (q, spiked))
        leaks.append((u - v)[..., :-1].abs().max().item())
    assert 0.1 < leaks[0] < 2.0
    assert leaks[1] < 1e-8


def test_terms_are_parts_of_the_whole_and_operands_may_be_missing():
    qs, ks = torch.randn(2, 2, 3, 9, dtype=torch.float64)
    q, k = torch.randn(2, 2, 3, 3, 9, dtype=torch.float64)
    a, u, axial = geometric_long_conv((qs, q), (ks, k))
    (dot,) = geometric_long_conv((None, q), (None, k), terms=["dot"])
    assert torch.allclose(scalar_long_conv(qs, ks) + dot, a)
    (left,) = geometric_long_conv((qs, None), (None, k))
    (right,) = geometric_long_conv((None, q), (ks, None))
    assert torch.allclose(left + right, u)
    found = geometric_long_conv((qs, q), (ks, k), terms=("cross", "scale"))
    for result, expected in zip(found, (u, axial), strict=True):
        assert torch.allclose(result, expected)


def test_a_static_kernel_is_shared_along_the_axes_that_it_lacks():
    """Values, and the kernel's gradient summed over them; with rows, lengths and bodies."""
    q, weight = torch.randn(2, 4, 3, 2, 10, dtype=torch.float64)
    kernel = torch.randn(2, 10, dtype=torch.float64)
    calls = [
        {},
        {"padding": "causal"},
        {"lengths": torch.tensor([10, 3, 0, 7])},
        {"lengths": torch.tensor([10, 3, 0, 7]), "padding": "causal"},
        {"bodies": [[4, 6], [2, 0, 5], [], [10]]},
    ]
    for options in calls:
        k = kernel.clone().requires_grad_()
        everywhere = kernel.expand(q.shape).clone().requires_grad_()
        if "bodies" in options:  # a body meets the kernel's first tokens
            expected = torch.zeros_like(q)
            for row, row_bodies in enumerate(options["bodies"]):
                start = 0
                for n in row_bodies:
                    here = slice(start, start + n)
                    expected[row, ..., here] = scalar_long_conv(
                        q[row, ..., here], everywhere[row, ..., :n]
                    )
                    start += n
        else:
            expected = scalar_long_conv(q, everywhere, **options)
        u = scalar_long_conv(q, k, **options)
        assert torch.allclose(u, expected, atol=1e-12)
        (u * weight).sum().backward()
        (expected * weight).sum().backward()
        assert k.grad is not None and everywhere.grad is not None
        assert torch.allclose(k.grad, everywhere.grad.sum((0, 1)), atol=1e-12)


@pytest.mark.parametrize("padding", ["circular", "causal"])
def test_results_can_be_changed_in_place(padding):
    """A residual is added so; whether results were transformed in place must not matter."""
    q, k = torch.randn(2, 1, 4, 3, 16, requires_grad=True)
    s, t = torch.randn(2, 1, 4, 16, requires_grad=True)
    found = []
    for change in (lambda u: u.mul_(2).add_(1), lambda u: 2 * u + 1):
        results = geometric_long_conv((s, q), (t, k), padding=padding)
        loss = torch.cat([change(u).square().flatten() for u in results]).sum()
        found.append(torch.autograd.grad(loss, (s, q, t, k)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)


def test_spectra_are_kept_only_for_a_backward_pass(monkeypatch):
    """Not in evaluation, although the parameters of a static kernel ask for gradients."""
    kept, run = [], Convolution.run

    def spy(self, given, old, wanted, keep):
        kept.append(keep)
        return run(self, given, old, wanted, keep)

    monkeypatch.setattr(Convolution, "run", spy)
    q, k = torch.randn(2, 3, 8), torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        scalar_long_conv(q, k)
    scalar_long_conv(q, k)
    assert kept == [False, True]


WRONG = {
    "scalar_long_conv(x.sum(), x.sum())": "ShapeError: scalars need shape (..., n), not ()",
    "scalar_long_conv(x, x, bodies=torch.tensor([[2, 3]]))": "ShapeError: bodies of row 0",
    "vector_long_conv(x, x[..., :4])": "ShapeError: q (1, 3, 5) and k (1, 3, 4)",
    "vector_long_conv(x[:, :2], x[:, :2])": "ShapeError: vectors need shape (..., 3, n)",
    "scalar_long_conv(x, x, padding='mirror')": "ConfigError: unknown padding 'mirror'",
    "scalar_long_conv(x, x, lengths=torch.tensor([5, 5]))": "ShapeError: lengths of 2 rows must",
    "scalar_long_conv(x, x, lengths=torch.tensor([6]))": "ShapeError: lengths of row 0 are [6]",
    "scalar_long_conv(x, x, SequenceShard(6))": "ShapeError: SequenceShard(6, rank 0 of 1, cyclic)",
    "scalar_long_conv(x, x, SequenceShard(5, layout='contiguous'))": "ConfigError: a long conv",
    "scalar_long_conv(x.long(), x.long())": "ShapeError: q torch.int64 and k torch.int64",
    "scalar_long_conv(x, x.double())": "ShapeError: q torch.float32 and k torch.float64",
    "scalar_long_conv(x, x, lengths=torch.tensor([3.5]))": "ShapeError: lengths (1,) torch.float32",
    "geometric_long_conv((x, x), (x, x))": "ShapeError: scalars (1, 3, 5) and vectors (1, 3, 5)",
    "geometric_long_conv((None, None), (x, None))": "ShapeError: an operand (None, None) holds",
    "geometric_long_conv((x, None), (x, None), terms=['dot'])": "ConfigError: the term 'dot' lacks",
    "geometric_long_conv((x, None), (x, None), terms=['norm'])": "ConfigError: unknown term 'norm'",
    "geometric_long_conv((x[:, 0], x), (x[:, 0], x), terms=['cross'])": "ConfigError: no term of",
    "scalar_long_conv(x, x[0, :2])": "ShapeError: q (1, 3, 5) and k (2, 5) must have one shape; a",
    "scalar_long_conv(x, x, bodies=[[3, 3]])": "ShapeError: bodies of row 0 are [3, 3]: use",
    "scalar_long_conv(x, x, bodies=[[3], [2]])": "ShapeError: bodies of 2 rows must be one",
    "scalar_long_conv(x, x, lengths=torch.tensor([3]), bodies=[[3]])": "ConfigError: give len",
    "scalar_long_conv(x, x, lengths=(3, 2))": "ShapeError: lengths of 2 rows must be one",
    "scalar_long_conv(x, x, lengths=[2.5])": "ShapeError: lengths of row 0 are [2.5]: use",
    "scalar_long_conv(x, x, lengths=torch.tensor([[3]]))": "ShapeError: lengths (1, 1) torch.",
    "scalar_long_conv(x, x, workspace_bytes=0)": "ConfigError: workspace_bytes=0",
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
