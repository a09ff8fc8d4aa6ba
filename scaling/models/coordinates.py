"""What models without symmetry share: coordinates are features like any others.

    y = E [centred points, vectors, scalars, place] + b
    y <- block(y),   block after block; what mixes tokens
    points, vectors, scalars += R y + b

Centring makes them follow translations; nothing makes them follow rotations.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.models.blocks import Block, Mask
from scaling.models.layers import ChannelLinear, sinusoids
from scaling.models.protocol import Model
from scaling.ops.masked_rows import MaskedRows, zero_invalid
from scaling.ops.offload import offloading
from scaling.parallel.shard import SequenceShard

Features = Float[Tensor, "b c n"]
Vectors = Float[Tensor, "b v 3 n"]


class CoordinateModel(Model):
    """
    Args:
        channels: between blocks.
        blocks: made after the map into the channels.
        readout: scale of the initial read-out; small where the answer is near the input.
        positions: sines and cosines of a token's place in its body that join its features.
    """

    symmetry = "none"

    def __init__(
        self,
        vectors: int,
        scalars: int,
        channels: int,
        blocks: Iterable[Block],
        readout: float = 1.0,
        positions: int = 0,
    ) -> None:
        super().__init__(vectors, scalars)
        self.positions = positions
        numbers = 3 * (1 + vectors) + scalars
        self.embed = ChannelLinear(numbers + positions, channels, bias=True)
        self.operators = nn.ModuleList(blocks)
        self.read = ChannelLinear(channels, numbers, bias=True, gain=readout)

    def move(self, batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
        rows = MaskedRows.of(batch, shard)
        inputs = rows.centred_inputs(batch)
        with offloading(self.execution):
            step, change = self.change(inputs, rows.zero_invalid(batch.scalars), rows)
        return rows.moved(batch, step, change)

    def change(self, inputs: Vectors, scalars: Features, rows: MaskedRows) -> tuple[Tensor, Tensor]:
        """What is added to points and vectors, and to scalars."""
        numbers = [inputs.flatten(1, 2), scalars]
        if self.positions:
            numbers.append(sinusoids(rows.places, self.positions, inputs))
        (y,) = self.in_tiles(self.enter, *numbers)
        for operator in self.operators:
            (y,) = operator(y, rows=rows)
        (change,) = self.in_tiles(self.leave, y, rows.mask)
        step, rest = change.split([3 * (1 + self.vectors), self.scalars], 1)
        return step.unflatten(1, (-1, 3)), rest

    def enter(self, *numbers: Float[Tensor, "b _c n"]) -> tuple[Features]:
        """The features of the first block."""
        return (self.embed(torch.cat(numbers, 1)),)

    def leave(self, y: Features, mask: Mask) -> tuple[Float[Tensor, "b _numbers n"]]:
        """What the last block's features add to the input."""
        return (zero_invalid(self.read(y), mask),)
