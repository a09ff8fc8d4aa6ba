"""A local branch: messages between tokens that are near in space, and a body's context tokens.

    m_ij = silu(W silu(A f_i + B f_j + c log(1 + |p_i - p_j|²) + b) + b')
    f_i <- f_i + F mean_j m_ij,   x_i <- x_i + mean_j (p_i - p_j) / (1 + |p_i - p_j|) G m_ij
    f_i <- f_i + C u_i,           u by attention to context tokens, which attend to all f

p are the centred points of the input; j runs over the k nearest tokens of i's body, or over all of
its tokens. Messages are EGNN's (arXiv 2102.09844), with a bounded push. Geometric Hyena (arXiv
2505.22560) is said to project its queries, keys and values in this way; that is second-hand, and
here the branch stands once before the first block.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.algebra.norms import smooth_sqrt
from scaling.models.layers import ChannelLinear
from scaling.ops.latents import BodyLatents
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.neighbours import find_neighbours
from scaling.ops.pairs import PairTerms, all_pairs
from scaling.ops.tiles import Tiled
from scaling.parallel.shard import SequenceShard, redistribute, redistribute_batch
from scaling.work import work_counter

Messages = Literal["none", "pairs", "neighbours"]
Scalars = Float[Tensor, "b c n"]
Vectors = Float[Tensor, "b v 3 n"]
Streams = tuple[Scalars, Vectors]


class LocalMessages(Tiled):
    """
    Args:
        channels: of both streams.
        kind: "pairs", O(N²) time, or "neighbours".
        neighbours: of each token, at most.
    """

    def __init__(self, channels: int, kind: Messages, neighbours: int) -> None:
        super().__init__()
        self.kind, self.neighbours = kind, neighbours
        self.own = ChannelLinear(channels, channels, bias=True)
        self.other = ChannelLinear(channels, channels)
        self.inner = ChannelLinear(channels, channels)
        self.bias = nn.Parameter(torch.zeros(channels, 1))
        self.distance = nn.Parameter(torch.randn(channels))
        self.read_scalars = ChannelLinear(channels, channels)
        self.push = ChannelLinear(channels, channels)

    def forward(self, f: Scalars, x: Vectors, batch: GeometricBatch, rows: MaskedRows) -> Streams:
        points, _ = rows.centre(rows.zero_invalid(batch.points))
        run = self.of_pairs if self.kind == "pairs" else self.of_neighbours
        sums = run(f, points, batch, rows)
        df, dx = sums.split([f.shape[1], 3 * f.shape[1]], 1)
        return f + self.read_scalars(df), x + dx.unflatten(1, (-1, 3))

    def of_pairs(
        self, f: Scalars, points: Float[Tensor, "b 3 n"], batch: GeometricBatch, rows: MaskedRows
    ) -> Float[Tensor, "b m n"]:
        own, other, p = (t.unsqueeze(1) for t in (self.own(f), self.other(f), points))
        shared = [self.distance, self.inner.weight, self.bias, self.push.weight]
        u = all_pairs(MessagePairs(), [own, p], [other, p], rows, shared)
        return rows.length_to(-1.0, f) * u.squeeze(1)

    def of_neighbours(
        self, f: Scalars, points: Float[Tensor, "b 3 n"], batch: GeometricBatch, rows: MaskedRows
    ) -> Float[Tensor, "b m n"]:
        """In contiguous shards: one exchange there, and one back."""
        shard, own = rows.shard, None
        tokens = torch.cat([f, points], 1)
        if shard is not None:
            own = SequenceShard(shard.length, shard.group, "contiguous")
            tokens, batch = redistribute(tokens, shard, own), redistribute_batch(batch, shard, own)
        if counter := work_counter():
            counter.redistributed(tokens)
        f, points = tokens.split([f.shape[1], 3], 1)
        neighbours = find_neighbours(batch.points, MaskedRows.of(batch, own), self.neighbours)
        theirs = neighbours.gather(self.other(f), points)
        (means,) = self.in_tiles(self.of_edges, self.own(f), points, *theirs, neighbours.valid)
        if counter := work_counter():
            counter.redistributed(means)
        return means if shard is None or own is None else redistribute(means, own, shard)

    def of_edges(
        self,
        own: Scalars,
        points: Float[Tensor, "b 3 n"],
        other: Float[Tensor, "b c k n"],
        theirs: Float[Tensor, "b 3 k n"],
        valid: Tensor,
    ) -> tuple[Float[Tensor, "b m n"]]:
        apart = points.unsqueeze(2) - theirs
        weights = (self.distance, self.inner.weight, self.bias, self.push.weight)
        w = valid / valid.sum(1, keepdim=True).clamp(min=1)
        both = message(own.unsqueeze(2), other, apart, *weights)
        return ((w.to(own.dtype).unsqueeze(1) * both).sum(2),)


class MessagePairs(PairTerms):
    """Messages and pushes of all pairs, added up."""

    def weighted(
        self,
        w: Float[Tensor, "b h i j"],
        q: Sequence[Tensor],
        k: Sequence[Tensor],
        shared: Sequence[Tensor],
    ) -> Float[Tensor, "b h d i"]:
        (own, p), (other, theirs) = ([t.squeeze(1) for t in some] for some in (q, k))
        apart = p.unsqueeze(3) - theirs.unsqueeze(2)
        distance, inner, bias, push = shared
        both = message(own.unsqueeze(3), other.unsqueeze(2), apart, distance, inner, bias, push)
        return (w * both).sum(3).unsqueeze(1)


def message(
    own: Float[Tensor, "b c #i #j"],
    other: Float[Tensor, "b c #i #j"],
    apart: Float[Tensor, "b 3 i j"],
    distance: Float[Tensor, " c"],
    inner: Float[Tensor, "c c"],
    bias: Float[Tensor, "c 1"],
    push: Float[Tensor, "c c"],
) -> Float[Tensor, "b m i j"]:
    """m_ij, and behind it the push of each channel."""
    squares = apart.square().sum(1, keepdim=True)
    m = own + other + distance.view(-1, 1, 1) * torch.log1p(squares)
    silu = nn.functional.silu
    m = silu(inner @ silu(m).flatten(2) + bias)
    pushes = (push @ m).unflatten(2, apart.shape[2:])
    way = apart / (1 + smooth_sqrt(squares))
    pushes = (pushes.unsqueeze(2) * way.unsqueeze(1)).flatten(1, 2)
    return torch.cat([m.unflatten(2, apart.shape[2:]), pushes], 1)


class ContextTokens(nn.Module):
    """Tokens attend to a body's context tokens, which have attended to all of its tokens."""

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, channels) / channels**0.5)
        self.keys, self.values, self.asks, self.out = (
            ChannelLinear(channels, channels) for _ in range(4)
        )

    def forward(self, f: Scalars, rows: MaskedRows) -> Scalars:
        bodies = BodyLatents(rows)
        start = bodies.mean(f)[:, None, None]  # one head, every latent
        q = self.queries[None, None, :, :, None] + start
        z = bodies.learn(q, self.keys(f).unsqueeze(1), self.values(f).unsqueeze(1))
        u = bodies.tell(self.asks(f).unsqueeze(1) / f.shape[1] ** 0.5, z, z)
        return f + rows.zero_invalid(self.out(u.squeeze(1)))
