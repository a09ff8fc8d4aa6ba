"""The weighted geometric product of Cl(3,0): 20 paths, 64 terms, with its own backward pass.

Every path takes a grade of each operand to a grade of the result by a number, dot or cross product.
With the result's cotangent r it is one trilinear form T(a, b, r) = <a, b∘r> = <b, r∘a> = <r, a∘b>,
whose derivatives are products of the same kind.

On a CPU the work goes in tiles that fit its cache; a compiler fuses the whole instead.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

GRADES = (1, 3, 3, 1)
"""Components of each grade."""
SIZES = (1, 4, 7, 8)
"""Components of the first 1, 2, 3, 4 grades."""
PATHS = 20
"""Non-zero products (grade i, grade j) -> grade k."""
TILE = 1 << 14
"""Numbers of a component that a CPU works on at once."""

_PATHS = (  # left, right and result grade, sign
    *[(0, 0, 0, 1), (1, 1, 0, 1), (2, 2, 0, -1), (3, 3, 0, -1)],
    *[(0, 1, 1, 1), (1, 0, 1, 1), (3, 2, 1, -1), (2, 3, 1, -1), (1, 2, 1, -1), (2, 1, 1, -1)],
    *[(0, 2, 2, 1), (2, 0, 2, 1), (3, 1, 2, 1), (1, 3, 2, 1), (1, 1, 2, 1), (2, 2, 2, -1)],
    *[(0, 3, 3, 1), (3, 0, 3, 1), (1, 2, 3, 1), (2, 1, 3, 1)],
)

Grade = list[Tensor]
"""Components of one grade in a tile, each (b, c, n)."""
Sums = list[Tensor | None]
"""The same while it is summed up; None is 0."""
Tile = tuple[slice, slice, slice, slice]
"""Rows, all components, channels, tokens."""


def geometric_product(
    x: Float[Tensor, "b d c n"],
    y: Float[Tensor, "b e c n"],
    weights: Float[Tensor, "20 c"] | None = None,
) -> Float[Tensor, "b f c n"]:
    """Product channel by channel; `weights` scales each of the 20 paths.

    With weights 1: s = s1 s2 + v1·v2 - b1·b2 - p1 p2;  v = s1 v2 + s2 v1 - p1 b2 - p2 b1 - v1×b2
    - b1×v2;  b = s1 b2 + s2 b1 + p1 v2 + p2 v1 + v1×v2 - b1×b2;  p = s1 p2 + p1 s2 + v1·b2 + b1·v2.
    The result has the grades that can differ from 0: scalars and vectors give no trivector.
    """
    if weights is None:
        weights = x.new_ones(PATHS, x.shape[2])
    return _WeightedProduct.apply(x, y, weights)


class _WeightedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, weights)
        paths = _paths(x, y, weights)
        size = SIZES[max(k for _, (_, _, k), _, _ in paths)]
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), weights.dtype)
        result = x.new_empty(x.shape[0], size, *x.shape[2:], dtype=dtype)
        for tile in tiles(x):
            a, b, sums = grades(x, tile), grades(y, tile), no_sums(size)
            for _, (i, j, k), _, weight in paths:
                _add_product(sums[k], a[i], b[j], weight[tile[2]])
            result = put(result, tile, sums)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, weights = ctx.saved_tensors
        paths = _paths(x, y, weights)
        grad_x, grad_y = torch.empty_like(x), torch.empty_like(y)
        grad_weights = torch.zeros_like(weights)
        for tile in tiles(x):
            a, b, r = grades(x, tile), grades(y, tile), grades(grads[0], tile)
            to_a, to_b = no_sums(x.shape[1]), no_sums(y.shape[1])
            forms = [weights.new_zeros(a[0][0].shape[:2])] * PATHS
            for path, (i, j, k), sign, weight in paths:
                parts = [(a[i], to_a[i]), (b[j], to_b[j]), (r[k], None)]
                forms[path] = _add_gradients(parts, weight[tile[2]]).sum(-1) * sign
            grad_x, grad_y = put(grad_x, tile, to_a), put(grad_y, tile, to_b)
            grad_weights[:, tile[2]] += torch.stack(forms).sum(1)
        return grad_x, grad_y, grad_weights


def _paths(
    x: Tensor, y: Tensor, weights: Tensor
) -> list[tuple[int, tuple[int, int, int], int, Tensor]]:
    """Number, grades, sign and signed weight (c, 1) of the paths whose operands exist."""
    left, right = SIZES.index(x.shape[1]), SIZES.index(y.shape[1])
    return [
        (path, (i, j, k), sign, sign * weights[path].unsqueeze(-1))
        for path, (i, j, k, sign) in enumerate(_PATHS)
        if i <= left and j <= right
    ]


def _add_gradients(form: list[tuple[Grade, Sums | None]], weight: Tensor) -> Tensor:
    """Adds the derivatives of weight · T(a, b, r) to the sums beside a, b and r; returns T."""
    while len(form[0][0]) > min(len(grade) for grade, _ in form):  # a number first, if any
        form = [*form[1:], form[0]]
    (a, to_a), (b, to_b), (r, to_r) = form
    by_a = multiply(b, r, len(a))
    if to_a is not None:
        for m, part in enumerate(by_a):
            add(to_a, m, part, weight)
    if to_b is not None:
        _add_product(to_b, r, a, weight)
    if to_r is not None:
        _add_product(to_r, a, b, weight)
    return dot(a, by_a)


def _add_product(sums: Sums, a: Grade, b: Grade, weight: Tensor) -> None:
    """sums += weight · (a∘b)."""
    if len(a) != len(b):  # the number takes the weight
        number, parts = (a[0], b) if len(a) == 1 else (b[0], a)
        weight = number * weight
    else:
        parts = multiply(a, b, len(sums))
    for m, part in enumerate(parts):
        add(sums, m, part, weight)


def multiply(a: Grade, b: Grade, components: int) -> Grade:
    """The number, dot or cross product of two grades of equal size."""
    if components == 1:
        return [dot(a, b)]
    return [torch.addcmul(a[i] * b[j], a[j], b[i], value=-1) for i, j in ((1, 2), (2, 0), (0, 1))]


def dot(a: Grade, b: Grade) -> Tensor:
    sums: Sums = [None]
    for left, right in zip(a, b, strict=True):
        add(sums, 0, left, right)
    assert sums[0] is not None
    return sums[0]


def add(sums: Sums, m: int, a: Tensor, b: Tensor) -> None:
    """sums[m] += a · b."""
    total = sums[m]
    sums[m] = a * b if total is None else total.addcmul_(a, b)


def tiles(x: Tensor) -> Iterator[Tile]:
    """Parts of (b, d, c, n) that a CPU works on at once; the whole for others and compilers."""
    b, _, c, n = x.shape
    most = b * c * n
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        most = TILE
    tokens = max(1, min(n, most))
    channels = max(1, min(c, most // tokens))
    rows = max(1, most // (tokens * channels))
    starts = (range(0, size, step) for size, step in ((b, rows), (c, channels), (n, tokens)))
    for i, j, k in product(*starts):
        yield slice(i, i + rows), slice(None), slice(j, j + channels), slice(k, k + tokens)


def grades(x: Tensor, tile: Tile) -> list[Grade]:
    return by_grade(x[tile].unbind(1))


def no_sums(components: int) -> list[Sums]:
    return by_grade([None] * components)


def by_grade(components: Sequence[Any]) -> list[list[Any]]:
    ends = SIZES[: SIZES.index(len(components)) + 1]
    return [list(components[i:j]) for i, j in zip((0, *ends), ends, strict=False)]


def put(x: Tensor, tile: Tile, sums: list[Sums]) -> Tensor:
    """x with a tile filled in."""
    parts = [part for grade in sums for part in grade if part is not None]
    if torch.compiler.is_compiling():
        return torch.stack(parts, 1).to(x.dtype)
    for component, part in zip(x[tile].unbind(1), parts, strict=True):
        component.copy_(part)
    return x
