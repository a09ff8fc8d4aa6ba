"""Equiformer: graph attention on irreducible representations of rotations, up to degree 2.

Liao and Smidt, arXiv 2206.11990. A token has features x of degrees l = 0 .. lmax, with c / 2^l
channels of 2l + 1 components: scalars, vectors, traceless symmetric matrices. Of i's neighbours j,
the k nearest in the input, with Y_l the spherical harmonics of x_j - x_i and d_ij Gaussians of its
length beside sines of the places between i and j, a layer is

    z_ij = linear(LN(x)_i) + linear(LN(x)_j)
    u_ij = z_ij (x) Y,   each of its paths and channels times MLP(d_ij)
    a_ij = softmax_j a . SmoothLeakyReLU(linear(u_ij)_0)               in every head
    v_ij = linear(gate(linear(u_ij)) (x) Y),                           weights of paths learned
    x_i <- x_i + linear(sum_j a_ij v_ij);   x_i <- x_i + FFN(LN(x_i))

(x) is the depth-wise tensor product: channel c of degree l1 and Y of degree l2 make channel c of
every degree l3 between |l1 - l2| and l1 + l2, by the Wigner 3j symbols of e3nn. The gate is SiLU on
scalars, and a sigmoid of further scalars on each other channel; FFN is linear, gate, linear, three
times as wide. LN divides every degree by the rms of all its components, scalars after their mean is
taken away. x begins as linear maps of the input's scalars, norms and vectors, plus
linear(sum_j MLP(d_ij) Y) / sqrt(k). Read-outs are linear maps of LN(x): of vectors for the steps of
points and vectors, of scalars for theirs.

With parity, paths of even l1 + l2 + l3 alone: features are 0e, 1o and 2e, and mirror images give
mirror images. Without it they are all that there are, as in the published QM9 model, whose block
has the 488,000 parameters that a layer of configs/model/equiformer_qm9.yaml has.

What is otherwise than in the authors' code:

- The head reads vectors and scalars, and the last layer is as the others. There it makes 512
  scalars for one number of a molecule; with these the published 3.53 million parameters are met.
- Their first features are products with channels of degrees 1 and 2 that are 0: 73,280 of those
  parameters never learn. They are not here.
- Gaussians have fixed means and widths, SiLU and sigmoid are not scaled to a second moment of 1,
  and there is no dropout.
- Sines of the places between tokens are ours; molecules have no sequence.
"""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import OptionError
from scaling.algebra.norms import smooth_sqrt
from scaling.models.irreps import (
    Coupling,
    Direction,
    Features,
    Flat,
    IrrepsLinear,
    IrrepsNorm,
    add,
    flat,
    gate,
    gated,
    halved,
    split,
)
from scaling.models.layers import ChannelLinear, ChannelNorm, Linear, sinusoids
from scaling.models.protocol import Channels, Model
from scaling.ops.masked_rows import MaskedRows, zero_invalid
from scaling.ops.neighbours import Neighbours, find_neighbours
from scaling.ops.offload import offloading
from scaling.ops.tiles import Tiled
from scaling.parallel.shard import Layout, SequenceShard

Edges = Float[Tensor, "b e k n"]
Valid = Bool[Tensor, "b k n"]


class Equiformer(Model):
    """
    Args:
        vectors: free vector channels of the input.
        scalars: scalar channels of the input.
        neighbours: of each token, at most; the nearest of its body.
        radius: no neighbour is farther; None: however far.
        lmax: the highest degree.
        channels: of scalars; each degree has half as many as the one below.
        layers: how many.
        heads: of attention.
        head_channels: scalars of a head, halved by degree; None: channels / heads.
        basis: Gaussians of the distance on an edge.
        reach: of their centres.
        radial_hidden: inside the MLPs of edges.
        separations: sines and cosines of the places between the ends of an edge; 0: none.
        parity: mirror images give mirror images.
        readout: scale of the initial read-out.
    """

    layout: Layout = "contiguous"
    width = "channels"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        neighbours: Annotated[int, Ge(1)] = 16,
        radius: Annotated[float, Gt(0)] | None = None,
        lmax: Literal[1, 2] = 1,
        channels: Annotated[int, Ge(1)] = 64,
        layers: Annotated[int, Ge(1)] = 4,
        heads: Annotated[int, Ge(1)] = 4,
        head_channels: Annotated[int, Ge(1)] | None = 8,
        basis: Annotated[int, Ge(2)] = 16,
        reach: Annotated[float, Gt(0)] = 10.0,
        radial_hidden: Annotated[int, Ge(1)] = 16,
        separations: Annotated[int, Ge(0)] = 16,
        parity: bool = True,
        readout: float = 1.0,
    ) -> None:
        super().__init__(vectors, scalars)
        if head_channels is None and channels % heads:
            rule = f"must divide channels={channels} where there are no head_channels"
            raise OptionError("heads", heads, rule)
        self.symmetry = "E(3)" if parity else "SE(3)"
        self.neighbours, self.radius = neighbours, radius
        self.basis, self.reach, self.separations = basis, reach, separations
        coupling = Coupling(lmax, parity)
        self.widths = widths = halved(channels, lmax)
        edges = basis + separations, radial_hidden
        self.embed_scalars = ChannelLinear(scalars + vectors, widths[0], bias=True)
        self.embed_vectors = ChannelLinear(vectors, widths[1])
        self.degree = DegreeEmbedding(widths, edges, coupling)
        values = [heads * c for c in halved(head_channels or channels // heads, lmax)]
        self.layers = nn.ModuleList(
            EquiformerLayer(widths, values, heads, edges, coupling) for _ in range(layers)
        )
        self.norm = IrrepsNorm(widths[:2])
        self.read_vectors = ChannelLinear(widths[1], 1 + vectors, gain=readout)
        self.read_scalars = ChannelLinear(widths[0], scalars, bias=True, gain=readout)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        sizes = {"neighbours": 4, "channels": 8, "layers": 2, "heads": 2, "head_channels": None}
        return sizes | {"lmax": 2, "basis": 6, "radial_hidden": 6, "separations": 4}

    def move(self, batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
        rows = MaskedRows.of(batch, shard)
        points, v, s = map(rows.zero_invalid, (batch.points, batch.vectors, batch.scalars))
        neighbours = find_neighbours(points, rows, self.neighbours, self.radius)
        with offloading(self.execution):
            places = rows.places.to(points.dtype)
            others, their_places = neighbours.gather(points, places)
            ends = points, others, places, their_places
            direction, edges = self.in_tiles(self.edges, *ends)
            valid = neighbours.valid
            (x,) = self.in_tiles(self.enter, v, s, direction, edges, valid, batch.mask)
            for layer in self.layers:
                x = layer(x, direction, edges, neighbours, batch.mask)
            step, change = self.in_tiles(self.leave, x, batch.mask)
        return rows.moved(batch, step, change)

    def edges(
        self,
        points: Float[Tensor, "b 3 n"],
        others: Float[Tensor, "b 3 k n"],
        places: Float[Tensor, "b n"],
        their_places: Float[Tensor, "b k n"],
    ) -> tuple[Direction, Edges]:
        """Directions, and numbers of an edge that do not turn."""
        apart = others - points.unsqueeze(2)
        distance = smooth_sqrt(apart.square().sum(1, keepdim=True))
        spacing = self.reach / (self.basis - 1)
        features = [(-0.5 * (distance / spacing - m).square()).exp() for m in range(self.basis)]
        if self.separations:
            between = (their_places - places.unsqueeze(1)).round().long()
            waves = sinusoids(between.flatten(1), self.separations, points)
            features.append(waves.unflatten(2, between.shape[1:]))
        return apart / distance, torch.cat(features, 1)

    def enter(
        self,
        v: Float[Tensor, "b v 3 n"],
        s: Float[Tensor, "b s n"],
        direction: Direction,
        edges: Edges,
        valid: Valid,
        mask: Bool[Tensor, "b n"],
    ) -> tuple[Flat]:
        """The features of the first layer."""
        norms = torch.log1p(smooth_sqrt(v.square().sum(2)))
        x = self.degree(direction, edges, valid)
        x[0] = x[0] + self.embed_scalars(torch.cat([s, norms], 1)).unsqueeze(2)
        x[1] = x[1] + self.embed_vectors(v)
        return (zero_invalid(flat(x), mask),)

    def leave(self, x: Flat, mask: Bool[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
        """What is added to the points and vectors, and to the scalars."""
        f, vectors = self.norm(split(x, self.widths)[:2])
        step, change = self.read_vectors(vectors), self.read_scalars(f.squeeze(2))
        return zero_invalid(step, mask), zero_invalid(change, mask)


class DegreeEmbedding(nn.Module):
    """linear(sum_j MLP(d_ij) Y) / sqrt(k) of every degree."""

    def __init__(self, widths: list[int], edges: tuple[int, int], coupling: Coupling) -> None:
        super().__init__()
        self.coupling, self.degrees = coupling, len(widths)
        self.radial = radial_mlp(*edges, widths[0] * self.degrees)
        self.linear = IrrepsLinear([widths[0]] * self.degrees, widths)

    def forward(self, direction: Direction, edges: Edges, valid: Valid) -> Features:
        weights = self.radial(edges.flatten(2)).unflatten(2, edges.shape[2:])
        weights = weights.masked_fill(~valid.unsqueeze(1), 0) / edges.shape[2] ** 0.5
        harmonics = self.coupling.harmonics(direction)
        sums = [
            (w.unsqueeze(2) * torch.stack(y, 1).unsqueeze(1)).sum(3)
            for w, y in zip(weights.chunk(self.degrees, 1), harmonics, strict=True)
        ]
        return self.linear(sums)


class EquiformerLayer(Tiled):
    """Attention and feed-forward."""

    def __init__(
        self,
        widths: list[int],
        values: list[int],
        heads: int,
        edges: tuple[int, int],
        coupling: Coupling,
    ) -> None:
        super().__init__()
        self.widths, self.heads, self.coupling = widths, heads, coupling
        paths, made = coupling.weights(widths), coupling.channels(widths)
        self.norm = IrrepsNorm(widths)
        self.own = IrrepsLinear(widths, widths)
        self.other = IrrepsLinear(widths, widths, bias=False)
        self.radial = radial_mlp(*edges, paths)
        self.message = IrrepsLinear(made, gated(widths))
        self.logits = Linear(made[0], values[0])
        self.a = nn.Parameter(torch.randn(values[0], 1, 1) * (heads / values[0]) ** 0.5)
        self.path_weights = nn.Parameter(torch.randn(1, paths, 1, 1))
        self.value = IrrepsLinear(made, values)
        self.project = IrrepsLinear(values, widths)
        self.second_norm = IrrepsNorm(widths)
        inside = [3 * c for c in widths]
        self.up = IrrepsLinear(widths, gated(inside))
        self.down = IrrepsLinear(inside, widths)

    def forward(
        self,
        x: Flat,
        direction: Direction,
        edges: Edges,
        neighbours: Neighbours,
        mask: Bool[Tensor, "b n"],
    ) -> Flat:
        def layer(x: Tensor, direction: Tensor, edges: Tensor) -> tuple[Tensor]:
            own, other = self.in_tiles(self.ends, x)
            (theirs,) = neighbours.gather(other)
            tensors = (x, own, theirs, direction, edges, neighbours.valid, mask)
            return self.in_tiles(self.update, *tensors)

        if self.execution.recompute_operators:
            return self.recompute(layer, x, direction, edges)[0]
        return layer(x, direction, edges)[0]

    def ends(self, x: Flat) -> tuple[Flat, Flat]:
        """A token's share of messages to it, and of those to others."""
        normed = self.norm(split(x, self.widths))
        return flat(self.own(normed)), flat(self.other(normed))

    def update(
        self,
        x: Flat,
        own: Flat,
        theirs: Float[Tensor, "b f k n"],
        direction: Direction,
        edges: Edges,
        valid: Valid,
        mask: Bool[Tensor, "b n"],
    ) -> tuple[Flat]:
        z = split(own.unsqueeze(2) + theirs, self.widths)
        sums = self.attention(z, direction, edges, valid)
        new = add(split(x, self.widths), self.project(sums))
        new = add(new, self.down(gate(self.up(self.second_norm(new)))))
        return (zero_invalid(flat(new), mask),)

    def attention(self, z: Features, direction: Direction, edges: Edges, valid: Valid) -> Features:
        """Sums of the values of a token's neighbours."""
        matrices = self.coupling.matrices(direction)
        weights = self.radial(edges.flatten(2)).unflatten(2, edges.shape[2:])
        u = self.coupling.product(z, matrices, weights)
        logits = self.a * smooth_leaky_relu(self.logits(u[0].squeeze(2)))
        logits = logits.unflatten(1, (self.heads, -1)).sum(2)
        nobody = ~valid.unsqueeze(1)
        logits = logits.masked_fill(nobody, torch.finfo(logits.dtype).min)
        attention = logits.softmax(2).masked_fill(nobody, 0)[:, :, None, None]
        message = gate(self.message(u))
        values = self.value(self.coupling.product(message, matrices, self.path_weights))
        return [(v.unflatten(1, (self.heads, -1)) * attention).sum(4).flatten(1, 2) for v in values]


def smooth_leaky_relu(x: Tensor, slope: float = 0.2) -> Tensor:
    """(1 + slope) / 2 x + (1 - slope) / 2 x (2 sigmoid(x) - 1)."""
    return x * ((1 - slope) * x.sigmoid() + slope)


def radial_mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Of the numbers of edges (b, e, edges), as in the authors' code."""
    first = [Linear(inputs, hidden), ChannelNorm(hidden), nn.SiLU()]
    second = [Linear(hidden, hidden), ChannelNorm(hidden), nn.SiLU()]
    return nn.Sequential(*first, *second, Linear(hidden, outputs))
