"""The weighted geometric product of Cl(3,0): 20 paths, 64 terms, with its own backward pass.

A path takes a grade of each operand to a grade of the result, by a number, dot or cross product.
With the result's cotangent r it is a trilinear form, the sum of sign · x_i y_j r_k over its terms,
and derivatives of the form are sums over the same terms.

Dispatching 64 terms costs as much as computing them: the steps are listed once, and run on tiles
that fit a CPU's cache. A compiler gets the formula instead, and fuses it.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
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


def _paths(left: int, right: int) -> list[tuple[int, list[_Term]]]:
    """Number and terms of the paths between operands of so many components."""
    return [
        (path, terms)
        for path, terms in enumerate(_TERMS)
        if all(i < left and j < right for (i, j, _), _ in terms)
    ]


def _result_size(x: Tensor, y: Tensor) -> int:
    return SIZES[min(3, SIZES.index(x.shape[1]) + SIZES.index(y.shape[1]))]


def _formula(x: Tensor, y: Tensor, weights: Tensor, first: Tensor | None, scale: float) -> Tensor:
    """All terms in one expression."""
    a, b, signed = x.unbind(1), y.unbind(1), _signed(weights, scale).unsqueeze(-1)
    sums: list[Any] = [] if first is None else list((scale * first).unbind(1))
    sums += [0] * (_result_size(x, y) - len(sums))
    for path, terms in _paths(x.shape[1], y.shape[1]):
        for (i, j, k), sign in terms:
            sums[k] = sums[k] + sign * (signed[path] * a[i] * b[j])
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
        steps = _forward_steps(x.shape[1], y.shape[1], ctx.given)
        signed = _signed(weights, scale)
        for tile in tiles(x):
            if first is not None:
                torch.mul(first[tile], scale, out=result[tile][:, : ctx.given])
            operands = [z[tile].to(dtype).unbind(1) for z in (x, y, result)]
            weight = signed[:, tile[2]].unsqueeze(-1).unbind(0)
            scratch = result.new_empty(3, *operands[0][0].shape).unbind(0)
            _run(steps, [*operands, weight, scratch])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weights = ctx.saved_tensors
        dtype = grads[0].dtype
        grad_x, grad_y = (torch.empty_like(z, dtype=dtype) for z in (x, y))
        grad_weights = torch.zeros_like(weights, dtype=dtype)
        steps = _backward_steps(x.shape[1], y.shape[1])
        signed = _signed(weights, ctx.scale)
        for tile in tiles(x):
            operands = [z[tile].to(dtype).unbind(1) for z in (x, y, grads[0])]
            results = [z[tile].unbind(1) for z in (grad_x, grad_y)]
            sums = grad_weights[:, tile[2]].unbind(0)
            weight = signed[:, tile[2]].unsqueeze(-1).unbind(0)
            scratch = grad_x.new_empty(3, *operands[0][0].shape).unbind(0)
            _run(steps, [*operands, weight, scratch, *results, sums])
        grad_first = grads[0][:, : ctx.given] * ctx.scale if ctx.given else None
        return grad_x, grad_y, _signed(grad_weights, ctx.scale), grad_first, None


_X, _Y, _R, _WEIGHT, _SCRATCH, _TO_X, _TO_Y, _TO_WEIGHT = range(8)
"""Where a step finds a number a token, as (one of these, which of them)."""
_At = tuple[int, int]
_Step = tuple[_At, _At, _At, int]
"""goal, left, right, sign of a term that is added; 0 where it is the first and sets the goal."""


def _run(steps: Sequence[_Step], places: Sequence[Sequence[Tensor]]) -> None:
    for (goal, k), (left, i), (right, j), sign in steps:
        a, b, result = places[left][i], places[right][j], places[goal][k]
        if goal == _TO_WEIGHT:
            result.add_(torch.linalg.vecdot(a, b).sum(0))
        elif sign == 0:
            torch.mul(a, b, out=result)
        elif sign == 1:
            result.addcmul_(a, b)
        else:
            result.addcmul_(a, b, value=-1)


class _Steps:
    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.begun: set[_At] = set()

    def set(self, goal: _At, left: _At, right: _At) -> None:
        self.steps.append((goal, left, right, 0))
        self.begun.add(goal)

    def add(self, goal: _At, left: _At, right: _At, sign: int = 1) -> None:
        assert sign == 1 or goal in self.begun
        self.steps.append((goal, left, right, sign if goal in self.begun else 0))
        self.begun.add(goal)


@lru_cache
def _forward_steps(left: int, right: int, given: int) -> list[_Step]:
    """For every path: the smaller operand times the weight, times the other.

    given: components of the result that are to be added to.
    """
    steps = _Steps()
    steps.begun |= {(_R, k) for k in range(given)}
    for path, terms in _paths(left, right):
        components = _components(terms)
        small, other = sorted((_X, _Y), key=lambda role: len(components[role]))
        for m, i in enumerate(components[small]):
            steps.set((_SCRATCH, m), (small, i), (_WEIGHT, path))
        for term, sign in terms:
            scaled = (_SCRATCH, term[small] - components[small][0])
            steps.add((_R, term[_R]), scaled, (other, term[other]), sign)
    return steps.steps


@lru_cache
def _backward_steps(left: int, right: int) -> list[_Step]:
    """For every path: the derivative by the smallest of x, y, r, which also gives that by the
    weight; then the smallest times the weight gives the other derivatives."""
    steps = _Steps()
    goals = {_X: _TO_X, _Y: _TO_Y}
    for path, terms in _paths(left, right):
        components = _components(terms)
        small, *others = sorted((_X, _Y, _R), key=lambda role: len(components[role]))
        scratch = {i: (_SCRATCH, m) for m, i in enumerate(components[small])}
        steps.begun -= set(scratch.values())
        for term, sign in terms:
            a, b = ((role, term[role]) for role in others)
            steps.add(scratch[term[small]], a, b, sign)
        for i, derivative in scratch.items():
            steps.set((_TO_WEIGHT, path), (small, i), derivative)
            if small in goals:
                steps.add((goals[small], i), derivative, (_WEIGHT, path))
        for i, scaled in scratch.items():
            steps.set(scaled, (small, i), (_WEIGHT, path))
        for role, other in (others, reversed(others)):
            for term, sign in terms if role in goals else ():
                goal = (goals[role], term[role])
                steps.add(goal, scratch[term[small]], (other, term[other]), sign)
    return steps.steps


def _components(terms: list[_Term]) -> list[list[int]]:
    """Those of x, y and r that take part."""
    return [sorted({term[role] for term, _ in terms}) for role in (_X, _Y, _R)]


def _signed(weights: Tensor, scale: float) -> Tensor:
    return weights * weights.new_tensor([sign * scale for *_, sign in _PATHS]).unsqueeze(-1)


def tiles(x: Tensor, all_channels: bool = False) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Rows, components, channels and tokens of (b, d, c, n) that a CPU works on at once."""
    b, _, c, n = x.shape
    most = TILE if x.device.type == "cpu" else b * c * n
    tokens = max(1, min(n, most // c if all_channels else most))
    channels = c if all_channels else max(1, min(c, most // tokens))
    rows = max(1, most // (tokens * channels))
    for i, j, k in product(range(0, b, rows), range(0, c, channels), range(0, n, tokens)):
        yield slice(i, i + rows), slice(None), slice(j, j + channels), slice(k, k + tokens)
