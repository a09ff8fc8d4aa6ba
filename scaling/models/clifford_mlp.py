"""Clifford MLPs without anything that mixes tokens: what a long convolution has to beat.

    f, x <- f + xi_f(f, x),  x + xi_x(f, x)

Of other tokens a token knows the one before it and the mean of the points, as all models of
streams do. The MLPs are those of Ruhe et al., arXiv 2305.11141.
"""

from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor

from scaling.algebra.clifford import CliffordMLP, embed, grade_0, grade_1
from scaling.models.blocks import Block, Mask
from scaling.models.protocol import Channels
from scaling.models.streams import Scalars, StreamModel, Vectors
from scaling.ops.masked_rows import MaskedRows


class CliffordMLPModel(StreamModel):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        channels: channels between blocks, each one scalar and one vector.
        hidden: multivector channels inside the Clifford MLPs.
        blocks: Clifford MLPs.
        readout: scale of the initial read-out; small where the answer is near the input.
        positions: sines and cosines of a token's place that join its scalars.
        layers: of the Clifford MLPs.
        local: width of an MLP that weighs a token's own vectors (its and the one before's) into the
            vector channels by their products; 0: none.
    """

    width = "hidden"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        channels: Annotated[int, Ge(1)] = 16,
        hidden: Annotated[int, Ge(1)] = 16,
        blocks: Annotated[int, Ge(1)] = 2,
        readout: float = 1.0,
        positions: Annotated[int, Ge(0)] = 0,
        layers: Annotated[int, Ge(1)] = 2,
        local: Annotated[int, Ge(0)] = 0,
    ) -> None:
        made = (CliffordBlock(channels, hidden, layers) for _ in range(blocks))
        super().__init__(vectors, scalars, channels, made, readout, positions, local)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"channels": 4, "hidden": 4}


class CliffordBlock(Block):
    """One block; nothing is carried."""

    def __init__(self, channels: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.xi = CliffordMLP(channels, hidden, channels, layers, grades=2)

    def project(self, f: Scalars, x: Vectors, mask: Mask) -> tuple[Tensor, ...]:
        update = self.xi(embed(f, x))
        return f + grade_0(update), x + grade_1(update)

    def across(self, rows: MaskedRows, f: Scalars, x: Vectors) -> tuple[Tensor, ...]:
        return f, x

    def mix(self, _f: Scalars, _x: Vectors, f: Scalars, x: Vectors) -> tuple[Scalars, Vectors]:
        return f, x
