"""Where the tokens of a convolution's rows lie, and the phases that put its result in place."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scaling.long_conv.form import Role, fast_length, padded_length, transform_length
from scaling.long_conv.transform import Frequencies
from scaling.parallel.shard import SequenceShard

Tokens = Float[Tensor, "_row channel component n_local"]
Rows = Float[Tensor, "_group_row channel component place"]


class Body(NamedTuple):
    """Tokens start ... start + length - 1 of a row, convolved as a row of their own."""

    row: int
    start: int
    length: int


@dataclass(frozen=True)
class Run:
    """Rows of a group and the tokens of a tensor's rows that they hold."""

    rows: slice
    sources: slice
    """Rows of the tensor."""
    tokens: slice
    """Tokens of the tensor, on this rank."""
    places: slice
    """The same tokens in a row of the group."""


@dataclass
class RowGroup:
    """Bodies that are transformed at one length: what lies in another row cannot leak.

    A body that starts at token s begins in local place s div P of its ranks, as token o = s mod P
    of its row. The product of q and k then begins at token 2o (o for a static k, whose rows begin
    at 0), and a phase brings it back.

    A static k has one row for all where each body may see all of it: where they have one length or
    nothing wraps. Else it has one row a body, cut at the body's length.
    """

    frequencies: Frequencies
    runs: dict[Role, list[Run]]
    count: dict[Role, int]
    """Rows of each role."""
    static: bool
    shifts: list[int]
    """Tokens that the result of each row is moved back by; one number if all are the same."""
    wraps: list[int]
    """Lengths at which each row's result is folded; one if all are the same, none if nothing is."""

    def is_tensor(self, role: Role, rows: int, n_local: int) -> bool:
        """Whether the group's rows of a role are those of its tensor, as they lie."""
        everything = Run(slice(0, rows), slice(0, rows), slice(0, n_local), slice(0, n_local))
        return self.runs[role] == [everything] and self.frequencies.local == n_local

    def fill(self, role: Role, x: Tokens, dtype: torch.dtype) -> Rows:
        """Tokens in rows, with zeros around, whatever else the tensor holds."""
        if self.is_tensor(role, len(x), x.shape[-1]):
            return x.to(dtype)
        shape = (self.count[role], *x.shape[1:3], self.frequencies.local)
        filled = x.new_empty(shape, dtype=dtype)
        for run in self.runs[role]:
            rows = filled[run.rows]
            rows[..., : run.places.start] = 0
            rows[..., run.places] = x[run.sources, ..., run.tokens]
            rows[..., run.places.stop :] = 0
        return filled

    def read(self, role: Role, rows: Rows, out: Tokens) -> None:
        """Puts tokens of rows back; adds where bodies share those of a static k."""
        for run in self.runs[role]:
            tokens = rows[run.rows, ..., run.places]
            goal = out[run.sources, ..., run.tokens]
            goal.add_(tokens) if self.static and role == "k" else goal.copy_(tokens)

    def factor(self, dtype: torch.dtype, device: torch.device) -> Complex[Tensor, "_ _ k"] | None:
        """What the product's spectrum is multiplied with; None: nothing."""
        factor = None
        if any(self.shifts):
            factor = self.frequencies.exponentials(self.shifts, dtype, device)
        if self.wraps:
            fold = 1 + self.frequencies.exponentials(self.wraps, dtype, device)
            factor = fold if factor is None else fold * factor
        return factor


def row_groups(
    bodies: Sequence[Sequence[int]],
    circular: bool,
    static: bool,
    shard: SequenceShard | None,
) -> list[RowGroup]:
    """Bodies of like length in one group: their transforms differ by less than a factor of two.

    bodies: their lengths in each row of the first axis, one behind the other.
    """
    rank, ranks = (0, 1) if shard is None else (shard.rank, shard.size)
    groups: defaultdict[int, list[Body]] = defaultdict(list)
    for row, lengths in enumerate(bodies):
        start = 0
        for length in lengths:
            if length:
                groups[padded_length(length, ranks, circular).bit_length()].append(
                    Body(row, start, length)
                )
            start += length
    return [_group(groups[size], circular, static, rank, ranks) for size in sorted(groups)]


def _group(bodies: list[Body], circular: bool, static: bool, rank: int, ranks: int) -> RowGroup:
    shifts = [body.start % ranks for body in bodies]
    lengths = sorted({body.length for body in bodies})
    wraps = [body.length for body in bodies] if circular else None
    if any(shifts):
        total, fold = padded_length(lengths[-1], ranks, circular), circular
    else:
        total, fold = transform_length(lengths[-1], ranks, wraps)
    beyond = max(-(-(s + b.length) // ranks) for s, b in zip(shifts, bodies, strict=True))
    local = total // ranks if total // ranks >= beyond else fast_length(beyond)
    data = _runs(bodies, rank, ranks)
    shared = static and (len(lengths) == 1 or not circular)
    kernels = lengths[-1:] if shared else [body.length for body in bodies]
    kernel = _runs([Body(0, 0, length) for length in kernels], rank, ranks) if static else data
    return RowGroup(
        Frequencies(local, rank, ranks),
        {"q": data, "k": kernel, "u": data},
        {"q": len(bodies), "k": len(kernels), "u": len(bodies)},
        static,
        _alike([0] if static else shifts),
        _alike(wraps or []) if fold else [],
    )


def _alike(numbers: list[int]) -> list[int]:
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def _runs(bodies: list[Body], rank: int, ranks: int) -> list[Run]:
    """Where the bodies' tokens on this rank lie; neighbouring rows that are alike make one run."""
    runs = []
    alike = groupby(enumerate(bodies), lambda pair: (pair[1].row - pair[0], *pair[1][1:]))
    for (above, start, length), members in alike:
        numbers = [number for number, _ in members]
        rows = slice(numbers[0], numbers[-1] + 1)
        sources = slice(rows.start + above, rows.stop + above)
        first, stop = (-(-(edge - rank) // ranks) for edge in (start, start + length))
        before = start // ranks
        runs.append(Run(rows, sources, slice(first, stop), slice(first - before, stop - before)))
    return runs
