"""Sums, means and lengths over the valid tokens of whole rows, and the previous token.

With a shard they are global: every rank gets the same number for a row, and gradients flow back to
the tokens of all ranks.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scaling.parallel.collectives import all_reduce_max, all_reduce_sum
from scaling.parallel.shard import SequenceShard
from scaling.parallel.shift import previous as sharded_previous


@dataclass
class MaskedRows:
    """Which local tokens are valid, and what is computed over all of a row's."""

    mask: Bool[Tensor, "b n"]
    shard: SequenceShard | None = None

    def zero_invalid(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ... n"]:
        """x with 0 at tokens that are not valid, whatever they hold."""
        return zero_invalid(x, self.mask)

    def sum(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ..."]:
        """Sum over the valid tokens of the whole row."""
        total = self.zero_invalid(x).sum(-1)
        return total if self.shard is None else all_reduce_sum(total, self.shard.group, "sum")

    def mean(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ..."]:
        """Mean over the valid tokens of the whole row; 0 for a row without any."""
        total = self.sum(x)
        return total / self.counts.clamp(min=1).to(x.dtype).reshape(-1, *[1] * (total.ndim - 1))

    def centre(self, x: Float[Tensor, "b ... n"]) -> tuple[Tensor, Tensor]:
        """x without the mean over its row, 0 at tokens that are not valid, and the mean (..., 1).

        Done twice: a mean far from 0 is rounded, and what that leaves is the same in all tokens.
        """
        first = self.mean(x).unsqueeze(-1)
        rest = self.zero_invalid(x - first)
        second = self.mean(rest).unsqueeze(-1)
        return self.zero_invalid(rest - second), first + second

    def standardise(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ... n"]:
        """x with mean 0 and rms 1 over its row, 0 at tokens that are not valid; what does not
        differ within a row becomes 0."""
        centred, _ = self.centre(x)
        return centred * (self.mean(centred.square()) + 1e-12).rsqrt().unsqueeze(-1)

    @cached_property
    def counts(self) -> Int[Tensor, " b"]:
        """Valid tokens of each row."""
        count = self.mask.sum(-1)
        return count if self.shard is None else all_reduce_sum(count, self.shard.group, "sum")

    @cached_property
    def lengths(self) -> Int[Tensor, " b"]:
        """Length of each row: its last valid token's place, plus one; gaps inside count."""
        shard = self.shard
        index = torch.arange(self.mask.shape[-1]) if shard is None else shard.index
        places = torch.where(self.mask, index.to(self.mask.device) + 1, 0)
        last = places.amax(-1) if places.shape[-1] else places.new_zeros(len(places))
        return last if shard is None else all_reduce_max(last, shard.group, "lengths")

    def previous(self, x: Float[Tensor, "b ... n"]) -> Float[Tensor, "b ... n"]:
        """Each token's predecessor's valid value; 0 where there is none."""
        return sharded_previous(self.zero_invalid(x), self.shard)


def zero_invalid(
    x: Float[Tensor, "b ... n"], mask: Bool[Tensor, "b n"]
) -> Float[Tensor, "b ... n"]:
    """x with 0 at tokens that are not valid, whatever they hold."""
    rows, n = mask.shape
    return x.masked_fill(~mask.reshape(rows, *[1] * (x.ndim - 2), n), 0)
