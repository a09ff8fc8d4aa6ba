"""Sums, means and lengths over the valid tokens of bodies and rows, and the previous token.

A row is one body, or several that do not see each other. With a shard, sums are global: every rank
gets the same number for a body, and gradients flow back to the tokens of all ranks; any number of
bodies takes as many exchanges as one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from data_pipeline.batch import GeometricBatch
from scaling.parallel.collectives import all_reduce_max, all_reduce_sum
from scaling.parallel.shard import SequenceShard
from scaling.parallel.shard import previous as sharded_previous
from scaling.work import work_counter

_BEHIND = torch.iinfo(torch.long).max
"""A place that no token has."""


@dataclass
class MaskedRows:
    """Which local tokens are valid, and what is computed over all of a body's or a row's."""

    mask: Bool[Tensor, "b n"]
    shard: SequenceShard | None = None
    known_lengths: Sequence[int] | None = None
    """Tokens of each whole row, where they are known; else the mask tells, and the host waits."""
    bodies: Sequence[Sequence[int]] | None = None
    """For each whole row the lengths of its bodies, in order. None: one body a row."""
    _valid: Int[Tensor, "b ..."] | None = field(default=None, init=False)
    """Counts, once exchanged. Not by cached_property: under its lock, which all instances share in
    Python 3.11, ranks that are threads would wait for each other."""

    @classmethod
    def of(cls, batch: GeometricBatch, shard: SequenceShard | None) -> "MaskedRows":
        """Those of a batch; rows of one body each need no list of bodies."""
        several = batch.bodies is not None and any(len(row) > 1 for row in batch.bodies)
        return cls(batch.mask, shard, batch.lengths, batch.bodies if several else None)

    def repeated(self, times: int) -> "MaskedRows":
        """The same rows, that many times one after the other."""
        bodies = None if self.bodies is None else [*self.bodies] * times
        return MaskedRows(self.mask.repeat(times, 1), self.shard, self.lengths * times, bodies)

    def zero_invalid(self, x: Shaped[Tensor, "b ... n"]) -> Shaped[Tensor, "b ... n"]:
        """x with 0 at tokens that are not valid, whatever they hold."""
        return zero_invalid(x, self.mask)

    def sum(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ..."]:
        """Sum over the valid tokens of the whole row."""
        return self._all_ranks(self.zero_invalid(x).sum(-1))

    def mean(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ..."]:
        """Mean over the valid tokens of the whole row; 0 for a row without any."""
        return _over(self.sum(x), self._row_counts())

    def body_mean(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ... #n"]:
        """Mean over the valid tokens of each token's own body, (..., 1) where rows are one body."""
        if self.bodies is None:
            return _over(self.sum(x), self._counts).unsqueeze(-1)
        return self._at_tokens(_over(self._sums(self.zero_invalid(x)), self._counts))

    def centre(self, x: Float[Tensor, "b ... n"]) -> tuple[Tensor, Tensor]:
        """x without the mean over its body, 0 at tokens that are not valid, and that mean.

        Done twice: a mean far from 0 is rounded, and what that leaves is the same in all tokens.
        """
        first = self.body_mean(x)
        rest = self.zero_invalid(x - first)
        second = self.body_mean(rest)
        return self.zero_invalid(rest - second), first + second

    def centred_inputs(self, batch: GeometricBatch) -> Float[Tensor, "b v 3 n"]:
        """Points without the mean over their body, then the vectors; 0 where not valid."""
        inputs = self.zero_invalid(torch.cat([batch.points.unsqueeze(1), batch.vectors], 1))
        centred, _ = self.centre(inputs[:, 0])
        return torch.cat([centred.unsqueeze(1), inputs[:, 1:]], 1)

    def moved(
        self,
        batch: GeometricBatch,
        step: Float[Tensor, "b v 3 n"],
        change: Float[Tensor, "b s n"],
    ) -> GeometricBatch:
        """The batch with its points and vectors moved by `step`, its scalars by `change`, all 0 at
        tokens that are not valid."""
        return batch.replace(
            points=self.zero_invalid(batch.points) + step[:, 0],
            vectors=self.zero_invalid(batch.vectors) + step[:, 1:],
            scalars=self.zero_invalid(batch.scalars) + change,
        )

    def standardise(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ... n"]:
        """x with mean 0 and rms 1 over its body, 0 at tokens that are not valid; what does not
        differ within a body becomes 0."""
        centred, _ = self.centre(x)
        return centred * (self.body_mean(centred.square()) + 1e-12).rsqrt()

    def previous(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ... n"]:
        """Each token's predecessor's valid value; 0 where there is none in its body."""
        return self.shifted(self.zero_invalid(x))

    def shifted(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ... n"]:
        """Each token's predecessor's value, valid or not; 0 where there is none in its body."""
        if counter := work_counter():
            counter.shift(x)
        before = sharded_previous(x, self.shard)
        if self.bodies is None:
            return before
        return before.masked_fill(_as_tokens(self.places == 0, before), 0)

    @property
    def places(self) -> Int[Tensor, "b n"]:
        """Of each token, in its body."""
        if self.bodies is None:
            return self.index.expand(self.mask.shape)
        starts = [[sum(row[:body]) for body in range(len(row))] for row in self.bodies]
        return self.index - self._of_bodies(starts, 0).gather(1, self._body)

    def length_to(self, power: float, like: Tensor) -> Float[Tensor, "b 1 #n"]:
        """The length of each token's body to that power, of `like`'s dtype and device."""
        if self.bodies is None:
            powers = [max(n, 1) ** power for n in self.lengths]
            return _on_device(powers, like.dtype, like).view(-1, 1, 1)
        by_body = [[max(n, 1) ** power for n in row] for row in self.bodies]
        return self._of_bodies(by_body, 0, like.dtype).gather(1, self._body).unsqueeze(1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Length of each row. Where it is not known, its last valid token's place plus one, gaps
        inside counted: then the host waits for the device."""
        if self.known_lengths is None:
            self.known_lengths = self._measured_lengths()
        return tuple(self.known_lengths)

    def _measured_lengths(self) -> tuple[int, ...]:
        places = torch.where(self.mask, self.index + 1, 0)
        last = places.amax(-1) if places.shape[-1] else places.new_zeros(len(places))
        if self.shard is not None:
            last = all_reduce_max(last, self.shard.group, "lengths")
        return tuple(last.tolist())

    @property
    def spans(self) -> dict[str, Any]:
        """What a long convolution is told of the rows: their bodies, or their lengths."""
        if self.bodies is not None:
            return {"shard": self.shard, "bodies": self.bodies}
        return {"shard": self.shard, "lengths": self.lengths}

    @property
    def _counts(self) -> Int[Tensor, "b ..."]:
        """Valid tokens of each row, or of each of its bodies."""
        if self._valid is None:
            several = self.bodies is not None
            self._valid = self._sums(self.mask.long()) if several else self._row_counts()
        return self._valid

    def _row_counts(self) -> Int[Tensor, " b"]:
        return self._all_ranks(self.mask.sum(-1))

    @cached_property
    def index(self) -> Int[Tensor, " n"]:
        """Place of each local token in the whole rows."""
        if self.shard is None:
            return torch.arange(self.mask.shape[-1], device=self.mask.device)
        return self.shard.index_on(self.mask.device)

    @cached_property
    def _most(self) -> int:
        """Bodies of the row that has most."""
        return max((len(row) for row in self.bodies or ()), default=0)

    @cached_property
    def _body(self) -> Int[Tensor, "b n"]:
        return self.body_at(self.index)

    def body_at(self, places: Int[Tensor, " n"]) -> Int[Tensor, "b n"]:
        """Number of the body at these places in each row; behind the last one is one more."""
        assert self.bodies is not None
        ends = [[*accumulate(row)] for row in self.bodies]
        everywhere = places.expand(len(ends), -1).contiguous()
        return torch.searchsorted(self._of_bodies(ends, _BEHIND), everywhere, right=True)

    def _of_bodies(
        self,
        values: Sequence[Sequence[int | float]],
        rest: int | float,
        dtype: torch.dtype = torch.long,
    ) -> Shaped[Tensor, "b m"]:
        """A number for each body of each row, and `rest` for those that a row lacks and for what
        lies behind its last one."""
        full = [[*row, *[rest] * (self._most + 1 - len(row))] for row in values]
        return _on_device(full, dtype, self.mask)

    def _sums(self, x: Shaped[Tensor, "b ... n"]) -> Shaped[Tensor, "b ... m"]:
        """Sums over each body, of all ranks."""
        total = x.new_zeros(*x.shape[:-1], self._most + 1)
        return self._all_ranks(total.scatter_add(-1, _as_tokens(self._body, x), x))

    def _at_tokens(self, values: Shaped[Tensor, "b ... m"]) -> Shaped[Tensor, "b ... n"]:
        """Each token's body's number."""
        return values.gather(-1, _as_tokens(self._body, values))

    def _all_ranks(self, total: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        if counter := work_counter():
            counter.row_sum(total)
        return total if self.shard is None else all_reduce_sum(total, self.shard.group, "sum")


def zero_invalid(
    x: Shaped[Tensor, "b ... n"], mask: Bool[Tensor, "b n"]
) -> Shaped[Tensor, "b ... n"]:
    """x with 0 at tokens that are not valid, whatever they hold."""
    return x.masked_fill(_as_tokens(~mask, x), 0)


def _as_tokens(values: Shaped[Tensor, "b n"], x: Shaped[Tensor, "b ..."]) -> Tensor:
    """A number a token, alike for all channels of x: (b, 1, ..., n), or expanded to (b, ..., n)."""
    rows, n = values.shape
    view = values.reshape(rows, *[1] * (x.ndim - 2), n)
    return view if values.dtype == torch.bool else view.expand(*x.shape[:-1], n)


def _over(total: Float[Tensor, "b ..."], counts: Int[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """total / counts, 0 where nothing is counted; counts (b,) or (b, m) for total (b, ..., m)."""
    rows, *bodies = counts.shape
    shape = (rows, *[1] * (total.ndim - 1 - len(bodies)), *bodies)
    return total / counts.clamp(min=1).to(total.dtype).reshape(shape)


def _on_device(values: Sequence[Any], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Numbers of the host as a tensor beside `like`, without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype)
    if like.device.type == "cuda":  # from other memory the host would wait for the copy
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)
