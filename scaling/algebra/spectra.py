"""What a long convolution does at every frequency: bilinear maps, their adjoints, and folding.

Operands and results are spectra (..., c, f): c components, f frequencies. The adjoints are those of
the real convolutions: correlation is the conjugate spectrum (<g, q*k> = <g ⋆ k, q>).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bilinear:
    """A product of spectra: `forward(q, k) -> u`, `adjoint(g, q, k) -> (dq, dk)`."""

    name: str
    forward: Callable[[Tensor, Tensor], Tensor]
    adjoint: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cross(a: Tensor, b: Tensor, dim: int = -2) -> Tensor:
    """Cross product along `dim`; measured faster than torch.linalg.cross."""
    (a0, a1, a2), (b0, b1, b2) = a.unbind(dim), b.unbind(dim)
    components = [
        torch.addcmul(a1 * b2, a2, b1, value=-1),
        torch.addcmul(a2 * b0, a0, b2, value=-1),
        torch.addcmul(a0 * b1, a1, b0, value=-1),
    ]
    return torch.stack(components, dim)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the components, kept as an axis of size 1; nothing is conjugated."""
    return (a * b).sum(-2, keepdim=True)


def _scalar_adjoint(g: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return g * k.conj(), g * q.conj()


def _cross_adjoint(g: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return cross(k.conj(), g), cross(g, q.conj())


def _geometric(q: Tensor, k: Tensor) -> Tensor:
    """(scalar, vector) with itself -> polar scalar, polar vector, axial vector: 4, 4 -> 7."""
    (qs, qv), (ks, kv) = q.split([1, 3], -2), k.split([1, 3], -2)
    return torch.cat([qs * ks + dot(qv, kv), qs * kv + ks * qv, cross(qv, kv)], -2)


def _geometric_adjoint(g: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    (qs, qv), (ks, kv) = q.conj().split([1, 3], -2), k.conj().split([1, 3], -2)
    ga, gu, gx = g.split([1, 3, 3], -2)
    dq = [ga * ks + dot(gu, kv), ga * kv + ks * gu + cross(kv, gx)]
    dk = [ga * qs + dot(gu, qv), ga * qv + qs * gu + cross(gx, qv)]
    return torch.cat(dq, -2), torch.cat(dk, -2)


SCALAR = Bilinear("scalar", torch.mul, _scalar_adjoint)
CROSS = Bilinear("cross", cross, _cross_adjoint)
GEOMETRIC = Bilinear("geometric", _geometric, _geometric_adjoint)


def transform_length(length: int, ranks: int, wraps: list[int] | None) -> tuple[int, bool]:
    """Length of the transform, a multiple of `ranks`, and whether its result has to be folded.

    A circular convolution whose rows all have the full length, when that is `ranks` times a fast
    length, is the plain circular transform. Everything else is zero-padded until nothing wraps and
    folded at each row's own length where it has to be circular: 2N - 1 tokens, one more for the
    fold, which reads up to token 2N - 1.
    """
    if wraps is not None and set(wraps) == {length} and length % ranks == 0:
        local = length // ranks
        if fast_length(local) == local:
            return length, False
    fold = wraps is not None
    return ranks * fast_length(-(-(2 * length - 1 + fold) // ranks)), fold


def fold_factor(bins: Tensor, wraps: list[int], transform: int, dtype: torch.dtype) -> Tensor:
    """1 + exp(2πi f w / T): adds lin[i + w] to lin[i], which makes a linear convolution circular.

    bins: (...,) frequencies f of a transform of T tokens -> (rows, ...), one row a wrap length w.
    """
    shifts = torch.tensor(wraps, device=bins.device).reshape(-1, *[1] * bins.ndim)
    turns = (bins * shifts % transform).double() / transform  # integers first: no digits lost
    return (1 + torch.polar(torch.ones_like(turns), 2 * torch.pi * turns)).to(dtype)


@lru_cache
def fast_length(n: int) -> int:
    """Smallest length >= n whose prime factors are 2, 3, 5 and 7."""
    while not _is_smooth(n):
        n += 1
    return n


def _is_smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1
