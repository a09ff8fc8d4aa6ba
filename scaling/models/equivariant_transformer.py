"""Dot-product attention with invariant logits and vector values: the strong baseline.

    w_ij = softmax_j((qs_i·ks_j + q_i·k_j) / sqrt(d)),   a_i, u_i = sum_j w_ij vs_j, sum_j w_ij v_j
    f, x <- f + xi_f(f + a, x + u),  x + xi_x(the same)

in each of the heads, which share the channels; q_i·k_j sums over channels and space, d is 4 times a
head's channels. qs, ks, vs, q, k, v = phi(f, x); phi and xi are Clifford MLPs as in SE3Hyena. The
SE(3)-Hyena paper lacks this rival; its own is `vector_transformer`. Attention knows no order: the
token before and sines of a token's place join the inputs.
"""

from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor

from data_pipeline.errors import OptionError
from scaling.algebra.clifford import CliffordMLP, embed, grade_0, grade_1
from scaling.models.blocks import Block, Mask
from scaling.models.protocol import Channels
from scaling.models.streams import Scalars, StreamModel, Vectors
from scaling.ops.attention import dot_attention, split_heads
from scaling.ops.masked_rows import MaskedRows, zero_invalid


class EquivariantTransformer(StreamModel):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        channels: channels between blocks, each one scalar and one vector.
        hidden: multivector channels inside the Clifford MLPs.
        blocks: attention blocks.
        heads: groups of channels that attend on their own.
        causal: a token attends to itself and those before it.
        readout: scale of the initial read-out; small where the answer is near the input.
        positions: sines and cosines of a token's place that join its scalars.

    Raises:
        OptionError: heads do not divide the channels.
    """

    width = "hidden"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        channels: Annotated[int, Ge(1)] = 16,
        hidden: Annotated[int, Ge(1)] = 16,
        blocks: Annotated[int, Ge(1)] = 2,
        heads: Annotated[int, Ge(1)] = 4,
        causal: bool = False,
        readout: float = 1.0,
        positions: Annotated[int, Ge(0)] = 16,
    ) -> None:
        if channels % heads:
            raise OptionError("heads", heads, f"must divide channels={channels}")
        made = (DotAttention(channels, hidden, heads, causal) for _ in range(blocks))
        super().__init__(vectors, scalars, channels, made, readout, positions)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"channels": 4, "hidden": 4, "heads": 2, "positions": 4}


class DotAttention(Block):
    """One block."""

    def __init__(self, channels: int, hidden: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.channels, self.heads, self.causal = channels, heads, causal
        self.phi = CliffordMLP(channels, hidden, 3 * channels, grades=2)
        self.xi = CliffordMLP(channels, hidden, channels, grades=2)

    def project(self, f: Scalars, x: Vectors, mask: Mask) -> tuple[Tensor, ...]:
        projected = self.phi(embed(f, x)).transpose(1, 2)  # channels with their 4 numbers
        return zero_invalid(projected, mask).chunk(3, 1)

    def across(self, rows: MaskedRows, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (split_heads(x, self.heads) for x in (q, k, v))
        both = dot_attention(q, k, v, rows, self.causal).flatten(1, 2)
        both = both.unflatten(1, (self.channels, 4))
        return both[:, :, 0], both[:, :, 1:]

    def mix(self, f: Scalars, x: Vectors, a: Scalars, u: Vectors) -> tuple[Scalars, Vectors]:
        update = self.xi(embed(f + a, x + u))
        return f + grade_0(update), x + grade_1(update)
