"""Hyena of order 2 on coordinates: long convolutions by learned filters, without symmetry.

    v, x1, x2 = short convolutions (3 tokens, a channel each) of linear maps of norm(y)
    y <- y + O (x2 (h2 * (x1 (h1 * v)))),   y <- y + MLP(norm(y))
    h(t) = window(t) F(features of t) + bias at t = 0,   window(t) = exp(-t / its channel's range)

(Poli et al., arXiv 2302.10866). F is an MLP with sines; features of t are t/T and sines and cosines
of whole fractions of T, and the windows' ranges go from T/100 to T in geometric steps, with T the
`horizon` and not the row's length: a row gives the same answer in any batch. Causal by zero
padding as in the paper, or circular over each body. The short convolution looks back. The
SE(3)-Hyena paper (arXiv 2407.01049) does not say how large its Hyena is: compare at equal
parameters.
"""

import math
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor, nn

from scaling.long_conv.operators import Padding, scalar_long_conv
from scaling.models.blocks import Block, Mask
from scaling.models.coordinates import CoordinateModel, Features
from scaling.models.layers import ChannelLinear, ChannelNorm, TokenMLP
from scaling.models.protocol import Channels
from scaling.ops.masked_rows import MaskedRows, zero_invalid

SHORT = 3
"""Tokens of the short convolution."""
FAST = 10.0
"""Frequency of the filter's sines at first (the paper's, section 3.3)."""
SHORTEST = 0.01
"""Range of the steepest window, in horizons."""


class Hyena(CoordinateModel):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        channels: between blocks.
        blocks: of long convolutions and MLP.
        filter_hidden: width of the MLP that makes the filters.
        filter_waves: sines, and cosines, of a place that it sees.
        horizon: T, tokens.
        padding: "causal", or "circular" over each body.
        readout: scale of the initial read-out; small where the answer is near the input.
        positions: sines and cosines of a token's place that join its features.
    """

    width = "channels"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        channels: Annotated[int, Ge(1)] = 32,
        blocks: Annotated[int, Ge(1)] = 2,
        filter_hidden: Annotated[int, Ge(1)] = 32,
        filter_waves: Annotated[int, Ge(0)] = 8,
        horizon: Annotated[float, Gt(0)] = 1024.0,
        padding: Padding = "causal",
        readout: float = 1.0,
        positions: Annotated[int, Ge(0)] = 0,
    ) -> None:
        made = (
            HyenaBlock(channels, filter_hidden, filter_waves, horizon, padding)
            for _ in range(blocks)
        )
        super().__init__(vectors, scalars, channels, made, readout, positions)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {
            "channels": 6,
            "blocks": 1,
            "filter_hidden": 4,
            "filter_waves": 2,
            "horizon": 16.0,
        }


class HyenaBlock(Block):
    """Long convolutions and MLP."""

    def __init__(
        self, channels: int, hidden: int, waves: int, horizon: float, padding: Padding
    ) -> None:
        super().__init__()
        self.padding: Padding = padding
        self.norm = ChannelNorm(channels)
        self.project_all = ChannelLinear(channels, 3 * channels)
        taps = torch.randn(SHORT, 3 * channels, 1) / math.sqrt(SHORT)
        self.short = nn.Parameter(taps)
        self.filters = ImplicitFilter(2 * channels, hidden, waves, horizon)
        self.out = ChannelLinear(channels, channels)
        self.mlp = nn.Sequential(ChannelNorm(channels), TokenMLP(channels))

    def project(self, y: Features, mask: Mask) -> tuple[Tensor, ...]:
        return (zero_invalid(self.project_all(self.norm(y)), mask),)

    def across(self, rows: MaskedRows, linear: Tensor) -> tuple[Tensor, ...]:
        before = rows.shifted(linear)  # which is 0 where not valid
        taps = torch.stack([linear, before, rows.shifted(before)])
        v, x1, x2 = (self.short.unsqueeze(1) * taps).sum(0).chunk(3, 1)
        h1, h2 = self.filters(rows.index, v).chunk(2, 0)

        def convolved(x: Features, h: Float[Tensor, "c n"], bias: Tensor) -> Features:
            x, budget = rows.zero_invalid(x), self.execution.workspace_bytes
            u = scalar_long_conv(x, h, padding=self.padding, workspace_bytes=budget, **rows.spans)
            return u + bias * x

        bias1, bias2 = self.filters.bias.chunk(2, 0)
        return (x2 * convolved(x1 * convolved(v, h1, bias1), h2, bias2),)

    def mix(self, y: Features, convolved: Features) -> tuple[Features]:
        y = y + self.out(convolved)
        return (y + self.mlp(y),)


class ImplicitFilter(nn.Module):
    """Filters as functions of the token's place: each rank makes its own tokens' alone."""

    def __init__(self, channels: int, hidden: int, waves: int, horizon: float) -> None:
        super().__init__()
        self.waves, self.horizon = waves, horizon
        self.first = ChannelLinear(1 + 2 * waves, hidden, bias=True)
        self.second = ChannelLinear(hidden, hidden, bias=True, gain=1 / FAST)
        self.last = ChannelLinear(hidden, channels)
        self.frequency = nn.Parameter(torch.full((hidden, 1), FAST))
        self.bias = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, places: Int[Tensor, " n"], like: Tensor) -> Float[Tensor, "c n"]:
        """At these places, of `like`'s number type; the sum of squares is about 1 at first."""
        t = places.double().unsqueeze(0) / self.horizon
        waves = torch.arange(1, self.waves + 1, device=t.device).unsqueeze(1)
        angles = 2 * math.pi * waves * (t % 1)
        features = torch.cat([t, angles.sin(), angles.cos()]).to(like.dtype).unsqueeze(0)
        y = torch.sin(self.frequency * self.first(features))
        y = self.last(torch.sin(self.frequency * self.second(y)))[0]
        steps = torch.linspace(-1, 0, len(y), dtype=t.dtype, device=t.device).unsqueeze(1)
        decay = SHORTEST**steps
        energy = -torch.expm1(-2 * decay / self.horizon)  # over the sum of squares of all places
        window = torch.exp(-t * decay) * energy.sqrt()
        return window.to(like.dtype) * y
