"""Factors that rest on multivectors' norms, with their own backward passes.

They keep their input alone, and work tile by tile as `product` does. A compiler gets the formula.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scaling.algebra.product import GRADES, SIZES, tiles

Multivector = Float[Tensor, "b d c n"]
Parameter = Float[Tensor, "4 c 1"]


def smooth_sqrt(squared: Tensor) -> Tensor:
    """sqrt that has a gradient at 0: (q² + 1e-16)^(1/4)."""
    return (squared.square() + 1e-16).sqrt().sqrt()


def gate(x: Multivector, a: Parameter, b: Parameter) -> Multivector:
    """Each grade times sigmoid(a q + b): q is the scalar itself, and others' squared norm."""
    return _scale(_GATE, x, a, b)


def normalize(x: Multivector, share: Parameter) -> Multivector:
    """Each grade over share · (its norm - 1) + 1."""
    return _scale(_UNIT, x, share)


def layer_norm(
    x: Multivector, a: Float[Tensor, "c 1"], components: int
) -> Float[Tensor, "b e c n"]:
    """a x over the mean of the norms of all channels; its first components."""
    if torch.compiler.is_compiling():
        mean = smooth_sqrt(x.square().sum(1, True)).mean(2, True) + 1e-6
        return a * x[:, :components] / mean
    return _LayerNorm.apply(x, a, components)


@dataclass(frozen=True)
class _Rule:
    """A factor f of a grade's invariant q and of parameters."""

    signed: bool
    """Whether a scalar is its own invariant; else it is its square, as of other grades."""
    factor: Callable[..., Tensor]
    """f(q, *parameters)."""
    slopes: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    """(q, f, slope, *parameters): derivatives by q and by the parameters, by token, given `slope`,
    that by f."""


def _sigmoid(q: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addcmul(b, a, q).sigmoid()


def _sigmoid_slopes(
    q: Tensor, f: Tensor, slope: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    by_b = slope * torch.addcmul(f, f, f, value=-1)
    return by_b * a, (by_b * q, by_b)


def _reciprocal(q: Tensor, share: Tensor) -> Tensor:
    return torch.addcmul(1 + 1e-6 - share, share, smooth_sqrt(q)).reciprocal()


def _reciprocal_slopes(
    q: Tensor, f: Tensor, slope: Tensor, share: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    norm = smooth_sqrt(q)
    by_divisor = slope * f * -f
    return by_divisor * _norm_slope(q, norm) * share, (by_divisor * (norm - 1),)


_GATE = _Rule(True, _sigmoid, _sigmoid_slopes)
_UNIT = _Rule(False, _reciprocal, _reciprocal_slopes)


def _norm_slope(q: Tensor, norm: Tensor) -> Tensor:
    """Derivative of smooth_sqrt(q)."""
    return q / (2 * norm * norm * norm)


def _scale(rule: _Rule, x: Tensor, *parameters: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return _Scaled.apply(rule, x, *parameters)
    parts = []
    for g, part in enumerate(_by_grade(x.unbind(1))):
        factor = rule.factor(_invariant(rule, g, part), *(p[g] for p in parameters))
        parts += [component * factor for component in part]
    return torch.stack(parts, 1)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: _Rule, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(x, *parameters)
        y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, parameters[0].dtype))
        for tile in tiles(x):
            given, results = (_by_grade(z[tile].to(y.dtype).unbind(1)) for z in (x, y))
            for g, part in enumerate(given):
                factor = rule.factor(
                    _invariant(rule, g, part), *(p[g, tile[2]] for p in parameters)
                )
                for component, result in zip(part, results[g], strict=True):
                    torch.mul(component, factor, out=result)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rule = ctx.rule
        x, *parameters = ctx.saved_tensors
        grad_x = torch.empty_like(grads[0])
        sums = [torch.zeros_like(p) for p in parameters]
        for tile in tiles(x):
            given, incoming, results = (
                _by_grade(z[tile].to(grad_x.dtype).unbind(1)) for z in (x, grads[0], grad_x)
            )
            for g, (part, grad, result) in enumerate(zip(given, incoming, results, strict=True)):
                local = [p[g, tile[2]] for p in parameters]
                q = _invariant(rule, g, part)
                factor = rule.factor(q, *local)
                by_q, by_parameters = rule.slopes(q, factor, dot(grad, part), *local)
                for total, each in zip(sums, by_parameters, strict=True):
                    total[g, tile[2]] += each.sum((0, 2)).unsqueeze(-1)
                if rule.signed and g == 0:
                    torch.addcmul(by_q, grad[0], factor, out=result[0])
                    continue
                by_q *= 2
                for m in range(len(part)):
                    torch.mul(part[m], by_q, out=result[m]).addcmul_(grad[m], factor)
        return None, grad_x.to(x.dtype), *sums


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, components: int) -> Tensor:
        ctx.save_for_backward(x, a)
        shape = x[:, :components].shape
        y = x.new_empty(shape, dtype=torch.promote_types(x.dtype, a.dtype))
        for tile in tiles(x, all_channels=True):
            given, results = x[tile].to(y.dtype).unbind(1), y[tile].unbind(1)
            factor = a / (smooth_sqrt(dot(given, given)).mean(1, True) + 1e-6)
            for component, result in zip(given, results, strict=False):
                torch.mul(component, factor, out=result)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        grad_x, grad_a = torch.empty_like(x, dtype=grads[0].dtype), torch.zeros_like(a)
        for tile in tiles(x, all_channels=True):
            given, grad = x[tile].to(grad_x.dtype).unbind(1), grads[0][tile].unbind(1)
            q = dot(given, given)
            norm = smooth_sqrt(q)
            mean = norm.mean(1, True) + 1e-6
            slope = dot(grad, given[: len(grad)]) / mean
            grad_a += slope.sum((0, 2)).unsqueeze(-1)
            by_norm = (slope * a).mean(1, True) / -mean
            by_q, factor = 2 * by_norm * _norm_slope(q, norm), a / mean
            for m, result in enumerate(grad_x[tile].unbind(1)):
                torch.mul(given[m], by_q, out=result)
                if m < len(grad):
                    result.addcmul_(grad[m], factor)
        return grad_x.to(x.dtype), grad_a, None


def _invariant(rule: _Rule, grade: int, part: Sequence[Tensor]) -> Tensor:
    return part[0] if rule.signed and grade == 0 else dot(part, part)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Sum of products of components."""
    total = a[0] * b[0]
    for left, right in zip(a[1:], b[1:], strict=True):
        total = total.addcmul_(left, right)
    return total


def _by_grade(components: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    ends = SIZES[: SIZES.index(len(components)) + 1]
    return [components[end - size : end] for end, size in zip(ends, GRADES, strict=False)]
