"""What a long convolution does at every frequency: products, phases, and transform lengths.

With v the conjugate of u's cotangent, a convolution u of q and k is one trilinear form in spectra,
T = sum over frequencies of sign · q_i k_j v_o. The product is its derivative by v; the gradients of
q and k are the conjugates of its derivatives by q and k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log2

import torch
from jaxtyping import Complex
from torch import Tensor

from scaling.work import WorkCounter

Role = str
ROLES: tuple[Role, ...] = ("q", "k", "u")
PRODUCTS = ("scalar", "dot", "scale", "cross")
Part = tuple[Role, int]
"""One of the tensors that a role consists of, by its number."""


@dataclass(frozen=True)
class TrilinearForm:
    """u_o = sum of sign · q_i k_j over the terms (i, j, o, sign).

    sizes: components of each tensor that a role consists of.
    """

    sizes: dict[Role, tuple[int, ...]]
    terms: tuple[tuple[int, int, int, int], ...]

    def components(self, role: Role) -> int:
        return sum(self.sizes[role])

    def parts(self, *roles: Role) -> list[Part]:
        return [(role, number) for role in roles for number in range(len(self.sizes[role]))]

    def count_work(
        self,
        counter: WorkCounter,
        copies: dict[Role, int],
        length: int,
        circular: bool,
        itemsize: int,
    ) -> None:
        """Of full rows.

        Args:
            copies: rows times channels of each role.
            itemsize: bytes of a number of a token.
        """
        n, _ = transform_length(length, counter.ranks, [length] if circular else None)
        streams = {role: self.components(role) * copies[role] for role in ROLES}
        both, products = sum(streams.values()), len(self.terms) * copies["u"]
        complex_flops = sum(8 * products - 2 * streams[role] for role in ROLES)
        # Transforms read and write every stream, twice; products read and write it: forward q, k
        # and u; backward u's gradient, q and k, and the gradients of these.
        moved = 4 * both + both + both + streams["q"] + streams["k"]
        # Of a rank's n / ranks numbers of a stream all bins travel but for its own share.
        travelling = 2 * itemsize * (counter.ranks - 1) * (n // counter.ranks // 2 + 1)
        counter.add(
            transform_flops=2 * both * 2.5 * log2(n) * n,
            frequency_flops=complex_flops / 2 * n,
            transforms_bytes=itemsize * n * moved,
            exchange_bytes=2 * both * travelling,
        )

    def contract(
        self,
        role: Role,
        others: dict[Part, Complex[Tensor, "... _ k"]],
        out: dict[Part, Complex[Tensor, "... _ k"]],
    ) -> None:
        """Writes the form's derivative by `role` into its parts; components stand before k."""
        x, y, o = (
            [c for part in self.parts(r) for c in (out if r == role else others)[part].unbind(-2)]
            for r in (*(r for r in ROLES if r != role), role)
        )
        place = ROLES.index(role)
        first, second = (n for n in range(3) if n != place)
        begun = set()
        for term in sorted(self.terms, key=lambda term: -term[3]):  # a first one has sign +1
            a, b, number = x[term[first]], y[term[second]], term[place]
            if number in begun:
                o[number].addcmul_(a, b, value=term[3])
            else:
                torch.mul(a, b, out=o[number])
                begun.add(number)


@lru_cache
def trilinear_form(
    scalars: tuple[bool, bool], vectors: tuple[bool, bool], names: tuple[str, ...]
) -> TrilinearForm:
    """The named products of (scalar, vector) operands q and k, of which each may lack a part.

    scalar: qs ks    dot: q·k    scale: qs k + ks q, or what there is of it    cross: q × k
    The result has a polar scalar (scalar, dot), a polar vector (scale), an axial vector (cross).
    """
    q, k = (range(s, s + 3 * v) for s, v in zip(scalars, vectors, strict=True))
    terms, parts, o = [], [], 0
    if "scalar" in names:
        terms.append((0, 0, o, 1))
    if "dot" in names:
        terms += [(q[i], k[i], o, 1) for i in range(3)]
    if terms:
        parts, o = [1], 1
    if "scale" in names:
        terms += [(0, k[i], o + i, 1) for i in range(3) if scalars[0] and vectors[1]]
        terms += [(q[i], 0, o + i, 1) for i in range(3) if scalars[1] and vectors[0]]
        parts, o = [*parts, 3], o + 3
    if "cross" in names:
        for i in range(3):
            after, before = (i + 1) % 3, (i + 2) % 3
            terms += [(q[after], k[before], o + i, 1), (q[before], k[after], o + i, -1)]
        parts = [*parts, 3]
    sizes = [(1,) * s + (3,) * v for s, v in zip(scalars, vectors, strict=True)]
    return TrilinearForm({"q": sizes[0], "k": sizes[1], "u": tuple(parts)}, tuple(terms))


def ramp(
    numbers: range, turns: Sequence[int], modulus: int, dtype: torch.dtype, device: torch.device
) -> Complex[Tensor, "turn number"]:
    """exp(2πi j t / modulus) for every t of `turns` and j of `numbers`, which has steps of 1.

    Integers are reduced before they become angles, so that no digit is lost at any length; the
    exponentials are products of two short tables, so that few sines are taken.
    """
    block = 1 << (len(numbers).bit_length() // 2)
    t = torch.tensor(turns, pin_memory=device.type == "cuda").unsqueeze(1)
    t = t.to(device, non_blocking=True)  # pinned: the host does not wait

    def table(some: range) -> Complex[Tensor, "turn some"]:
        j = torch.arange(some.start, some.stop, some.step, device=device) % modulus
        angle = (j * t % modulus).double() * (2 * torch.pi / modulus)
        return torch.polar(torch.ones_like(angle), angle).to(dtype)

    coarse, fine = table(numbers[::block]), table(range(block))
    return (coarse.unsqueeze(2) * fine.unsqueeze(1)).flatten(1)[:, : len(numbers)]


def transform_length(length: int, ranks: int, wraps: Sequence[int] | None) -> tuple[int, bool]:
    """Length of the transform, a multiple of `ranks`, and whether its result has to be folded.

    A circular convolution whose rows all have the full length, when that is `ranks` times a fast
    length, is the plain circular transform. Everything else is zero-padded until nothing wraps and
    folded at each row's own length where it has to be circular.
    """
    if wraps is not None and set(wraps) == {length} and length % ranks == 0:
        local = length // ranks
        if fast_length(local) == local:
            return length, False
    return padded_length(length, ranks, wraps is not None), wraps is not None


def padded_length(length: int, ranks: int, fold: bool) -> int:
    """Length of a transform in which nothing wraps: 2N - 1 tokens, one more for the fold."""
    return ranks * fast_length(-(-(2 * length - 1 + fold) // ranks))


@lru_cache
def fast_length(n: int) -> int:
    """Smallest length >= n >= 1 whose prime factors are 2, 3, 5 and 7."""
    while not _is_smooth(n):
        n += 1
    return n


def _is_smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1
