"""The distributed real Fourier transform of a cyclic shard: one all-to-all each way.

Rank r of P holds every P-th token: a polyphase component. The transform of all T = P·L (padded)
tokens is then, with f = k + L·m,

    X[f] = sum_r exp(-2πi r m / P) · exp(-2πi r k / T) · rfft_L(x_r)[k]

that is: a local transform, one all-to-all that hands each rank a slice of k for all r, a twiddle
and a P-point transform. Each rank then holds frequencies of the true spectrum, where products are
pointwise, and goes back the same way. Nothing here depends on the number of channels; P need not
divide anything. Cf. Inda & Bisseling, Parallel Computing 2001 (cyclic to cyclic, one exchange).

Of the L numbers that rfft_L makes of L tokens, exactly L travel: the real bins k = 0 and L/2 share
one complex number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from scaling.long_conv.form import ramp
from scaling.parallel.collectives import Exchange
from scaling.parallel.shard import SequenceShard


@dataclass(frozen=True)
class Bins:
    """Numbers k = start, start + step, ... that a part of a spectrum consists of."""

    start: int
    count: int
    step: int = 1


@dataclass(frozen=True)
class Frequencies:
    """Which frequencies f = k + L·m of rows with T = P·V·L tokens this rank holds.

    A rank may cut its tokens into V phases of its own, as if it were V ranks: tokens v, v + V, ...
    Frequencies come in parts (rank, phase, stream, k), m = 0 ... P·V - 1 along the first two axes:
    all of rfft's bins on one rank; else a slice of k and, on the rank whose slice begins with k = 0
    and L/2 packed together, those two apart.
    """

    local: int
    """L: tokens of a phase after padding."""
    rank: int
    ranks: int
    """P"""
    split: int = 1
    """V"""

    @property
    def tokens(self) -> int:
        """Of this rank, after padding."""
        return self.local * self.split

    @property
    def phases(self) -> list[int]:
        """First token of every rank's every phase."""
        return [r + self.ranks * v for r in range(self.ranks) for v in range(self.split)]

    @property
    def transform(self) -> int:
        """T."""
        return self.tokens * self.ranks

    @cached_property
    def bounds(self) -> list[int]:
        """Slices of k by rank; complex numbers that travel are (L + 1) // 2 a stream."""
        travelling = (self.local + 1) // 2
        return [travelling * rank // self.ranks for rank in range(self.ranks + 1)]

    @cached_property
    def widths(self) -> list[int]:
        """Complex numbers of a stream in each rank's slice."""
        return [stop - start for start, stop in pairwise(self.bounds)]

    @cached_property
    def has_packed(self) -> bool:
        """Whether this rank's slice begins with k = 0 and L/2 packed together."""
        at_start = self.bounds[self.rank] == 0 < self.widths[self.rank]
        return self.ranks > 1 and at_start and self.local % 2 == 0

    @cached_property
    def parts(self) -> list[Bins]:
        if self.ranks == 1:
            return [Bins(0, self.local // 2 + 1)]
        width = self.widths[self.rank] - self.has_packed
        main = Bins(self.bounds[self.rank] + self.has_packed, width)
        return [main, Bins(0, 2, self.local // 2)] if self.has_packed else [main]

    def exponentials(
        self, part: Bins, turns: list[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """exp(2πi f t / T) of every t of `turns`: (rank, phase, turns, k)."""
        by_bin = ramp(part.start, part.step, part.count, turns, self.transform, dtype, device)
        phases = self.ranks * self.split
        by_phase = ramp(0, 1, phases, turns, phases, dtype, device).T
        return by_phase.reshape(self.ranks, self.split, -1, 1) * by_bin


MKL_LIMIT = 1 << 20
"""From here on MKL's real float32 transforms of powers of two, more than one at once, have errors
of 4e-6 instead of 2e-7."""


def frequencies(tokens: int, shard: SequenceShard | None, device: torch.device) -> Frequencies:
    """Those of rows that have `tokens` on every rank, after padding."""
    rank, ranks = (0, 1) if shard is None else (shard.rank, shard.size)
    split = 1
    if device.type == "cpu" and tokens & (tokens - 1) == 0:
        split = max(1, 2 * tokens // MKL_LIMIT)
    return Frequencies(tokens // split, rank, ranks, split)


Streams = tuple[Frequencies, int]
"""What is transformed as one tensor: at which length, and how many."""


@dataclass
class Spectra:
    """Frequencies of streams."""

    parts: list[Tensor]
    """(rank, phase, stream, k) of every part of every tensor."""
    wire: Tensor | None
    """What came from the other ranks or goes back to them; parts are views of it."""


class Transform:
    """Streams of tokens there and back; rows of several lengths travel together.

    Between `start` and `finish` the exchange is under way. What `finish` gives and `start_back`
    takes are polyphase components still, without twiddle and transform over the phases.
    """

    def __init__(
        self, shard: SequenceShard | None, dtype: torch.dtype, device: torch.device, operator: str
    ) -> None:
        self.shard, self.operator = shard, operator
        self.dtype, self.device = dtype.to_complex(), device
        self.ranks = 1 if shard is None else shard.size

    def tokens(self, streams: Streams) -> Float[Tensor, "stream token"]:
        """To be filled and sent."""
        shape = (streams[1], streams[0].tokens)
        return torch.empty(shape, dtype=self.dtype.to_real(), device=self.device)

    def start(self, tokens: list[Tensor], streams: list[Streams]) -> list[Tensor] | Exchange:
        """Transforms (stream, token) and sends off what other ranks need."""
        halves = [
            torch.fft.rfft(_cut(x, f.split)) for x, (f, _) in zip(tokens, streams, strict=True)
        ]
        tokens.clear()  # before room is made for what comes next
        if self.shard is None:
            return halves
        wire = torch.empty(sum(self._counts(streams)), dtype=self.dtype, device=self.device)
        for (f, _), half in zip(streams, halves, strict=True):
            if f.local % 2 == 0:
                half[..., 0].imag.copy_(half[..., -1].real)
        for piece, half in self._pieces(wire, streams, halves):
            piece.copy_(half)
        halves.clear()
        return self._exchange(wire, streams, back=False)

    def finish(self, pending: list[Tensor] | Exchange, streams: list[Streams]) -> Spectra:
        if isinstance(pending, Exchange):
            return self._spectra(pending.wait(), streams)
        return Spectra([half.unsqueeze(0) for half in pending], None)

    def empty(self, streams: list[Streams]) -> Spectra:
        """To be filled and sent back."""
        if self.shard is None:
            return self.finish(self._halves(streams), streams)
        numbers = self.ranks * self._counts(streams)[self.shard.rank]
        return self._spectra(torch.empty(numbers, dtype=self.dtype, device=self.device), streams)

    def start_back(self, spectra: Spectra, streams: list[Streams]) -> list[Tensor] | Exchange:
        if spectra.wire is None:
            return [part[0] for part in spectra.parts]
        parts = iter(spectra.parts)
        for (f, _), item in zip(streams, self._items(spectra.wire, streams), strict=True):
            next(parts)  # lies in the wire
            if f.has_packed:
                ends = next(parts)
                item[..., 0] = torch.complex(ends[..., 0].real, ends[..., 1].real)
        return self._exchange(spectra.wire, streams, back=True)

    def finish_back(
        self, pending: list[Tensor] | Exchange, streams: list[Streams]
    ) -> list[Float[Tensor, "stream token"]]:
        if isinstance(pending, Exchange):
            halves = self._halves(streams)
            for piece, half in self._pieces(pending.wait(), streams, halves):
                half.copy_(piece)
            for (f, _), half in zip(streams, halves, strict=True):
                if f.local % 2 == 0:
                    half[..., -1] = half[..., 0].imag
                    half[..., 0].imag.zero_()
        else:
            halves = pending
        return [
            _joined(torch.fft.irfft(half, f.local))
            for (f, _), half in zip(streams, halves, strict=True)
        ]

    def _exchange(self, wire: Tensor, streams: list[Streams], back: bool) -> Exchange:
        """Of its own slice of k a rank has every phase."""
        assert self.shard is not None
        counts = self._counts(streams)
        own = [counts[self.shard.rank]] * self.ranks
        send, receive = (own, counts) if back else (counts, own)
        return Exchange(wire, send, receive, self.shard.group, self.operator)

    def _halves(self, streams: list[Streams]) -> list[Tensor]:
        """Room for rfft's bins: (phase, stream, k)."""
        return [
            torch.empty(f.split, n, f.local // 2 + 1, dtype=self.dtype, device=self.device)
            for f, n in streams
        ]

    def _counts(self, streams: list[Streams]) -> list[int]:
        """Complex numbers of all streams in each rank's slice of k."""
        return [sum(n * f.split * f.widths[rank] for f, n in streams) for rank in range(self.ranks)]

    def _pieces(
        self, wire: Tensor, streams: list[Streams], halves: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (phase, stream, k) of each rank's slice: on the wire, and in the bins."""
        start = 0
        for rank in range(self.ranks):
            for (f, n), half in zip(streams, halves, strict=True):
                shape = (f.split, n, f.widths[rank])
                piece = wire[start : start + prod(shape)].view(shape)
                start += prod(shape)
                yield piece, half[..., f.bounds[rank] : f.bounds[rank + 1]]

    def _items(self, wire: Tensor, streams: list[Streams]) -> list[Tensor]:
        """Views (rank, phase, stream, k) of what this rank holds of each tensor."""
        shapes = [(f.split, n, f.widths[f.rank]) for f, n in streams]
        sizes = [prod(shape) for shape in shapes]
        items = wire.view(self.ranks, sum(sizes)).split(sizes, 1)
        return [x.unflatten(1, shape) for x, shape in zip(items, shapes, strict=True)]

    def _spectra(self, wire: Tensor, streams: list[Streams]) -> Spectra:
        parts = []
        for (f, _), item in zip(streams, self._items(wire, streams), strict=True):
            if f.has_packed:
                both = torch.view_as_real(item[..., 0])
                parts += [item[..., 1:], torch.complex(both, torch.zeros_like(both))]
            else:
                parts.append(item)
        return Spectra(parts, wire)


def _cut(x: Tensor, split: int) -> Tensor:
    """(stream, token) -> (phase, stream, token)."""
    return x.unflatten(1, (-1, split)).movedim(2, 0).contiguous() if split > 1 else x.unsqueeze(0)


def _joined(x: Tensor) -> Tensor:
    """(phase, stream, token) -> (stream, token)."""
    return x.movedim(0, 2).flatten(1) if len(x) > 1 else x[0]
