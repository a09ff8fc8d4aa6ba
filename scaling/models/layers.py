"""Layers that several models share; each acts on every token alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

LONGEST_WAVE = 10_000.0
"""Of a place's sines, over 2π: tokens."""


class ChannelLinear(nn.Module):
    """Mixes channels of scalars (b, c, n) or vectors (b, c, 3, n); a bias for scalars alone."""

    def __init__(
        self, channels_in: int, channels_out: int, bias: bool = False, gain: float = 1.0
    ) -> None:
        super().__init__()
        std = gain / max(channels_in, 1) ** 0.5
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in) * std)
        self.bias = nn.Parameter(torch.zeros(channels_out, 1)) if bias else None

    def forward(self, x: Float[Tensor, "b i ... n"]) -> Float[Tensor, "b o ... n"]:
        y = (self.weight @ x.flatten(2)).unflatten(2, x.shape[2:])
        return y if self.bias is None else y + self.bias


class ChannelNorm(nn.Module):
    """Each token's channels with mean 0 and variance 1, times a weight, plus a bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b c n"]:
        x = x - x.mean(1, keepdim=True)
        return self.weight * x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() + self.bias


class TokenMLP(nn.Module):
    """Linear, GELU, linear, of `times` the width inside."""

    def __init__(self, channels: int, times: int = 4) -> None:
        super().__init__()
        self.up = ChannelLinear(channels, times * channels, bias=True)
        self.down = ChannelLinear(times * channels, channels, bias=True)

    def forward(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b c n"]:
        return self.down(nn.functional.gelu(self.up(x)))


class Linear(nn.Linear):
    """torch's own, with its initial weights, on channels (b, c, ..., n)."""

    def forward(self, input: Float[Tensor, "b i ... n"]) -> Float[Tensor, "b o ... n"]:
        y = self.weight @ input.flatten(2)
        y = y if self.bias is None else y + self.bias.unsqueeze(1)
        return y.unflatten(2, input.shape[2:])


def mlp(
    inputs: int, hidden: int, outputs: int, gain: float | None = None, ends_in_silu: bool = False
) -> nn.Sequential:
    """Two layers; with a gain the last has no bias, and weights as Xavier's times the gain."""
    last = Linear(hidden, outputs, bias=gain is None)
    if gain is not None:
        nn.init.xavier_uniform_(last.weight, gain)
    return nn.Sequential(Linear(inputs, hidden), nn.SiLU(), last, *[nn.SiLU()] * ends_in_silu)


class LocalWeights(nn.Module):
    """Weighs a token's own vectors y into channels, by its scalars and the vectors' products:

    x_c = sum_m w_cm y_m,   w = MLP [scalars, sign(G) log(1 + |G|) for all G = y_m·y_m']
    """

    def __init__(self, vectors: int, scalars: int, channels: int, hidden: int) -> None:
        super().__init__()
        products = vectors * (vectors + 1) // 2
        self.mlp = mlp(scalars + products, hidden, channels * vectors)

    def forward(
        self, y: Float[Tensor, "b m 3 n"], scalars: Float[Tensor, "b s n"]
    ) -> Float[Tensor, "b c 3 n"]:
        vectors = y.shape[1]
        first, second = torch.triu_indices(vectors, vectors, device=y.device)
        gram = torch.einsum("bmdn,bkdn->bmkn", y, y).flatten(1, 2)
        products = gram.index_select(1, first * vectors + second)
        w = self.mlp(torch.cat([scalars, products.sign() * torch.log1p(products.abs())], 1))
        return torch.einsum("bcmn,bmdn->bcdn", w.unflatten(1, (-1, vectors)), y)


def sinusoids(
    places: Int[Tensor, "b n"], features: int, like: Tensor
) -> Float[Tensor, "b features n"]:
    """Sines and cosines of places, of wavelengths from 2π tokens in geometric steps, of `like`'s
    number type (Vaswani et al., arXiv 1706.03762)."""
    waves = torch.arange(-(-features // 2), device=places.device, dtype=torch.float64)
    turns = LONGEST_WAVE ** (-2 * waves / max(features, 1))
    angles = places.unsqueeze(1) * turns.unsqueeze(1)
    both = torch.stack([angles.sin(), angles.cos()], 2).flatten(1, 2)
    return both[:, :features].to(like.dtype)
