"""Which tokens of a sequence belong to which rank, and how they change hands."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Literal, get_args

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor

from data_pipeline.batch import GeometricBatch, Sample
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

    @property
    def index(self) -> Int[Tensor, " n"]:
        """Global numbers of this rank's tokens, ascending, on the CPU."""
        return self.index_on("cpu")

    def index_on(self, device: torch.device | str) -> Int[Tensor, " n"]:
        """`index` on another device, made there once; not to be written to."""
        return _numbers(self.tokens_of(self.rank), torch.device(device))

    @property
    def n_local(self) -> int:
        return len(self.tokens_of(self.rank))

    def scatter(self, full: Shaped[Tensor, "*b N"]) -> Shaped[Tensor, "*b n"]:
        """This rank's tokens of a tensor that all ranks hold."""
        if full.shape[-1] != self.length:
            raise ShapeError(f"{self} cannot take its part of {tuple(full.shape)}")
        tokens = self.tokens_of(self.rank)
        return full[..., tokens.start : tokens.stop : tokens.step].clone()

    def gather(self, local: Shaped[Tensor, "*b n"]) -> Shaped[Tensor, "*b N"]:
        """The whole sequence on every rank.

        Differentiable as the stacked copies that it is: if every rank puts the same loss on the
        result, a token's gradient is the sum of all of them.
        """
        if local.shape[-1] != self.n_local:
            raise ShapeError(f"{self} holds {self.n_local} tokens, not {tuple(local.shape)}")
        if self.size == 1:
            return local
        padding = local.new_zeros(*local.shape[:-1], -(-self.length // self.size) - self.n_local)
        shards = all_gather(torch.cat([local, padding], -1), self.group, "gather")
        if self.layout == "cyclic":
            return shards.movedim(0, -1).flatten(-2)[..., : self.length]
        held = [shards[rank][..., : len(self.tokens_of(rank))] for rank in range(self.size)]
        return torch.cat(held, -1)

    def tokens_of(self, rank: int) -> range:
        """Global numbers of a rank's tokens, ascending."""
        if self.layout == "cyclic":
            return range(min(rank, self.length), self.length, self.size)
        return range(self.length * rank // self.size, self.length * (rank + 1) // self.size)


def redistribute(
    x: Shaped[Tensor, "*b n"], source: SequenceShard, target: SequenceShard
) -> Shaped[Tensor, "*b m"]:
    """The same sequence in another layout, by one all-to-all; any dtype, differentiable.

    The host waits for nothing: who gets how many tokens follows from the length alone.

    Raises:
        ShapeError: the shards are of different sequences or groups, or x is not source's.
    """
    if (source.length, source.size) != (target.length, target.size):
        raise ShapeError(f"{source} and {target} are not shards of one sequence")
    if x.shape[-1] != source.n_local:
        raise ShapeError(f"{source} holds {source.n_local} tokens, not {tuple(x.shape)}")
    if source.layout == target.layout or source.size == 1:
        return x
    rows, natural = x.movedim(-1, 0), source if source.layout == "contiguous" else target
    own, cyclic = _counts(source.length, source.rank, source.size)
    order = _sorted_by_rank(natural.tokens_of(natural.rank), natural.size, x.device)
    if natural is source:
        rows = rows.index_select(0, order)
        rows = all_to_all(rows, own, cyclic, source.group, "redistribute")
    else:
        rows = all_to_all(rows, cyclic, own, source.group, "redistribute")
        rows = rows.index_select(0, order.argsort())
    return rows.movedim(0, -1)


def redistribute_batch(
    batch: GeometricBatch, source: SequenceShard, target: SequenceShard
) -> GeometricBatch:
    """A batch in another layout: one exchange for floats, one for integers and booleans."""
    return batch.replace(**_exchange(batch.tensors, source, target))


def redistribute_sample(sample: Sample, source: SequenceShard, target: SequenceShard) -> Sample:
    """A sample in another layout; the targets and weights of tokens travel with the inputs."""
    inputs = sample.inputs.tensors
    moved = _exchange(inputs | sample.token_tensors, source, target)
    batch = sample.inputs.replace(**{name: moved.pop(name) for name in inputs})
    return replace(sample, inputs=batch, **moved)


def _exchange(
    tensors: Mapping[str, Shaped[Tensor, "b ... n"]], source: SequenceShard, target: SequenceShard
) -> dict[str, Tensor]:
    """Redistributes floats as channels of one tensor, and all the others as channels of another."""
    moved = {}
    for floating in (True, False):
        mine = {name: x for name, x in tensors.items() if x.is_floating_point() == floating}
        channels = [x.reshape(len(x), prod(x.shape[1:-1]), x.shape[-1]) for x in mine.values()]
        together = redistribute(torch.cat(channels, 1), source, target)
        each = together.split([x.shape[1] for x in channels], 1)
        for (name, x), part in zip(mine.items(), each, strict=True):
            moved[name] = part.reshape(*x.shape[:-1], target.n_local).to(x.dtype)
    return moved


def previous(x: Tensor, shard: SequenceShard | None) -> Tensor:
    """y_i = x_{i-1}, y_0 = 0, along the last axis; differentiable.

    A cyclic shard's predecessors all live on the rank before: one exchange with the neighbours.
    """
    if x.shape[-1] == 0 and (shard is None or shard.length == 0):
        return x
    if shard is None or shard.size == 1:
        return torch.nn.functional.pad(x, (1, -1))
    index = shard.index
    send = [0] * shard.size
    send[(shard.rank + 1) % shard.size] = int((index + 1 < shard.length).sum())
    receive = [0] * shard.size
    receive[(shard.rank - 1) % shard.size] = int((index > 0).sum())
    rows = x.movedim(-1, 0)[: sum(send)]
    received = all_to_all(rows, send, receive, shard.group, "previous").movedim(0, -1)
    return torch.nn.functional.pad(received, (shard.n_local - received.shape[-1], 0))


@lru_cache(16)
def _numbers(tokens: range, device: torch.device) -> Int[Tensor, " n"]:
    return torch.arange(tokens.start, tokens.stop, tokens.step, device=device)


@lru_cache(16)
def _counts(length: int, rank: int, size: int) -> tuple[list[int], list[int]]:
    """How many of a rank's contiguous tokens are cyclic ones of each rank, and the other way."""

    def shared(contiguous: int, cyclic: int) -> int:
        first, stop = (length * r // size for r in (contiguous, contiguous + 1))
        return len(range(first + (cyclic - first) % size, stop, size))

    ranks = range(size)
    return [shared(rank, other) for other in ranks], [shared(other, rank) for other in ranks]


@lru_cache(16)
def _sorted_by_rank(tokens: range, size: int, device: torch.device) -> Int[Tensor, " n"]:
    """Local places of contiguous tokens in the order of the cyclic ranks that they belong to."""
    return (_numbers(tokens, device) % size).argsort(stable=True)
