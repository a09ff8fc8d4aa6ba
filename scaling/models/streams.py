"""What equivariant models share: streams of scalars and vectors, changed block by block.

    x = E_x [y, y of the token before] (+ its own vectors, weighed by their products),
        y the centred points and the vectors
    f = E_f [scalars, log(1 + |y|), place] + b
    f, x <- block(f, x),   block after block; what mixes tokens
    points, vectors += R_x x,   scalars += R_f f + b

A model's file says what its blocks compute.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.algebra.norms import smooth_sqrt
from scaling.models.blocks import Block, Mask
from scaling.models.layers import ChannelLinear, LocalWeights, sinusoids
from scaling.models.protocol import Model
from scaling.ops.masked_rows import MaskedRows, zero_invalid
from scaling.ops.offload import offloading
from scaling.parallel.shard import SequenceShard

Scalars = Float[Tensor, "b c n"]
Vectors = Float[Tensor, "b v 3 n"]
OfBody = Float[Tensor, "b 1 #n"]
"""A number of each token's body."""


class StreamModel(Model):
    """
    Args:
        channels: of the streams, each one scalar and one vector.
        blocks: made after the maps into the streams.
        readout: scale of the initial read-out; small where the answer is near the input.
        positions: sines and cosines of a token's place in its body that join its scalars.
        local: width of an MLP that weighs a token's own vectors (its and the one before's) into the
            vector channels by their products; 0: none.
    """

    def __init__(
        self,
        vectors: int,
        scalars: int,
        channels: int,
        blocks: Iterable[Block],
        readout: float = 1.0,
        positions: int = 0,
        local: int = 0,
    ) -> None:
        super().__init__(vectors, scalars)
        self.positions = positions
        inputs = 1 + vectors
        self.embed_vectors = ChannelLinear(2 * inputs, channels)
        self.embed_scalars = ChannelLinear(scalars + inputs + positions, channels, bias=True)
        self.operators = nn.ModuleList(blocks)
        self.read_vectors = ChannelLinear(channels, inputs, gain=readout)
        self.read_scalars = ChannelLinear(channels, scalars, bias=True, gain=readout)
        self.local = LocalWeights(2 * inputs, scalars, channels, local) if local else None

    def features(self, batch: GeometricBatch, rows: MaskedRows) -> tuple[Tensor, ...]:
        """Of the input's tokens, for every block's `project`."""
        return ()

    def prepare(
        self, f: Scalars, x: Vectors, batch: GeometricBatch, rows: MaskedRows
    ) -> tuple[Scalars, Vectors]:
        """The streams of the first block."""
        return f, x

    def move(self, batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
        rows = MaskedRows.of(batch, shard)
        inputs = rows.centred_inputs(batch)
        scalars = batch.scalars
        if self.positions:
            scalars = torch.cat([scalars, sinusoids(rows.places, self.positions, scalars)], 1)
        with offloading(self.execution):
            before = rows.previous(inputs)
            f, x = self.in_tiles(self.enter, inputs, before, scalars, batch.mask)
            f, x = self.prepare(f, x, batch, rows)
            features = self.features(batch, rows)
            for operator in self.operators:
                f, x = operator(f, x, rows=rows, features=features)
            step, change = self.in_tiles(self.leave, f, x, batch.mask)
        return rows.moved(batch, step, change)

    def enter(
        self, inputs: Vectors, previous: Vectors, scalars: Float[Tensor, "b s n"], mask: Mask
    ) -> tuple[Tensor, Tensor]:
        """Of each token, the streams."""
        norms = torch.log1p(smooth_sqrt(inputs.square().sum(2)))
        own, scalars = torch.cat([inputs, previous], 1), zero_invalid(scalars, mask)
        f, x = self.embed_scalars(torch.cat([scalars, norms], 1)), self.embed_vectors(own)
        return f, x if self.local is None else x + self.local(own, scalars)

    def leave(self, f: Scalars, x: Vectors, mask: Mask) -> tuple[Tensor, Tensor]:
        """What the last block's streams add to the input."""
        return zero_invalid(self.read_vectors(x), mask), zero_invalid(self.read_scalars(f), mask)
