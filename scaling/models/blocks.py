"""How a model's blocks run, on any number of ranks.

Pointwise parts run in tiles of tokens, what mixes tokens over whole rows or each of their bodies,
and all of it once more in the backward pass where `execution.recompute_operators` asks for it.
"""

from abc import ABC, abstractmethod

from jaxtyping import Bool, Float
from torch import Tensor

from scaling.ops.masked_rows import MaskedRows
from scaling.ops.tiles import Tiled

Mask = Bool[Tensor, "b n"]
Stream = Float[Tensor, "b _c ... n"]
"""Channels of every token, such as scalars (b, c, n) or vectors (b, c, 3, n)."""


class Block(Tiled, ABC):
    """One block of a model: project, carry across tokens, mix."""

    @abstractmethod
    def project(self, *streams: Tensor) -> tuple[Tensor, ...]:
        """What is carried, such as queries, keys and values, of each token; 0 where the mask is
        False. Gets the streams, the features and the mask."""

    @abstractmethod
    def across(self, rows: MaskedRows, *projected: Tensor) -> tuple[Tensor, ...]:
        """What a token gets of others."""

    @abstractmethod
    def mix(self, *carried: Tensor) -> tuple[Tensor, ...]:
        """The new streams, from the old ones and what was carried, of each token."""

    def forward(
        self, *streams: Stream, rows: MaskedRows, features: tuple[Tensor, ...] = ()
    ) -> tuple[Stream, ...]:
        """The new streams. ZeRO-3 gathers the block where it is given tensors, not tuples."""

        def block(*inputs: Tensor) -> tuple[Tensor, ...]:
            projected = self.in_tiles(self.project, *inputs, rows.mask)
            carried = self.across(rows, *projected)
            return self.in_tiles(self.mix, *inputs[: len(streams)], *carried)

        if self.execution.recompute_operators:
            return self.recompute(block, *streams, *features)
        return block(*streams, *features)
