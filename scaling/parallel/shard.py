"""Which tokens of a sequence belong to which rank, and how they change hands."""

from functools import cached_property
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError, ShapeError
from scaling.parallel.collectives import Group, all_gather, all_to_all, group_rank, group_size

Layout = Literal["cyclic", "contiguous"]


class SequenceShard:
    """One rank's share of a sequence of `length` tokens; any length, any number of ranks.

    cyclic: rank r of P holds tokens r, r+P, r+2P, ...: long convolutions need few exchanges and the
    work is balanced. contiguous: rank r holds [N·r//P, N·(r+1)//P): files and neighbours.

    Args:
        length: tokens of the whole (padded) sequence, N.
        group: ranks that share the sequence; None is the world if torch.distributed is initialised,
            else this process alone.
        layout: "cyclic" or "contiguous".

    Raises:
        ConfigError: negative length, unknown layout, or this process is not in the group.
    """

    def __init__(self, length: int, group: Group = None, layout: Layout = "cyclic") -> None:
        if length < 0:
            raise ConfigError(f"a sequence cannot have {length} tokens")
        if layout not in get_args(Layout):
            raise ConfigError(f"unknown layout {layout!r}; use one of {get_args(Layout)}")
        if group is not None and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ConfigError("this rank is not in the shard's group; build the shard on its ranks")
        self.length = length
        self.group = group
        self.layout: Layout = layout
        self.rank = group_rank(group)
        self.size = group_size(group)

    def __repr__(self) -> str:
        return f"SequenceShard({self.length}, rank {self.rank} of {self.size}, {self.layout})"

    @cached_property
    def index(self) -> Tensor:
        """Global numbers of this rank's tokens, ascending: (n_local,), on the CPU."""
        return self._tokens(self.rank)

    @property
    def n_local(self) -> int:
        return len(self.index)

    def scatter(self, full: Tensor) -> Tensor:
        """This rank's tokens of a tensor that all ranks hold: (..., N) -> (..., n_local)."""
        if full.shape[-1] != self.length:
            raise ShapeError(f"{self} cannot take its part of {tuple(full.shape)}")
        return full[..., self.index.to(full.device)]

    def gather(self, local: Tensor) -> Tensor:
        """The whole sequence on every rank: (..., n_local) -> (..., N).

        Differentiable as the stacked copies that it is: if every rank puts the same loss on the
        result, a token's gradient is the sum of all of them.
        """
        if local.shape[-1] != self.n_local:
            raise ShapeError(f"{self} holds {self.n_local} tokens, not {tuple(local.shape)}")
        if self.size == 1:
            return local
        longest = -(-self.length // self.size)
        padding = local.new_zeros(*local.shape[:-1], longest - self.n_local)
        shards = all_gather(torch.cat([local, padding], -1), self.group, "gather")
        tokens = [self._tokens(rank) for rank in range(self.size)]
        parts = [shards[rank][..., : len(tokens[rank])] for rank in range(self.size)]
        places = torch.argsort(torch.cat(tokens)).to(local.device)
        return torch.cat(parts, -1)[..., places]

    def owner(self, tokens: Tensor) -> Tensor:
        """The rank that holds each of the given global token numbers."""
        if self.layout == "cyclic":
            return tokens % self.size
        bounds = torch.tensor([self.length * (r + 1) // self.size for r in range(self.size)])
        return torch.searchsorted(bounds, tokens, right=True)

    def _tokens(self, rank: int) -> Tensor:
        if self.layout == "cyclic":
            return torch.arange(min(rank, self.length), self.length, self.size)
        return torch.arange(self.length * rank // self.size, self.length * (rank + 1) // self.size)


def redistribute(x: Tensor, source: SequenceShard, target: SequenceShard) -> Tensor:
    """The same sequence in another layout, by one all-to-all; differentiable.

    x: (..., source.n_local) of any dtype -> (..., target.n_local).

    Raises:
        ShapeError: the shards are of different sequences or groups, or x is not source's.
    """
    if (source.length, source.size) != (target.length, target.size):
        raise ShapeError(f"{source} and {target} are not shards of one sequence")
    if x.shape[-1] != source.n_local:
        raise ShapeError(f"{source} holds {source.n_local} tokens, not {tuple(x.shape)}")
    if source.layout == target.layout or source.size == 1:
        return x
    send, send_counts = _by_rank(target.owner(source.index), source.size)
    arrive, receive_counts = _by_rank(source.owner(target.index), source.size)
    rows = x.movedim(-1, 0)[send.to(x.device)]
    received = all_to_all(rows, send_counts, receive_counts, source.group, "redistribute")
    return received[torch.argsort(arrive).to(x.device)].movedim(0, -1)


def redistribute_batch(
    batch: GeometricBatch, source: SequenceShard, target: SequenceShard
) -> GeometricBatch:
    """Every field of a batch in another layout: one exchange for numbers, one for the rest."""
    points, vectors, scalars = _together(
        [batch.points, batch.vectors, batch.scalars], source, target
    )
    index, mask, segment = _together(
        [x.long().unsqueeze(1) for x in (batch.index, batch.mask, batch.segment)], source, target
    )
    return GeometricBatch(
        points,
        vectors,
        scalars,
        index.squeeze(1),
        mask.squeeze(1).bool(),
        segment.squeeze(1),
        batch.lengths,
        batch.bodies,
    )


def _together(tensors: list[Tensor], source: SequenceShard, target: SequenceShard) -> list[Tensor]:
    """Redistributes tensors (b, ..., n) of one dtype as channels of one."""
    channels = [x.flatten(1, -2) for x in tensors]
    moved = redistribute(torch.cat(channels, 1), source, target)
    parts = moved.split([x.shape[1] for x in channels], 1)
    return [
        part.reshape(*x.shape[:-1], target.n_local) for part, x in zip(parts, tensors, strict=True)
    ]


def _by_rank(owners: Tensor, size: int) -> tuple[Tensor, list[int]]:
    """Places sorted by the rank that owns them, stable, and how many each rank owns."""
    return torch.argsort(owners, stable=True), torch.bincount(owners, minlength=size).tolist()
