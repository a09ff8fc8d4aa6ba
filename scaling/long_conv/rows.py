"""Where the tokens of a convolution's rows lie, and the phases that put its result in place."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scaling.long_conv.form import Role, fast_length, padded_length, transform_length
from scaling.long_conv.transform import Bins, Frequencies, frequencies
from scaling.parallel.shard import SequenceShard


@dataclass
class WholeRows:
    """Every row of the first axis, from its first token on; a static k has one row for all."""

    frequencies: Frequencies
    shard: SequenceShard | None
    length: int
    lengths: Sequence[int] | None
    """True length of each row."""
    count: int
    kernels: int
    """Rows of k."""
    wraps: Sequence[int] | None
    """Lengths at which results are folded: one for all rows or one each."""
    complete = True  # reads every token of a result

    def rows(self, role: Role) -> int:
        return self.kernels if role == "k" else self.count

    def fill(self, role: Role, x: Tensor, out: Tensor) -> None:
        """Puts tokens (row, channel, component, n_local) into rows (channel, component, row, token)
        with zeros around."""
        n = x.shape[-1]
        out[..., :n] = x.permute(1, 2, 0, 3)
        out[..., n:] = 0
        if self.beyond is not None and self.rows(role) == self.count:
            out[..., :n].masked_fill_(self.beyond.to(x.device), 0)  # also where it holds NaN

    def read(self, role: Role, rows: Tensor, out: Tensor) -> None:
        """Puts the tokens of rows back."""
        out.copy_(rows[..., : out.shape[-1]].permute(2, 0, 1, 3))
        if self.beyond is not None and self.rows(role) == self.count:
            out.masked_fill_(self.beyond.to(out.device)[:, None, None], 0)

    @property
    def is_one_full_row(self) -> bool:
        """Whether tensors of tokens are the rows already, on every rank."""
        full = self.frequencies.transform == self.length
        return full and self.count == self.kernels == 1 and self.beyond is None

    @cached_property
    def beyond(self) -> Tensor | None:
        """Local tokens behind their row's end, (row, n_local); None if there is none anywhere."""
        if self.lengths is None or set(self.lengths) == {self.length}:
            return None
        index = torch.arange(self.length) if self.shard is None else self.shard.index
        return index >= torch.tensor(self.lengths).reshape(-1, 1)

    def factor(self, part: Bins, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """What the product's spectrum is multiplied with: (rank, phase, 1, row, k)."""
        if self.wraps is None:
            return None
        fold = 1 + self.frequencies.exponentials(part, list(self.wraps), dtype, device)
        return fold.unsqueeze(2)


@dataclass
class Bodies:
    """Runs of tokens, each a row of its own: what lies in another row cannot leak.

    A body that starts at token s begins in local place s div P of its ranks, as token o = s mod P
    of its row. The product of q and k then begins at token 2o (o for a static k, whose rows begin
    at 0), and a phase brings it back.
    """

    frequencies: Frequencies
    places: dict[Role, tuple[Tensor, Tensor, Tensor]]
    """Row and local token of every token of the bodies, and its place in rows · tokens."""
    count: int
    shifts: list[int]
    """Tokens that the result of each row is moved back by."""
    wraps: list[int] | None
    """Lengths of the bodies where they are circular."""
    complete = False  # there may be tokens behind the last body, and other groups

    def rows(self, role: Role) -> int:
        return self.count

    def fill(self, role: Role, x: Tensor, out: Tensor) -> None:
        row, token, place = (index.to(x.device) for index in self.places[role])
        out.zero_()
        out.flatten(2)[..., place] = x.permute(1, 2, 0, 3)[:, :, row, token].to(out.dtype)

    def read(self, role: Role, rows: Tensor, out: Tensor) -> None:
        """Adds where bodies share a token of a static k."""
        row, token, place = (index.to(out.device) for index in self.places[role])
        tokens = rows.flatten(2)[..., place].to(out.dtype)
        if len(out) == 1:
            out[0].index_add_(-1, token, tokens)
        else:
            out.permute(1, 2, 0, 3)[:, :, row, token] = tokens

    def factor(self, part: Bins, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        factor = None
        if any(self.shifts):
            factor = self.frequencies.exponentials(part, self.shifts, dtype, device)
        if self.wraps is not None:
            fold = 1 + self.frequencies.exponentials(part, self.wraps, dtype, device)
            factor = fold if factor is None else fold.mul_(factor)
        return None if factor is None else factor.unsqueeze(2)


RowGroup = WholeRows | Bodies
"""Rows of one transform length."""


def whole_rows(
    length: int,
    lengths: Sequence[int] | None,
    circular: bool,
    shard: SequenceShard | None,
    count: int,
    kernels: int,
    device: torch.device,
) -> list[RowGroup]:
    """One group of all rows. lengths: None if all have the full length."""
    ranks = 1 if shard is None else shard.size
    wraps = None if not circular else lengths if lengths is not None else [length]
    transform, fold = transform_length(length, ranks, wraps)
    if wraps is not None and len(set(wraps)) == 1:
        wraps = wraps[:1]
    bins = frequencies(transform // ranks, shard, device)
    return [WholeRows(bins, shard, length, lengths, count, kernels, wraps if fold else None)]


def bodies(
    segments: Sequence[Sequence[int]],
    circular: bool,
    shard: SequenceShard | None,
    static: bool,
    device: torch.device,
) -> list[RowGroup]:
    """Bodies of like length in one group: their transforms differ by less than a factor of two.

    segments: lengths of the bodies of each row of the first axis, one behind the other.
    """
    ranks = 1 if shard is None else shard.size
    groups: defaultdict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
    for row, lengths in enumerate(segments):
        start = 0
        for length in lengths:
            if length:
                padded = padded_length(length, ranks, circular) // ranks
                local = max(padded, -(-(start % ranks + length) // ranks))
                groups[local.bit_length()].append((row, start, length, local))
            start += length
    found = []
    for size in sorted(groups):
        row, start, length, least = torch.tensor(groups[size]).T
        bins = frequencies(fast_length(int(least.max())), shard, device)
        data = _places(row, start, length, bins)
        found.append(
            Bodies(
                bins,
                {
                    "q": data,
                    "k": _places(row * 0, start * 0, length, bins) if static else data,
                    "u": data,
                },
                len(row),
                [0] * len(row) if static else (start % ranks).tolist(),
                length.tolist() if circular else None,
            )
        )
    return found


def _places(
    row: Tensor, start: Tensor, length: Tensor, bins: Frequencies
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token of the bodies on this rank: row, local token and place in rows · tokens."""
    rank, ranks = bins.rank, bins.ranks
    first = (start - rank + ranks - 1) // ranks
    stop = (start + length - rank + ranks - 1) // ranks
    counts = stop - first
    before = counts.cumsum(0) - counts
    token = torch.arange(int(counts.sum())) + (first - before).repeat_interleave(counts)
    place = torch.arange(len(row)) * bins.tokens - start // ranks
    return row.repeat_interleave(counts), token, token + place.repeat_interleave(counts)
