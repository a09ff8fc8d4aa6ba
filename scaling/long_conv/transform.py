"""The distributed real Fourier transform of a cyclic shard: one all-to-all each way.

Rank r of P holds every P-th token: a polyphase component. The transform of all T = P·L (padded)
tokens is then, with f = k + L·m,

    X[f] = sum_r exp(-2πi r m / P) · exp(-2πi r k / T) · rfft_L(x_r)[k]

that is: a local transform, one all-to-all that hands each rank a slice of k for all r, a twiddle
and a P-point transform. Each rank then holds frequencies of the true spectrum, where products are
pointwise, and goes back the same way. Nothing here depends on the number of channels; P need not
divide anything. Cf. Inda & Bisseling, Parallel Computing 2001 (cyclic to cyclic, one exchange).

Of L tokens of a rank the L // 2 + 1 complex bins of rfft_L travel.
"""

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scaling.long_conv.form import ramp
from scaling.parallel.collectives import Exchange
from scaling.parallel.shard import SequenceShard

Rows = Float[Tensor, "_row _channel _component _token"]
"""This rank's tokens of rows that are padded to one length."""
Bins = Complex[Tensor, "_row _channel _component _bin"]
"""Rfft of such rows, or a slice of it."""
Phases = Complex[Tensor, "_rank _row _channel _component _k"]
"""One slice of the bins of every rank: polyphase components, before twiddle and P-point sum."""
Wire = Complex[Tensor, " _number"]
"""What one exchange sends or brings, in the order of the ranks."""


@dataclass(frozen=True)
class Frequencies:
    """Which frequencies f = k + L·m of rows with T = P·L tokens this rank holds: those of its slice
    of the bins k = 0 ... L // 2, with every m = 0 ... P - 1."""

    local: int
    """L: tokens of a rank after padding."""
    rank: int
    ranks: int
    """P"""

    @property
    def transform(self) -> int:
        """T."""
        return self.local * self.ranks

    @cached_property
    def slices(self) -> list[range]:
        """The bins of every rank."""
        bins = self.local // 2 + 1
        bounds = [bins * rank // self.ranks for rank in range(self.ranks + 1)]
        return [range(start, stop) for start, stop in pairwise(bounds)]

    @property
    def bins(self) -> range:
        """This rank's."""
        return self.slices[self.rank]

    def exponentials(
        self, turns: list[int], dtype: torch.dtype, device: torch.device
    ) -> Complex[Tensor, "rank turn k"]:
        """exp(2πi f t / T) of every t of `turns`."""
        by_bin = ramp(self.bins, turns, self.transform, dtype, device)
        by_rank = ramp(range(self.ranks), turns, self.ranks, dtype, device)
        return by_rank.T.unsqueeze(-1) * by_bin


Layout = list[tuple[Frequencies, tuple[int, int, int]]]
"""Frequencies of each of several tensors, and how many rows, channels and components it has."""


class Transform:
    """Several tensors there and back, of several lengths, together in one exchange.

    The generators pause once, while the exchange is under way.
    """

    def __init__(
        self, shard: SequenceShard | None, dtype: torch.dtype, device: torch.device, operator: str
    ) -> None:
        self.shard, self.dtype, self.device, self.operator = shard, dtype, device, operator
        self.rank, self.ranks = (0, 1) if shard is None else (shard.rank, shard.size)

    def to_phases(self, rows: list[Rows], layout: Layout) -> Generator[None, None, list[Phases]]:
        """Transforms tokens and gives every rank its slice of the bins."""
        if self.shard is None:
            yield
            return [rfft(x).unsqueeze(0) for x in rows]
        exchange = self._exchange(self._by_rank(rows, layout), layout, back=False)
        del rows
        yield
        return self.phases(exchange.wait(), layout)

    def to_rows(self, wire: Wire, layout: Layout) -> Generator[None, None, list[Rows]]:
        """Gives every rank the bins of its own tokens, and transforms them back."""
        if self.shard is None:
            yield
        else:
            exchange = self._exchange(wire, layout, back=True)
            del wire
            yield
            wire = exchange.wait()
        return [
            irfft(pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1), f.local)
            for pieces, (f, _) in zip(self._by_tensor(wire, layout), layout, strict=True)
        ]

    def empty(self, layout: Layout) -> Wire:
        """Room for this rank's slice of every rank's bins."""
        numbers = self.ranks * self._counts(layout)[self.rank]
        return torch.empty(numbers, dtype=self.dtype, device=self.device)

    def phases(self, wire: Wire, layout: Layout) -> list[Phases]:
        """Views of this rank's slice of every rank's bins."""
        shapes = [(*rows, len(f.bins)) for f, rows in layout]
        sizes = [prod(shape) for shape in shapes]
        tensors = wire.view(self.ranks, sum(sizes)).split(sizes, 1)
        return [x.unflatten(1, shape) for x, shape in zip(tensors, shapes, strict=True)]

    def _by_rank(self, rows: list[Rows], layout: Layout) -> Wire:
        """The bins of this rank's tokens, in the order of the ranks that they go to."""
        wire = torch.empty(sum(self._counts(layout)), dtype=self.dtype, device=self.device)
        for x, pieces in zip(rows, self._by_tensor(wire, layout), strict=True):
            bins = rfft(x).split([piece.shape[-1] for piece in pieces], -1)
            for piece, some in zip(pieces, bins, strict=True):
                piece.copy_(some)
        return wire

    def _by_tensor(self, wire: Wire, layout: Layout) -> list[list[Bins]]:
        """For each tensor the slices of this rank's bins: views of what all ranks get or gave."""
        shapes = [(*rows, len(f.slices[rank])) for rank in range(self.ranks) for f, rows in layout]
        pieces = wire.split([prod(shape) for shape in shapes])
        views = [x.view(shape) for x, shape in zip(pieces, shapes, strict=True)]
        return [views[number :: len(layout)] for number in range(len(layout))]

    def _counts(self, layout: Layout) -> list[int]:
        """Complex numbers of every rank's slice."""
        return [
            sum(prod(rows) * len(f.slices[rank]) for f, rows in layout)
            for rank in range(self.ranks)
        ]

    def _exchange(self, wire: Wire, layout: Layout, back: bool) -> Exchange:
        assert self.shard is not None
        counts = self._counts(layout)
        own = [counts[self.rank]] * self.ranks
        send, receive = (own, counts) if back else (counts, own)
        return Exchange(wire, send, receive, self.shard.group, self.operator)


MKL_LIMIT = 1 << 20
"""From here on MKL's batched real float32 transforms of powers of two have errors of 4e-6 instead
of 2e-7 where it uses AVX-512 (seen on Intel Xeon; not with AVX2)."""
MKL_LOSES_DIGITS = torch.backends.cpu.get_cpu_capability() == "AVX512"


def rfft(x: Float[Tensor, "*b n"]) -> Complex[Tensor, "*b k"]:
    """torch.fft.rfft; of lengths that MKL gets wrong the halves, joined by hand."""
    n = x.shape[-1]
    if not _goes_wrong(n, x.dtype, x.device):
        return torch.fft.rfft(x)
    even, odd = rfft(x[..., ::2]), rfft(x[..., 1::2])
    odd = odd * ramp(range(n // 4 + 1), [-1], n, odd.dtype, odd.device)
    return torch.cat([even + odd, (even - odd)[..., :-1].conj().flip(-1)], -1)


def irfft(bins: Complex[Tensor, "*b k"], n: int) -> Float[Tensor, "*b n"]:
    """The inverse of `rfft` for n tokens."""
    if not _goes_wrong(n, bins.dtype.to_real(), bins.device):
        return torch.fft.irfft(bins, n)
    half, mirrored = bins[..., : n // 4 + 1] / 2, bins.flip(-1)[..., : n // 4 + 1].conj() / 2
    turn = ramp(range(n // 4 + 1), [1], n, bins.dtype, bins.device)
    even, odd = irfft(half + mirrored, n // 2), irfft((half - mirrored) * turn, n // 2)
    return torch.stack([even, odd], -1).flatten(-2)


def _goes_wrong(n: int, dtype: torch.dtype, device: torch.device) -> bool:
    by_mkl = MKL_LOSES_DIGITS and device.type == "cpu" and dtype == torch.float32
    return by_mkl and n >= MKL_LIMIT and n.bit_count() == 1
