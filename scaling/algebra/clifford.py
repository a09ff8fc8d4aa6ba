"""Layers on multivectors of the geometric algebra Cl(3,0), in closed form.

A multivector is up to 8 numbers, kept as (scalar, vector, bivector, trivector) with the bivector
written as its dual axial vector (e23, -e13, e12). Tensors are (b, d, c, n): rows, components,
channels, tokens. They hold the first grades alone, d = 1, 4, 7 or 8 components; the others are 0,
and no layer spends time on them. Layers act on each token alone; rotations and reflections act on
the components, and every layer commutes with them. Definitions: Clifford Group Equivariant Neural
Networks (Ruhe et al., arXiv 2305.11141) and its published layers, with a bias on scalars alone.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scaling.algebra.norms import gate, layer_norm, normalize
from scaling.algebra.product import PATHS, SIZES, geometric_product
from scaling.work import work_counter

_GRADE = (0, 1, 1, 1, 2, 2, 2, 3)
"""Of each component."""

Multivector = Float[Tensor, "b d c n"]


def embed(
    scalars: Float[Tensor, "b c n"], vectors: Float[Tensor, "b c 3 n"]
) -> Float[Tensor, "b 4 c n"]:
    """Scalars as grade 0 and vectors as grade 1 of the same channels."""
    return torch.cat([scalars.unsqueeze(1), vectors.transpose(1, 2)], 1)


def grade_0(x: Multivector) -> Float[Tensor, "b c n"]:
    return x[:, 0]


def grade_1(x: Multivector) -> Float[Tensor, "b c 3 n"]:
    return x[:, 1:4].transpose(1, 2)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in; None where it is off, as on devices that do not know it."""
    known = device_type in ("cpu", "cuda")
    on = known and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


class MVLinear(nn.Module):
    """Mixes channels, one matrix a grade: y_n = sum_m W[grade, n, m] x_m; bias on scalars.

    grades: how many the output has at most.
    """

    def __init__(
        self, channels_in: int, channels_out: int, bias: bool = True, grades: int = 4
    ) -> None:
        super().__init__()
        self.components = SIZES[grades - 1]
        std = 1 / math.sqrt(max(channels_in, 1))
        self.weight = nn.Parameter(torch.randn(4, channels_out, channels_in) * std)
        self.bias = nn.Parameter(torch.zeros(1, channels_out, 1)) if bias else None

    def forward(self, x: Float[Tensor, "b d i n"]) -> Float[Tensor, "b e o n"]:
        weight, bias = self.weight, self.bias
        if dtype := autocast_dtype(x.device.type):
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if not torch.compiler.is_compiling():
            return _Linear.apply(x, weight, bias, self.components)
        y = weight[list(_GRADE[: min(x.shape[1], self.components)])] @ x[:, : self.components]
        return y if bias is None else y + nn.functional.pad(bias, (0, 0, 0, 0, 0, y.shape[1] - 1))


class _Linear(torch.autograd.Function):
    """One matrix product a component, each into its place; the bias is added where it is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, components: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = x.new_empty(x.shape[0], min(x.shape[1], components), weight.shape[1], x.shape[3])
        matrices = weight.unsqueeze(1).expand(-1, x.shape[0], -1, -1)
        for part, result, g in zip(x.unbind(1), y.unbind(1), _GRADE, strict=False):
            torch.bmm(matrices[g], part, out=result)
        if bias is not None:
            y[:, 0] += bias
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        matrices = weight.mT.unsqueeze(1).expand(-1, x.shape[0], -1, -1)
        given = grads[0].shape[1]
        grad_x[:, given:] = 0
        for m, grad in enumerate(grads[0].unbind(1)):
            torch.bmm(matrices[_GRADE[m]], grad, out=grad_x[:, m])
            grad_weight[_GRADE[m]] += torch.bmm(grad, x[:, m].mT).sum(0)
        grad_bias = grads[0][:, 0].sum((0, 2)).view(1, -1, 1) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None


class MVSiLU(nn.Module):
    """Gates each grade by its invariant: x · sigmoid(a·invariant + b)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(4, channels, 1))
        self.b = nn.Parameter(torch.zeros(4, channels, 1))

    def forward(self, x: Multivector) -> Multivector:
        return gate(x, self.a, self.b)


class Normalization(nn.Module):
    """Divides each grade by its norm, as far as the learned sigmoid(a) says; a = 0 at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4, channels, 1))

    def forward(self, x: Multivector) -> Multivector:
        return normalize(x, torch.sigmoid(self.a))


class GeometricProduct(nn.Module):
    """(linear(x) + weighted product of x with a normalised linear map of x) / sqrt(2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left = MVLinear(channels, channels)
        self.right = MVLinear(channels, channels, bias=False)
        self.normalization = Normalization(channels)
        self.weights = nn.Parameter(torch.randn(PATHS, channels) / 2)

    def forward(self, x: Multivector) -> Float[Tensor, "b e c n"]:
        right = self.normalization(self.right(x))
        if counter := work_counter():
            terms = x.shape[1] ** 2 * self.weights.shape[1] * x.shape[0] * x.shape[-1]
            counter.add(product_flops=3 * 2.0 * terms)
        return geometric_product(x, right, self.weights, self.left(x), 1 / math.sqrt(2))


class MVLayerNorm(nn.Module):
    """Divides by the mean over channels of the multivectors' norms.

    grades: how many the output has at most.
    """

    def __init__(self, channels: int, grades: int = 4) -> None:
        super().__init__()
        self.components = SIZES[grades - 1]
        self.a = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Multivector) -> Float[Tensor, "b e c n"]:
        return layer_norm(x, self.a, self.components)


class CliffordMLP(nn.Sequential):
    """CEMLP: `layers` times [linear, gate, geometric product, norm], hidden width in between.

    final: a last linear map. Without it the output's norm is 1 whatever the input's scale, so that
    magnitudes cannot be regressed.
    grades: how many the output has; only what they need is computed.
    """

    def __init__(
        self,
        channels_in: int,
        hidden: int,
        channels_out: int,
        layers: int = 2,
        final: bool = True,
        grades: int = 4,
    ) -> None:
        widths = [channels_in, *[hidden] * (layers if final else layers - 1)]
        widths += [] if final else [channels_out]
        modules: list[nn.Module] = []
        for i, o in pairwise(widths):
            modules += [MVLinear(i, o), MVSiLU(o), GeometricProduct(o), MVLayerNorm(o)]
        if final:
            modules.append(MVLinear(hidden, channels_out, grades=grades))
        else:
            modules[-1] = MVLayerNorm(channels_out, grades)
        super().__init__(*modules)
