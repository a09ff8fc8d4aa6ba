"""Straight motion: what every n-body model has to beat.

    points + t velocity,   t learned, 0.7 at first; nothing else changes

The velocity is the first vector channel.
"""

from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import nn

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import OptionError
from scaling.models.protocol import Channels, Model
from scaling.ops.masked_rows import MaskedRows
from scaling.parallel.shard import SequenceShard


class LinearMotion(Model):
    """
    Args:
        vectors: free vector channels of the input; the first is the velocity.
        scalars: scalar channels of the input.
        time: t at first.

    Raises:
        OptionError: no vector channel.
    """

    def __init__(
        self, vectors: Annotated[int, Ge(0)], scalars: Channels, time: float = 0.7
    ) -> None:
        if not vectors:
            raise OptionError("vectors", vectors, "a velocity is needed: a vector channel")
        super().__init__(vectors, scalars)
        self.time = nn.Parameter(torch.tensor(time))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"time": 1.0}

    def move(self, batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
        rows = MaskedRows.of(batch, shard)
        points, vectors, scalars = map(
            rows.zero_invalid, (batch.points, batch.vectors, batch.scalars)
        )
        return batch.replace(
            points=points + self.time * vectors[:, 0], vectors=vectors, scalars=scalars
        )
