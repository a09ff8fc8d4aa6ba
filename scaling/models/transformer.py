"""The Transformer on coordinates: a rival without symmetry.

    y <- y + O attention(norm(y)),   y <- y + MLP(norm(y))          block after block

pre-norm, softmax attention in heads (Vaswani et al., arXiv 1706.03762; norms first as in Xiong et
al., arXiv 2002.04745), GELU MLPs of four times the width, sines of a token's place. The SE(3)-Hyena
paper (arXiv 2407.01049) does not say how large its Transformer is: compare at equal parameters
(`parameters=`), or at three times the width (model=transformer_wide). What it lacks in symmetry it
can only learn from data: tasks turn their training samples at random where they say so.
"""

from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor, nn

from data_pipeline.errors import OptionError
from scaling.models.blocks import Block, Mask
from scaling.models.coordinates import CoordinateModel, Features
from scaling.models.layers import ChannelLinear, ChannelNorm, TokenMLP
from scaling.models.protocol import Channels
from scaling.ops.attention import dot_attention, split_heads
from scaling.ops.masked_rows import MaskedRows, zero_invalid


class Transformer(CoordinateModel):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        channels: between blocks.
        blocks: of attention and MLP.
        heads: groups of channels that attend on their own.
        causal: a token attends to itself and those before it.
        readout: scale of the initial read-out; small where the answer is near the input.
        positions: sines and cosines of a token's place that join its features.

    Raises:
        OptionError: heads do not divide the channels.
    """

    width = "channels"
    width_divisor = "heads"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        channels: Annotated[int, Ge(1)] = 32,
        blocks: Annotated[int, Ge(1)] = 2,
        heads: Annotated[int, Ge(1)] = 4,
        causal: bool = False,
        readout: float = 1.0,
        positions: Annotated[int, Ge(0)] = 16,
    ) -> None:
        if channels % heads:
            raise OptionError("heads", heads, f"must divide channels={channels}")
        made = (AttentionBlock(channels, heads, causal) for _ in range(blocks))
        super().__init__(vectors, scalars, channels, made, readout, positions)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"channels": 8, "heads": 2, "positions": 4}


class AttentionBlock(Block):
    """Attention and MLP."""

    def __init__(self, channels: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = ChannelNorm(channels)
        self.project_all = ChannelLinear(channels, 3 * channels)
        self.out = ChannelLinear(channels, channels)
        self.mlp = nn.Sequential(ChannelNorm(channels), TokenMLP(channels))

    def project(self, y: Features, mask: Mask) -> tuple[Tensor, ...]:
        return zero_invalid(self.project_all(self.norm(y)), mask).chunk(3, 1)

    def across(self, rows: MaskedRows, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (split_heads(x, self.heads) for x in (q, k, v))
        return (dot_attention(q, k, v, rows, self.causal).flatten(1, 2),)

    def mix(self, y: Features, attended: Features) -> tuple[Features]:
        y = y + self.out(attended)
        return (y + self.mlp(y),)
