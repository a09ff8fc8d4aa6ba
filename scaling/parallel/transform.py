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

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scaling.algebra.spectra import ramp
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
    """Which frequencies f = k + L·m of rows with T = P·L tokens this rank holds.

    They come in parts (phase m, stream, k): all of rfft's bins on one rank; else a slice of k and,
    on the rank whose slice begins with k = 0 and L/2 packed together, those two apart.
    """

    local: int
    """L: tokens of a phase after padding."""
    rank: int
    ranks: int

    @property
    def transform(self) -> int:
        """T."""
        return self.local * self.ranks

    @cached_property
    def bounds(self) -> list[int]:
        """Slices of k by rank; complex numbers that travel are (L + 1) // 2 a stream."""
        travelling = (self.local + 1) // 2
        return [travelling * rank // self.ranks for rank in range(self.ranks + 1)]

    def width(self, rank: int) -> int:
        """Complex numbers of a stream in a rank's slice."""
        return self.bounds[rank + 1] - self.bounds[rank]

    @property
    def has_packed(self) -> bool:
        """Whether this rank's slice begins with k = 0 and L/2 packed together."""
        at_start = self.bounds[self.rank] == 0 < self.width(self.rank)
        return self.ranks > 1 and at_start and self.local % 2 == 0

    @cached_property
    def parts(self) -> list[Bins]:
        if self.ranks == 1:
            return [Bins(0, self.local // 2 + 1)]
        width = self.width(self.rank) - self.has_packed
        main = Bins(self.bounds[self.rank] + self.has_packed, width)
        return [main, Bins(0, 2, self.local // 2)] if self.has_packed else [main]

    def exponentials(
        self, part: Bins, turns: list[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """exp(2πi f t / T) of every t of `turns`: (phase, turns, k)."""
        by_bin = ramp(part.start, part.step, part.count, turns, self.transform, dtype, device)
        by_phase = ramp(0, 1, self.ranks, turns, self.ranks, dtype, device)
        return by_phase.T.unsqueeze(2) * by_bin


@dataclass
class Spectra:
    """Frequencies of streams: for each group of rows its parts, (phase, stream, k)."""

    parts: list[list[Tensor]]
    wire: Tensor | None
    """(rank, numbers): what came from every rank, or goes back there; parts are views of it."""


class Transform:
    """Streams of tokens there and back; rows of several lengths (groups) travel together.

    Between `start` and `finish` the exchange is under way. What `finish` gives and `start_back`
    takes are polyphase components still: see `twiddle` and `phases`.
    """

    def __init__(
        self,
        shard: SequenceShard | None,
        groups: list[Frequencies],
        dtype: torch.dtype,
        device: torch.device,
        operator: str,
    ) -> None:
        self.shard, self.groups, self.operator = shard, groups, operator
        self.dtype, self.device = dtype.to_complex(), device
        self.ranks = 1 if shard is None else shard.size

    def tokens(self, streams: int, group: Frequencies) -> Tensor:
        """To be filled and sent: (stream, L)."""
        return torch.empty(streams, group.local, dtype=self.dtype.to_real(), device=self.device)

    def start(self, tokens: list[Tensor]) -> "list[Tensor] | Exchange":
        """Transforms (stream, L) of each group and sends off what other ranks need."""
        halves = [torch.fft.rfft(x) for x in tokens]
        if self.shard is None:
            return halves
        for group, half in zip(self.groups, halves, strict=True):
            if group.local % 2 == 0:
                half[:, 0].imag.copy_(half[:, -1].real)
        counts = self._counts([len(half) for half in halves])
        wire = torch.empty(sum(counts), dtype=self.dtype, device=self.device)
        for rank, block in enumerate(wire.split(counts)):
            for (piece, bins), half in zip(
                self._pieces(block, rank, [len(half) for half in halves]), halves, strict=True
            ):
                piece.copy_(half[:, bins])
        return self._exchange(wire, counts, back=False)

    def finish(self, pending: "list[Tensor] | Exchange", streams: list[int]) -> Spectra:
        if not isinstance(pending, Exchange):
            return Spectra([[half.unsqueeze(0)] for half in pending], None)
        return self._spectra(pending.wait(), streams)

    def empty(self, streams: list[int]) -> Spectra:
        """To be filled and sent back."""
        if self.shard is None:
            sizes = [(1, n, g.local // 2 + 1) for n, g in zip(streams, self.groups, strict=True)]
            new = [torch.empty(size, dtype=self.dtype, device=self.device) for size in sizes]
            return Spectra([[x] for x in new], None)
        numbers = self.ranks * self._counts(streams)[self.shard.rank]
        return self._spectra(torch.empty(numbers, dtype=self.dtype, device=self.device), streams)

    def start_back(self, spectra: Spectra, streams: list[int]) -> "Spectra | Exchange":
        if self.shard is None:
            return spectra
        assert spectra.wire is not None
        wire = spectra.wire
        items = self._items(wire, streams)
        for group, item, parts in zip(self.groups, items, spectra.parts, strict=True):
            if group.has_packed:
                item[..., 0] = torch.complex(parts[1][..., 0].real, parts[1][..., 1].real)
        return self._exchange(wire, self._counts(streams), back=True)

    def finish_back(self, pending: "Spectra | Exchange", streams: list[int]) -> list[Tensor]:
        """Tokens (stream, L) of each group."""
        if isinstance(pending, Spectra):
            halves = [parts[0][0] for parts in pending.parts]
        else:
            sizes = [(n, g.local // 2 + 1) for n, g in zip(streams, self.groups, strict=True)]
            halves = [torch.empty(size, dtype=self.dtype, device=self.device) for size in sizes]
            blocks = pending.wait().split(self._counts(streams))
            for rank, block in enumerate(blocks):
                for (piece, bins), half in zip(
                    self._pieces(block, rank, streams), halves, strict=True
                ):
                    half[:, bins] = piece
            for group, half in zip(self.groups, halves, strict=True):
                if group.local % 2 == 0:
                    half[:, -1] = half[:, 0].imag
                    half[:, 0].imag.zero_()
        return [torch.fft.irfft(h, g.local) for h, g in zip(halves, self.groups, strict=True)]

    def _exchange(self, wire: Tensor, counts: list[int], back: bool) -> Exchange:
        """counts: numbers of each rank's slices of k; of its own slice a rank has every phase."""
        assert self.shard is not None
        own = [counts[self.shard.rank]] * self.ranks
        send, receive = (own, counts) if back else (counts, own)
        return Exchange(wire, send, receive, self.shard.group, self.operator)

    def _counts(self, streams: list[int]) -> list[int]:
        """Complex numbers of all streams in each rank's slice of k."""
        pairs = list(zip(streams, self.groups, strict=True))
        return [sum(n * g.width(rank) for n, g in pairs) for rank in range(self.ranks)]

    def _pieces(self, block: Tensor, rank: int, streams: list[int]) -> list[tuple[Tensor, slice]]:
        """A rank's slices of k in a block of the wire: (stream, k) of each group, and which k."""
        widths = [group.width(rank) for group in self.groups]
        pieces = block.split([n * width for n, width in zip(streams, widths, strict=True)])
        return [
            (piece.view(n, width), slice(group.bounds[rank], group.bounds[rank + 1]))
            for piece, n, width, group in zip(pieces, streams, widths, self.groups, strict=True)
        ]

    def _items(self, wire: Tensor, streams: list[int]) -> list[Tensor]:
        """Views (phase, stream, k) of what this rank holds of each group."""
        widths = [group.width(group.rank) for group in self.groups]
        sizes = [n * width for n, width in zip(streams, widths, strict=True)]
        items = wire.view(self.ranks, sum(sizes)).split(sizes, 1)
        return [x.unflatten(1, (n, w)) for x, n, w in zip(items, streams, widths, strict=True)]

    def _spectra(self, wire: Tensor, streams: list[int]) -> Spectra:
        parts = []
        for group, item in zip(self.groups, self._items(wire, streams), strict=True):
            if group.has_packed:
                both = torch.view_as_real(item[..., 0])
                parts.append([item[..., 1:], torch.complex(both, torch.zeros_like(both))])
            else:
                parts.append([item])
        return Spectra(parts, wire)
