"""The weighted geometric product of Cl(3,0): 20 paths, 64 terms, with its own backward pass.

A path takes a grade of each operand to a grade of the result, by a number, dot or cross product.
With the result's cotangent r it is a trilinear form, the sum of sign · x_i y_j r_k over its terms,
and derivatives of the form are sums over the same terms.

Terms are added up on tiles that fit a CPU's cache. A compiler gets the formula, and fuses it.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

GRADES = (1, 3, 3, 1)
"""Components of each grade."""
SIZES = (1, 4, 7, 8)
"""Components of the first 1, 2, 3, 4 grades."""
PATHS = 20
"""Non-zero products (grade i, grade j) -> grade k."""
TILE = 1 << 15
"""Numbers of a component that a CPU works on at once."""

_PATHS = (  # left, right and result grade, sign
    *[(0, 0, 0, 1), (1, 1, 0, 1), (2, 2, 0, -1), (3, 3, 0, -1)],
    *[(0, 1, 1, 1), (1, 0, 1, 1), (3, 2, 1, -1), (2, 3, 1, -1), (1, 2, 1, -1), (2, 1, 1, -1)],
    *[(0, 2, 2, 1), (2, 0, 2, 1), (3, 1, 2, 1), (1, 3, 2, 1), (1, 1, 2, 1), (2, 2, 2, -1)],
    *[(0, 3, 3, 1), (3, 0, 3, 1), (1, 2, 3, 1), (2, 1, 3, 1)],
)
_Term = tuple[tuple[int, int, int], int]
"""Components of left, right and result; the sign but for the path's."""


def _terms(*grades: int) -> list[_Term]:
    sizes, starts = [GRADES[g] for g in grades], [sum(GRADES[:g]) for g in grades]
    if min(sizes) == 3:
        turns = [(m, (m + 1) % 3, (m + 2) % 3) for m in range(3)]
        found = [(turn, 1) for turn in turns] + [((i, k, j), -1) for i, j, k in turns]
    else:
        found = [([m % size for size in sizes], 1) for m in range(max(sizes))]
    return [((a + i, b + j, c + k), sign) for ((i, j, k), sign) in found for a, b, c in [starts]]


_Components = Sequence[Sequence[Tensor]]
"""Of left, right and result."""
_TERMS = [_terms(*grades) for *grades, _ in _PATHS]


def geometric_product(
    x: Float[Tensor, "b d c n"],
    y: Float[Tensor, "b e c n"],
    weights: Float[Tensor, "20 c"] | None = None,
    first: Float[Tensor, "b g c n"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "b f c n"]:
    """Product channel by channel of multivectors' first grades; `weights` scales the 20 paths.

    With weights 1: s = s1 s2 + v1·v2 - b1·b2 - p1 p2;  v = s1 v2 + s2 v1 - p1 b2 - p2 b1 - v1×b2
    - b1×v2;  b = s1 b2 + s2 b1 + p1 v2 + p2 v1 + v1×v2 - b1×b2;  p = s1 p2 + p1 s2 + v1·b2 + b1·v2.
    The result has the grades that can differ from 0: scalars and vectors give no trivector.

    first, scale: the result is scale · (first + product); no more grades than the product's.
    """
    if weights is None:
        weights = x.new_ones(PATHS, x.shape[2])
    if torch.compiler.is_compiling():
        return _formula(x, y, weights, first, scale)
    return _WeightedProduct.apply(x, y, weights, first, scale)


class _Path(NamedTuple):
    number: int
    terms: list[_Term]
    by_size: tuple[int, ...]
    """Left (0), right (1) and result (2), the one with fewest components first."""


def _between(left: int, right: int) -> list[_Path]:
    return [
        _Path(number, terms, tuple(sorted(range(3), key=lambda role: GRADES[grades[role]])))
        for number, (terms, grades) in enumerate(zip(_TERMS, _PATHS, strict=True))
        if all(i < left and j < right for (i, j, _), _ in terms)
    ]


_BETWEEN: dict[tuple[int, int], list[_Path]] = {
    sizes: _between(*sizes) for sizes in product(SIZES, SIZES)
}
"""Paths between operands of so many components."""


def _result_size(x: Tensor, y: Tensor) -> int:
    return SIZES[min(3, SIZES.index(x.shape[1]) + SIZES.index(y.shape[1]))]


def _formula(x: Tensor, y: Tensor, weights: Tensor, first: Tensor | None, scale: float) -> Tensor:
    """All terms in one expression."""
    a, b, weights = x.unbind(1), y.unbind(1), scale * weights.unsqueeze(-1)
    sums: list[Any] = [] if first is None else list((scale * first).unbind(1))
    sums += [0] * (_result_size(x, y) - len(sums))
    for path in _BETWEEN[x.shape[1], y.shape[1]]:
        for (i, j, k), sign in path.terms:
            sign *= _PATHS[path.number][-1]
            sums[k] = sums[k] + sign * (weights[path.number] * a[i] * b[j])
    return torch.stack(sums, 1)


class _WeightedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weights: Tensor, first: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, y, weights)
        ctx.given, ctx.scale = 0 if first is None else first.shape[1], scale
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), weights.dtype)
        result = x.new_empty(x.shape[0], _result_size(x, y), *x.shape[2:], dtype=dtype)
        signed = _signed(weights, scale).unsqueeze(-1)
        for tile in tiles(x):
            values, goal = [z[tile].to(dtype).unbind(1) for z in (x, y)], result[tile]
            if first is not None:
                torch.mul(first[tile], scale, out=goal[:, : ctx.given])
            goal[:, ctx.given :].zero_()
            components = goal.unbind(1)
            for path in _BETWEEN[x.shape[1], y.shape[1]]:
                small, other = (role for role in path.by_size if role < 2)
                weight = signed[path.number, tile[2]]
                weighted = _weighted(path, small, values[small], weight)
                for term, sign in path.terms:
                    components[term[2]].addcmul_(
                        weighted[term[small]], values[other][term[other]], value=sign
                    )
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weights = ctx.saved_tensors
        dtype = grads[0].dtype
        grad_x, grad_y = (torch.empty_like(z, dtype=dtype) for z in (x, y))
        grad_weights = torch.zeros_like(weights, dtype=dtype)
        signed = _signed(weights, ctx.scale).unsqueeze(-1)
        for tile in tiles(x):
            values = [z[tile].to(dtype).unbind(1) for z in (x, y, grads[0])]
            goals = [z[tile].zero_().unbind(1) for z in (grad_x, grad_y)]
            for path in _BETWEEN[x.shape[1], y.shape[1]]:
                weight, by_weight = (z[path.number, tile[2]] for z in (signed, grad_weights))
                _add_slopes(path, values, weight, goals, by_weight)
        grad_first = grads[0][:, : ctx.given] * ctx.scale if ctx.given else None
        return grad_x, grad_y, _signed(grad_weights, ctx.scale), grad_first, None


def _add_slopes(
    path: _Path, values: _Components, weight: Tensor, goals: _Components, by_weight: Tensor
) -> None:
    """Adds a path's derivatives by left and right to `goals`, and that by its weight.

    The derivative by the operand with fewest components also gives that by the weight.
    """
    small, u, v = path.by_size
    slopes: dict[int, Tensor] = {}
    for term, sign in path.terms:  # the first ones have sign +1
        a, b, i = values[u][term[u]], values[v][term[v]], term[small]
        if i in slopes:
            slopes[i].addcmul_(a, b, value=sign)
        else:
            slopes[i] = a * b
    for i, slope in slopes.items():
        by_weight.add_(torch.linalg.vecdot(values[small][i], slope).sum(0))
        if small < 2:
            goals[small][i].addcmul_(slope, weight)
    weighted = _weighted(path, small, values[small], weight)
    for role, other in ((u, v), (v, u)):
        for term, sign in path.terms if role < 2 else ():
            goal, right = goals[role][term[role]], values[other][term[other]]
            goal.addcmul_(weighted[term[small]], right, value=sign)


def _weighted(
    path: _Path, role: int, components: Sequence[Tensor], weight: Tensor
) -> dict[int, Tensor]:
    return {i: components[i] * weight for i in {term[role] for term, _ in path.terms}}


def _signed(weights: Tensor, scale: float) -> Tensor:
    return weights * (scale * _signs(weights.dtype, weights.device))


@lru_cache
def _signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of the paths; brought to a device once, since it waits for that."""
    return torch.tensor([[sign] for *_, sign in _PATHS], dtype=dtype, device=device)


def tiles(x: Tensor, all_channels: bool = False) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Rows, components, channels and tokens of (b, d, c, n) that a CPU works on at once."""
    b, _, c, n = x.shape
    most = TILE if x.device.type == "cpu" else b * c * n
    tokens = max(1, min(n, most // c if all_channels else most))
    channels = c if all_channels else max(1, min(c, most // tokens))
    rows = max(1, most // (tokens * channels))
    for i, j, k in product(range(0, b, rows), range(0, c, channels), range(0, n, tokens)):
        yield slice(i, i + rows), slice(None), slice(j, j + channels), slice(k, k + tokens)
