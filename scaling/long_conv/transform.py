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
from math import prod

import torch
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


Streams = list[list[int]]
"""Numbers of streams: of every tensor (stream, L) of every group."""


@dataclass
class Spectra:
    """Frequencies of streams: group, part, tensor (rank, phase, stream, k)."""

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
        return torch.empty(streams, group.tokens, dtype=self.dtype.to_real(), device=self.device)

    def start(self, tokens: list[list[Tensor]]) -> "list[list[Tensor]] | Exchange":
        """Transforms (stream, token) of each group and sends off what other ranks need."""
        halves = [
            [torch.fft.rfft(_cut(x, group.split)) for x in tensors]
            for group, tensors in zip(self.groups, tokens, strict=True)
        ]
        del tokens  # here and below: before room is made for what comes next
        if self.shard is None:
            return halves
        wire, counts = self._pack(halves)
        del halves
        return self._exchange(wire, counts, back=False)

    def _pack(self, halves: list[list[Tensor]]) -> tuple[Tensor, list[int]]:
        """What is sent, and how much to each rank; overwrites the imaginary part of k = 0."""
        streams = [[half.shape[1] for half in tensors] for tensors in halves]
        for group, tensors in zip(self.groups, halves, strict=True):
            for half in tensors if group.local % 2 == 0 else ():
                half[..., 0].imag.copy_(half[..., -1].real)
        counts = self._counts(streams)
        wire = torch.empty(sum(counts), dtype=self.dtype, device=self.device)
        for rank, block in enumerate(wire.split(counts)):
            for piece, half in self._pieces(block, rank, streams, halves):
                piece.copy_(half)
        return wire, counts

    def finish(self, pending: "list[list[Tensor]] | Exchange", streams: Streams) -> Spectra:
        if isinstance(pending, Exchange):
            return self._spectra(pending.wait(), streams)
        return self._alone(pending)

    def empty(self, streams: Streams) -> Spectra:
        """To be filled and sent back."""
        if self.shard is None:
            return self._alone(self._halves(streams))
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
        """Tokens (stream, token) of each group."""
        if isinstance(pending, Spectra):
            halves = [[tensor[0] for tensor in parts[0]] for parts in pending.parts]
        else:
            halves = self._halves(streams)
            for rank, block in enumerate(pending.wait().split(self._counts(streams))):
                for piece, half in self._pieces(block, rank, streams, halves):
                    half.copy_(piece)
            for group, tensors in zip(self.groups, halves, strict=True):
                for half in tensors if group.local % 2 == 0 else ():
                    half[..., -1] = half[..., 0].imag
                    half[..., 0].imag.zero_()
        return [
            [_joined(torch.fft.irfft(half, group.local)) for half in tensors]
            for group, tensors in zip(self.groups, halves, strict=True)
        ]

    def _exchange(self, wire: Tensor, counts: list[int], back: bool) -> Exchange:
        """counts: numbers of each rank's slices of k; of its own slice a rank has every phase."""
        assert self.shard is not None
        own = [counts[self.shard.rank]] * self.ranks
        send, receive = (own, counts) if back else (counts, own)
        return Exchange(wire, send, receive, self.shard.group, self.operator)

    def _halves(self, streams: Streams) -> list[list[Tensor]]:
        """Room for rfft's bins: (phase, stream, k)."""
        halves = []
        for group, numbers in zip(self.groups, streams, strict=True):
            sizes = [(group.split, n, group.local // 2 + 1) for n in numbers]
            halves.append([torch.empty(x, dtype=self.dtype, device=self.device) for x in sizes])
        return halves

    def _counts(self, streams: Streams) -> list[int]:
        """Complex numbers of all streams in each rank's slice of k."""
        pairs = list(zip(streams, self.groups, strict=True))
        return [
            sum(sum(n) * g.split * g.width(rank) for n, g in pairs) for rank in range(self.ranks)
        ]

    def _pieces(
        self, block: Tensor, rank: int, streams: Streams, halves: list[list[Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs (phase, stream, k): a rank's slice in a block of the wire, and in the bins."""
        pairs, start = [], 0
        for group, numbers, tensors in zip(self.groups, streams, halves, strict=True):
            bins = slice(group.bounds[rank], group.bounds[rank + 1])
            for n, half in zip(numbers, tensors, strict=True):
                shape = (group.split, n, group.width(rank))
                stop = start + prod(shape)
                pairs.append((block[start:stop].view(shape), half[..., bins]))
                start = stop
        return pairs

    def _items(self, wire: Tensor, streams: Streams) -> list[list[Tensor]]:
        """Views (rank, phase, stream, k) of what this rank holds of each tensor."""
        ranks, start, items = wire.view(self.ranks, wire.numel() // self.ranks), 0, []
        for group, numbers in zip(self.groups, streams, strict=True):
            tensors = []
            for n in numbers:
                shape = (group.split, n, group.width(group.rank))
                tensors.append(ranks[:, start : start + prod(shape)].unflatten(1, shape))
                start += prod(shape)
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

    def _alone(self, halves: list[list[Tensor]]) -> Spectra:
        return Spectra([[[half.unsqueeze(0) for half in tensors]] for tensors in halves], None)


def _cut(x: Tensor, split: int) -> Tensor:
    """(stream, token) -> (phase, stream, token)."""
    return x.unflatten(1, (-1, split)).movedim(2, 0).contiguous() if split > 1 else x.unsqueeze(0)


def _joined(x: Tensor) -> Tensor:
    """(phase, stream, token) -> (stream, token)."""
    return x.movedim(0, 2).flatten(1) if len(x) > 1 else x[0]
