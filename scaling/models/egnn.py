"""EGNN: messages between neighbours, by distances, which push along differences of positions.

Satorras, Hoogeboom and Welling, arXiv 2102.09844, with velocities (their section 3.2), in the form
of their code for n-body systems. With a_ij the attributes of an edge,

    m_ij = phi_e(h_i, h_j, |x_i - x_j|², a_ij)
    x_i <- x_i + mean_j (x_i - x_j) phi_x(m_ij) + phi_v(h_i) v_i
    h_i <- h_i + phi_h(h_i, sum_j m_ij)

over i's neighbours j: the k nearest in the input, within a radius if there is one. v is the input's
velocity in every layer; h begins with the norms of the input's vectors and its scalars, a_ij holds
|x_i - x_j|² of the input. phi_x ends in weights of a thousandth of the usual size
(`coordinates_gain`), so that points hardly move at first. 4 layers of width 64 have the published
code's 134,020 parameters for its n-body input (`points_only`, `charges`).

What is more here: vectors w, each as the points are moved, by phi_x and phi_v of their own,

    w_i <- w_i + mean_j (x_i - x_j) phi_w(m_ij) + sum of phi_vw(h_i) v_i over all velocities

and scalars, by a linear map of the last h. With `virtual_nodes` it is FastEGNN: phi_h also reads
what a token hears of its body's virtual nodes, and these push it, too (virtual_nodes.py beside).

Known slips, and what is done here:

- The paper's Eq. 4 divides by M - 1, all others, whatever the neighbours; its code takes the mean
  over neighbours for positions and the sum for features. As the code.
- Its code cuts each *component* of a pair's push at ±100, which turns with the axes. Here the push
  is shortened to a length of 100. Neither happens in training that goes well.
- The n-body code has no edge for a charge alone: charges enter as products q_i q_j (`charges`), the
  only node feature is the speed.
- FastEGNN's code takes the mean of m_ij also for features; here it is EGNN's sum.
- DistEGNN drops edges between ranks, so that its answer depends on their number. Here it does not.
- In FastEGNN's code nothing reads the last update of the virtual nodes; here there is none.
- The package egnn-pytorch 0.2.8 counts every token as its own neighbour (m_ii is in the sum), adds
  up pushes where the paper takes their mean, and has no velocities.
"""

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.algebra.norms import smooth_sqrt
from scaling.models.layers import Linear, mlp
from scaling.models.protocol import Channels, Model
from scaling.models.virtual_nodes import Moved, Scalars, Vectors, VirtualNodes, state_at_centroid
from scaling.ops.masked_rows import MaskedRows, zero_invalid
from scaling.ops.neighbours import Neighbours, find_neighbours
from scaling.ops.offload import offloading
from scaling.ops.tiles import Tiled
from scaling.parallel.shard import Layout, SequenceShard

LONGEST_PUSH = 100.0


class EGNN(Model):
    """
    Args:
        vectors: free vector channels of the input: the velocities.
        scalars: scalar channels of the input.
        neighbours: of each token, at most; the nearest of its body.
        radius: no neighbour is farther; None: however far.
        layers, hidden: how many, and channels of h and inside.
        virtual_nodes: of each body; 0: none.
        coordinates_gain: of the last weights of what pushes points.
        charges: scalars enter as products of pairs on the edges, instead of as features of tokens.
        points_only: vectors and scalars stay as they are.
    """

    layout: Layout = "contiguous"
    width = "hidden"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        neighbours: Annotated[int, Ge(1)] = 16,
        radius: Annotated[float, Gt(0)] | None = None,
        layers: Annotated[int, Ge(1)] = 4,
        hidden: Annotated[int, Ge(1)] = 64,
        virtual_nodes: Annotated[int, Ge(0)] = 0,
        coordinates_gain: float = 0.001,
        charges: bool = False,
        points_only: bool = False,
    ) -> None:
        super().__init__(vectors, scalars)
        self.neighbours, self.radius, self.charges = neighbours, radius, charges
        self.virtual_nodes = virtual_nodes
        features = vectors + scalars * (not charges)
        self.moved = 1 if points_only else 1 + vectors
        self.embed = Linear(max(features, 1), hidden)
        self.layers = nn.ModuleList()
        for layer in range(layers):
            nodes = None
            if virtual_nodes:
                sizes = (hidden, virtual_nodes, self.moved, coordinates_gain)
                nodes = VirtualNodes(*sizes, first=layer == 0, updated=layer < layers - 1)
            edges = 1 + scalars * charges
            self.layers.append(
                EGNNLayer(hidden, edges, vectors, self.moved, nodes, coordinates_gain)
            )
        answers = scalars * (not points_only)
        self.read_scalars = Linear(hidden, answers) if answers else None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "neighbours": 4,
            "layers": 2,
            "hidden": 6,
            "virtual_nodes": 2,
            "coordinates_gain": 1.0,
        }

    def move(self, batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
        rows = MaskedRows.of(batch, shard)
        points, v, s = map(rows.zero_invalid, (batch.points, batch.vectors, batch.scalars))
        neighbours = find_neighbours(points, rows, self.neighbours, self.radius)
        with offloading(self.execution):
            (h,) = self.in_tiles(self.enter, v, s, batch.mask)
            edges = self.edges(points, s, neighbours)
            w = torch.stack([torch.zeros_like(points)] * self.moved, 1)
            nodes = ()
            if self.virtual_nodes:
                nodes = state_at_centroid(points, rows, self.virtual_nodes, h.shape[1])
            for layer in self.layers:
                h, w, *nodes = layer(h, w, v, *edges, neighbours, rows, *nodes)
        if self.moved > 1:
            v = v + w[:, 1:]
        if self.read_scalars is not None:
            s = s + rows.zero_invalid(self.read_scalars(h))
        return batch.replace(points=points + w[:, 0], vectors=v, scalars=s)

    def enter(
        self, v: Vectors, s: Float[Tensor, "b s n"], mask: Bool[Tensor, "b n"]
    ) -> tuple[Scalars]:
        """The first features: norms of vectors, and scalars; where there is none, 1."""
        features = [smooth_sqrt(v.square().sum(2))] + [s] * (not self.charges)
        features = torch.cat(features, 1)
        if not features.shape[1]:
            features = mask.unsqueeze(1).to(features.dtype)
        return (zero_invalid(self.embed(features), mask),)

    def edges(
        self, points: Float[Tensor, "b 3 n"], s: Scalars, neighbours: Neighbours
    ) -> tuple[Float[Tensor, "b 3 k n"], Float[Tensor, "b e k n"]]:
        """x_i - x_j of the input, and attributes."""
        others, charges = neighbours.gather(points, s[:, : s.shape[1] * self.charges])
        apart = points.unsqueeze(2) - others
        products = s[:, : charges.shape[1]].unsqueeze(2) * charges
        return apart, torch.cat([products, apart.square().sum(1, keepdim=True)], 1)


class EGNNLayer(Tiled):
    """One layer, on displacements w of the points and vectors from the input."""

    def __init__(
        self,
        hidden: int,
        edges: int,
        velocities: int,
        moved: int,
        virtual: VirtualNodes | None,
        gain: float,
    ) -> None:
        super().__init__()
        c = hidden
        self.first = EdgeLinear(c, 1 + edges, c)
        self.phi_e = nn.Sequential(nn.SiLU(), Linear(c, c), nn.SiLU())
        self.phi_x = mlp(c, c, moved, gain)
        self.phi_v = mlp(c, c, moved * velocities) if velocities else None
        self.phi_h = mlp((2 + (virtual.nodes if virtual else 0)) * c, c, c)
        self.virtual = virtual

    def forward(
        self,
        h: Scalars,
        w: Moved,
        v: Vectors,
        apart: Float[Tensor, "b 3 k n"],
        attributes: Float[Tensor, "b e k n"],
        neighbours: Neighbours,
        rows: MaskedRows,
        *nodes: Tensor,
    ) -> tuple[Tensor, ...]:
        def layer(*tensors: Tensor) -> tuple[Tensor, ...]:
            h, w, v, apart, attributes, *nodes = tensors
            own, other = self.first.halves(h)
            theirs = neighbours.gather(other, w[:, 0])
            edges = (*theirs, apart, attributes, neighbours.valid)
            sums, push = self.in_tiles(self.messages, own, w, *edges)
            if self.virtual is None:
                return self.in_tiles(self.update, h, w, v, push, rows.mask, sums)
            nodes = self.virtual.entered(nodes)
            heard, further, *pull = self.in_tiles(self.virtual.to_tokens, h, w, *nodes)
            h, w = self.in_tiles(self.update, h, w, v, push + further, rows.mask, sums, heard)
            return h, w, *self.virtual.next_state(w, nodes, rows, heard, *pull)

        if self.execution.recompute_operators:
            return self.recompute(layer, h, w, v, apart, attributes, *nodes)
        return layer(h, w, v, apart, attributes, *nodes)

    def messages(
        self,
        own: Scalars,
        w: Moved,
        theirs: Float[Tensor, "b c k n"],
        moved: Float[Tensor, "b 3 k n"],
        apart: Float[Tensor, "b 3 k n"],
        attributes: Float[Tensor, "b e k n"],
        valid: Bool[Tensor, "b k n"],
    ) -> tuple[Float[Tensor, "b o n"], Moved]:
        """Sum of a token's messages, and the mean of its pushes."""
        apart = apart + w[:, 0].unsqueeze(2) - moved
        square = apart.square().sum(1, keepdim=True)
        m = self.first.rest(torch.cat([square, attributes], 1)) + own.unsqueeze(2) + theirs
        m = self.phi_e(m).masked_fill(~valid.unsqueeze(1), 0)
        push = shortened(self.phi_x(m).unsqueeze(2) * apart.unsqueeze(1))
        count = valid.sum(1).clamp(min=1)
        push = push.masked_fill(~valid[:, None, None], 0).sum(3) / count[:, None, None]
        return m.sum(2), push

    def update(
        self,
        h: Scalars,
        w: Moved,
        v: Vectors,
        push: Moved,
        mask: Bool[Tensor, "b n"],
        *heard: Float[Tensor, "b _ n"],
    ) -> tuple[Scalars, Moved]:
        if self.phi_v is not None:
            rates = self.phi_v(h).unflatten(1, (w.shape[1], v.shape[1]))
            push = push + (rates.unsqueeze(3) * v.unsqueeze(1)).sum(2)
        h = h + self.phi_h(torch.cat([h, *heard], 1))
        return zero_invalid(h, mask), zero_invalid(w + push, mask)


class EdgeLinear(Linear):
    """Of the features at both ends of an edge and its own: those of ends are mapped at the tokens,
    once for all edges."""

    def __init__(self, ends: int, own: int, channels_out: int) -> None:
        super().__init__(2 * ends + own, channels_out)
        self.ends = ends

    def halves(self, h: Scalars) -> tuple[Float[Tensor, "b o n"], Float[Tensor, "b o n"]]:
        """A token's share as i, and as j."""
        first, second = self.weight[:, : 2 * self.ends].chunk(2, 1)
        bias = self.bias.unsqueeze(1)
        return first @ h + bias, second @ h

    def rest(self, edges: Float[Tensor, "b e k n"]) -> Float[Tensor, "b o k n"]:
        return (self.weight[:, 2 * self.ends :] @ edges.flatten(2)).unflatten(2, edges.shape[2:])


def shortened(push: Float[Tensor, "b m 3 k n"]) -> Float[Tensor, "b m 3 k n"]:
    """To a length of LONGEST_PUSH at most."""
    square = push.square().sum(2, keepdim=True)
    too_long = square > LONGEST_PUSH**2
    return push * torch.where(too_long, LONGEST_PUSH * square.where(too_long, 1).rsqrt(), 1)
