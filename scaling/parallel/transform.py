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


Streams = list[list[int]]
"""Numbers of streams: of every tensor (stream, L) of every group."""


@dataclass
class Spectra:
    """Frequencies of streams: group, part, tensor (phase, stream, k)."""

    parts: list[list[list[Tensor]]]
    wire: Tensor | None
    """What came from the other ranks or goes back to them; parts are views of it."""


class Transform:
    """Streams of tokens there and back; rows of several lengths (groups) travel together.

    Between `start` and `finish` the exchange is under way. What `finish` gives and `start_back`
    takes are polyphase components still, without twiddle and transform over the phases.
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

    def start(self, tokens: list[list[Tensor]]) -> "list[list[Tensor]] | Exchange":
        """Transforms (stream, L) of each group and sends off what other ranks need."""
        halves = [[torch.fft.rfft(x) for x in tensors] for tensors in tokens]
        if self.shard is None:
            return halves
        streams = [[len(half) for half in tensors] for tensors in halves]
        for group, tensors in zip(self.groups, halves, strict=True):
            for half in tensors if group.local % 2 == 0 else ():
                half[:, 0].imag.copy_(half[:, -1].real)
        counts = self._counts(streams)
        wire = torch.empty(sum(counts), dtype=self.dtype, device=self.device)
        for rank, block in enumerate(wire.split(counts)):
            for piece, half in self._pieces(block, rank, streams, halves):
                piece.copy_(half)
        return self._exchange(wire, counts, back=False)

    def finish(self, pending: "list[list[Tensor]] | Exchange", streams: Streams) -> Spectra:
        if isinstance(pending, Exchange):
            return self._spectra(pending.wait(), streams)
        return Spectra([[[half.unsqueeze(0) for half in halves]] for halves in pending], None)

    def empty(self, streams: Streams) -> Spectra:
        """To be filled and sent back."""
        if self.shard is None:
            halves = [[half.unsqueeze(0) for half in halves] for halves in self._halves(streams)]
            return Spectra([[tensors] for tensors in halves], None)
        numbers = self.ranks * self._counts(streams)[self.shard.rank]
        return self._spectra(torch.empty(numbers, dtype=self.dtype, device=self.device), streams)

    def start_back(self, spectra: Spectra, streams: Streams) -> "Spectra | Exchange":
        if spectra.wire is None:
            return spectra
        items = self._items(spectra.wire, streams)
        for group, tensors, parts in zip(self.groups, items, spectra.parts, strict=True):
            if group.has_packed:
                for item, ends in zip(tensors, parts[1], strict=True):
                    item[..., 0] = torch.complex(ends[..., 0].real, ends[..., 1].real)
        return self._exchange(spectra.wire, self._counts(streams), back=True)

    def finish_back(self, pending: "Spectra | Exchange", streams: Streams) -> list[list[Tensor]]:
        """Tokens (stream, L) of each group."""
        if isinstance(pending, Spectra):
            halves = [[tensor[0] for tensor in parts[0]] for parts in pending.parts]
        else:
            halves = self._halves(streams)
            for rank, block in enumerate(pending.wait().split(self._counts(streams))):
                for piece, half in self._pieces(block, rank, streams, halves):
                    half.copy_(piece)
            for group, tensors in zip(self.groups, halves, strict=True):
                for half in tensors if group.local % 2 == 0 else ():
                    half[:, -1] = half[:, 0].imag
                    half[:, 0].imag.zero_()
        return [
            [torch.fft.irfft(half, group.local) for half in tensors]
            for group, tensors in zip(self.groups, halves, strict=True)
        ]

    def _exchange(self, wire: Tensor, counts: list[int], back: bool) -> Exchange:
        """counts: numbers of each rank's slices of k; of its own slice a rank has every phase."""
        assert self.shard is not None
        own = [counts[self.shard.rank]] * self.ranks
        send, receive = (own, counts) if back else (counts, own)
        return Exchange(wire, send, receive, self.shard.group, self.operator)

    def _halves(self, streams: Streams) -> list[list[Tensor]]:
        """Room for rfft's bins."""
        return [
            [
                torch.empty(n, group.local // 2 + 1, dtype=self.dtype, device=self.device)
                for n in numbers
            ]
            for group, numbers in zip(self.groups, streams, strict=True)
        ]

    def _counts(self, streams: Streams) -> list[int]:
        """Complex numbers of all streams in each rank's slice of k."""
        pairs = list(zip(streams, self.groups, strict=True))
        return [sum(sum(n) * g.width(rank) for n, g in pairs) for rank in range(self.ranks)]

    def _pieces(
        self, block: Tensor, rank: int, streams: Streams, halves: list[list[Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs (stream, k): a rank's slice in a block of the wire, and in the tensor's bins."""
        pairs, start = [], 0
        for group, numbers, tensors in zip(self.groups, streams, halves, strict=True):
            bins = slice(group.bounds[rank], group.bounds[rank + 1])
            for n, half in zip(numbers, tensors, strict=True):
                stop = start + n * group.width(rank)
                pairs.append((block[start:stop].view(n, group.width(rank)), half[:, bins]))
                start = stop
        return pairs

    def _items(self, wire: Tensor, streams: Streams) -> list[list[Tensor]]:
        """Views (phase, stream, k) of what this rank holds of each tensor."""
        phases, start, items = wire.view(self.ranks, wire.numel() // self.ranks), 0, []
        for group, numbers in zip(self.groups, streams, strict=True):
            width, tensors = group.width(group.rank), []
            for n in numbers:
                tensors.append(phases[:, start : start + n * width].unflatten(1, (n, width)))
                start += n * width
            items.append(tensors)
        return items

    def _spectra(self, wire: Tensor, streams: Streams) -> Spectra:
        parts = []
        for group, tensors in zip(self.groups, self._items(wire, streams), strict=True):
            if group.has_packed:
                both = [torch.view_as_real(item[..., 0]) for item in tensors]
                ends = [torch.complex(x, torch.zeros_like(x)) for x in both]
                parts.append([[item[..., 1:] for item in tensors], ends])
            else:
                parts.append([tensors])
        return Spectra(parts, wire)
