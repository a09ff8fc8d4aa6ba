"""Layers on multivectors of the geometric algebra Cl(3,0), in closed form.

A multivector is 8 numbers, kept as (scalar, vector, bivector, trivector) with the bivector written
as its dual axial vector (e23, -e13, e12). Tensors are (b, 8, c, n): rows, components, channels,
tokens. Layers act on each token alone; rotations and reflections act on the components, and every
layer commutes with them. Definitions: Clifford Group Equivariant Neural Networks (Ruhe et al.,
arXiv 2305.11141) and its published layers, with a bias on scalars alone.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scaling.algebra.spectra import cross

GRADES = (1, 3, 3, 1)
"""Components of each grade."""
PATHS = 20
"""Non-zero products (grade i, grade j) -> grade k."""

Multivector = Float[Tensor, "b 8 c n"]


def embed(scalars: Float[Tensor, "b c n"], vectors: Float[Tensor, "b c 3 n"]) -> Multivector:
    """Scalars as grade 0 and vectors as grade 1 of the same channels; the other grades are 0."""
    vectors = vectors.transpose(1, 2)
    zeros = vectors.new_zeros(scalars.shape[0], 4, *scalars.shape[1:])
    return torch.cat([scalars.unsqueeze(1), vectors, zeros], 1)


def grade_0(x: Multivector) -> Float[Tensor, "b c n"]:
    return x[:, 0]


def grade_1(x: Multivector) -> Float[Tensor, "b c 3 n"]:
    return x[:, 1:4].transpose(1, 2)


def by_component(values: Tensor) -> Tensor:
    """One number a grade -> one a component, along the first axis: (4, ...) -> (8, ...)."""
    return values.repeat_interleave(torch.tensor(GRADES, device=values.device), 0, output_size=8)


def squared_norms(x: Multivector) -> Float[Tensor, "b 4 c n"]:
    """Sum of squares of each grade."""
    return torch.cat([part.sum(1, True) for part in x.square().split(GRADES, 1)], 1)


def smooth_sqrt(squared: Tensor) -> Tensor:
    """sqrt that has a gradient at 0: (q² + 1e-16)^(1/4)."""
    return (squared.square() + 1e-16).sqrt().sqrt()


def geometric_product(
    x: Multivector, y: Multivector, weights: Float[Tensor, "20 c"] | None = None
) -> Multivector:
    """Product channel by channel; `weights` scales each of the 20 paths.

    With weights 1: s = s1 s2 + v1·v2 - b1·b2 - p1 p2;  v = s1 v2 + s2 v1 - p1 b2 - p2 b1 - v1×b2
    - b1×v2;  b = s1 b2 + s2 b1 + p1 v2 + p2 v1 + v1×v2 - b1×b2;  p = s1 p2 + p1 s2 + v1·b2 + b1·v2.
    """
    if weights is None:
        weights = x.new_ones(PATHS, x.shape[2])
    return _WeightedProduct.apply(x, y, weights)


_S, _V, _B, _P = slice(0, 1), slice(1, 4), slice(4, 7), slice(7, 8)
_PATHS = (  # left, right and result grade, sign; scalars and trivectors multiply anything
    *[(_S, _S, _S, 1), (_V, _V, _S, 1), (_B, _B, _S, -1), (_P, _P, _S, -1)],
    *[(_S, _V, _V, 1), (_V, _S, _V, 1), (_P, _B, _V, -1), (_B, _P, _V, -1)],
    *[(_V, _B, _V, -1), (_B, _V, _V, -1)],
    *[(_S, _B, _B, 1), (_B, _S, _B, 1), (_P, _V, _B, 1), (_V, _P, _B, 1)],
    *[(_V, _V, _B, 1), (_B, _B, _B, -1)],
    *[(_S, _P, _P, 1), (_P, _S, _P, 1), (_V, _B, _P, 1), (_B, _V, _P, 1)],
)


def _multiply(a: Tensor, b: Tensor, components: int) -> Tensor:
    """The product of two grades (b, 1 or 3, c, n) that has the given number of components."""
    if a.shape[1] == b.shape[1] == 3:
        return cross(a, b, dim=1) if components == 3 else (a * b).sum(1, True)
    return a * b


class _WeightedProduct(torch.autograd.Function):
    """The 20 paths one by one, accumulated in place, forward and backward.

    Every path is a number, dot or cross product, and so are its adjoints, up to order:
    <g, a·b>, <g, a b> and <g, a×b> give b×g for a cross product and the product of g and b else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, weights)
        result = torch.zeros_like(x)
        for (i, j, k, sign), weight in zip(_PATHS, weights.unsqueeze(-1), strict=True):
            part = result[:, k]
            part.addcmul_(_multiply(x[:, i], y[:, j], part.shape[1]), weight, value=sign)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, weights = ctx.saved_tensors
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
        grad_weights = []
        for (i, j, k, sign), weight in zip(_PATHS, weights.unsqueeze(-1), strict=True):
            a, b, g = x[:, i], y[:, j], grads[0][:, k]
            by_left = _multiply(b, g, a.shape[1])
            grad_x[:, i].addcmul_(by_left, weight, value=sign)
            grad_y[:, j].addcmul_(_multiply(g, a, b.shape[1]), weight, value=sign)
            grad_weights.append((a * by_left).sum((0, 1, 3)) * sign)
        return grad_x, grad_y, torch.stack(grad_weights)


class MVLinear(nn.Module):
    """Mixes channels, one matrix a grade: y_n = sum_m W[grade, n, m] x_m; bias on scalars."""

    def __init__(self, channels_in: int, channels_out: int, bias: bool = True) -> None:
        super().__init__()
        std = 1 / math.sqrt(max(channels_in, 1))
        self.weight = nn.Parameter(torch.randn(4, channels_out, channels_in) * std)
        self.bias = nn.Parameter(torch.zeros(1, channels_out, 1)) if bias else None

    def forward(self, x: Float[Tensor, "b 8 i n"]) -> Float[Tensor, "b 8 o n"]:
        y = by_component(self.weight) @ x
        return y if self.bias is None else y + nn.functional.pad(self.bias, (0, 0, 0, 0, 0, 7))


class MVSiLU(nn.Module):
    """Gates each grade by its invariant: x · sigmoid(a·invariant + b)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(4, channels, 1))
        self.b = nn.Parameter(torch.zeros(4, channels, 1))

    def forward(self, x: Multivector) -> Multivector:
        invariant = torch.cat([x[:, :1], *squared_norms(x).split(1, 1)[1:]], 1)
        return x * by_component_of(torch.sigmoid(self.a * invariant + self.b))


class Normalization(nn.Module):
    """Divides each grade by its norm, as far as the learned sigmoid(a) says; a = 0 at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4, channels, 1))

    def forward(self, x: Multivector) -> Multivector:
        norm = smooth_sqrt(squared_norms(x))
        return x / by_component_of(torch.sigmoid(self.a) * (norm - 1) + (1 + 1e-6))


class GeometricProduct(nn.Module):
    """(linear(x) + weighted product of x with a normalised linear map of x) / sqrt(2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left = MVLinear(channels, channels)
        self.right = MVLinear(channels, channels, bias=False)
        self.normalization = Normalization(channels)
        self.weights = nn.Parameter(torch.randn(PATHS, channels) / 2)

    def forward(self, x: Multivector) -> Multivector:
        right = self.normalization(self.right(x))
        return (self.left(x) + geometric_product(x, right, self.weights)) / math.sqrt(2)


class MVLayerNorm(nn.Module):
    """Divides by the mean over channels of the multivectors' norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Multivector) -> Multivector:
        norms = smooth_sqrt(x.square().sum(1, True))
        return self.a * x / (norms.mean(2, True) + 1e-6)


class CliffordMLP(nn.Sequential):
    """CEMLP: `layers` times [linear, gate, geometric product, norm], hidden width in between.

    final: a last linear map. Without it the output's norm is 1 whatever the input's scale, so that
    magnitudes cannot be regressed.
    """

    def __init__(
        self, channels_in: int, hidden: int, channels_out: int, layers: int = 2, final: bool = True
    ) -> None:
        widths = [channels_in, *[hidden] * (layers if final else layers - 1)]
        widths += [] if final else [channels_out]
        modules: list[nn.Module] = []
        for i, o in pairwise(widths):
            modules += [MVLinear(i, o), MVSiLU(o), GeometricProduct(o), MVLayerNorm(o)]
        super().__init__(*modules, *([MVLinear(hidden, channels_out)] if final else []))


def by_component_of(values: Float[Tensor, "b 4 c n"]) -> Multivector:
    """One number a grade -> one a component, along the component axis."""
    scalar, vector, bivector, trivector = values.split(1, 1)
    b, _, c, n = values.shape
    return torch.cat([scalar, vector.expand(b, 3, c, n), bivector.expand(b, 3, c, n), trivector], 1)
