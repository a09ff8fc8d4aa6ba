"""Layers of the VN-Transformer: they mix channels of vectors, all coordinates alike.

Tensors are (b, c, d, n): rows, channels, numbers of a vector, tokens. The first three numbers turn
with the input, the others are scalars that are carried along. Formulas: `vn_transformer`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from scaling.models.blocks import Block, Mask
from scaling.ops.attention import DotPairs, split_heads
from scaling.ops.latents import BodyLatents
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.pairs import all_pairs

SMALLEST = 1e-6
"""Length of a vector below which its direction fades."""

Fused = Float[Tensor, "b c d n"]
Heads = Float[Tensor, "b h e n"]
"""For each head all numbers of its channels."""
Logits = Literal["product", "distance"]


@dataclass(frozen=True)
class Variant:
    """What the layers of a model have in common."""

    bias_epsilon: float = 0.0
    """Length of each channel's bias."""
    faults: bool = False
    """Those of the package; see `vn_transformer`."""

    def std(self, channels: int) -> float:
        """Of initial weights, for so many channels in."""
        return 1.0 if self.faults else max(channels, 1) ** -0.5


class VNLinear(nn.Module):
    """y_o = sum_c W_oc x_c, plus the biases that do not turn."""

    def __init__(
        self, channels_in: int, channels_out: int, variant: Variant, gain: float = 1.0
    ) -> None:
        super().__init__()
        std = gain * variant.std(channels_in)
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in) * std)
        self.epsilon, self.bias = variant.bias_epsilon, None
        if self.epsilon:
            directions = (channels_out,) if variant.faults else (channels_out, 3)
            self.bias = nn.Parameter(torch.randn(directions))

    def forward(self, x: Float[Tensor, "b i d n"]) -> Float[Tensor, "b o d n"]:
        y = (self.weight @ x.flatten(2)).unflatten(2, x.shape[2:])
        if self.bias is None:
            return y
        bias = self.epsilon * normalize(self.bias, dim=-1)
        if bias.ndim == 2:
            return y + pad(bias, (0, x.shape[2] - 3)).unsqueeze(-1)
        return y + bias.reshape(-1, 1, 1)


class VNReLU(nn.Module):
    """q = W x without what of it points against k = U x."""

    def __init__(self, channels: int, variant: Variant) -> None:
        super().__init__()
        std = variant.std(channels)
        self.W = nn.Parameter(torch.randn(channels, channels) * std)
        self.U = nn.Parameter(torch.randn(channels, channels) * std)
        self.faults = variant.faults

    def forward(self, x: Fused) -> Fused:
        q, k = ((m @ x.flatten(2)).unflatten(2, x.shape[2:]) for m in (self.W, self.U))
        against = (-(q * k).sum(2, keepdim=True)).relu()
        length = torch.linalg.vector_norm(k, dim=2, keepdim=True).clamp(min=SMALLEST)
        return q + against / (length if self.faults else length.square()) * k


class VNLayerNorm(nn.Module):
    """Each channel's direction, times its length after a layer norm over the channels' lengths."""

    def __init__(self, channels: int, variant: Variant) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        kind = nn.Buffer if variant.faults else nn.Parameter
        self.shift = kind(torch.zeros(channels))

    def forward(self, x: Fused) -> Fused:
        x = x.to(self.gain.dtype)
        length = torch.linalg.vector_norm(x, dim=2)
        centred = length - length.mean(1, keepdim=True)
        normed = centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        normed = self.gain.unsqueeze(-1) * normed + self.shift.unsqueeze(-1)
        return x * (normed / length.clamp(min=SMALLEST)).unsqueeze(2)


class VNBlock(Block):
    """x + norm(out(attention(x))), then x + norm(feed-forward(x))."""

    ties_keys = True
    """Distances are between a token's query and others' queries."""

    def __init__(
        self,
        channels: int,
        heads: int,
        head_channels: int,
        widening: int,
        attention: Logits,
        variant: Variant,
    ) -> None:
        super().__init__()
        inner, wide = heads * head_channels, widening * channels
        self.heads, self.distance, self.faults = heads, attention == "distance", variant.faults
        self.queries = VNLinear(channels, inner, variant)
        tied = self.distance and self.ties_keys
        self.keys = None if tied else VNLinear(channels, inner, variant)
        self.values = VNLinear(channels, inner, variant)
        self.out = VNLinear(inner, channels, variant)
        self.attention_norm = VNLayerNorm(channels, variant)
        self.widen = VNLinear(channels, wide, variant)
        self.activation = VNReLU(wide, variant)
        self.narrow = VNLinear(wide, channels, variant)
        self.feed_forward_norm = VNLayerNorm(channels, variant)

    def project(self, x: Fused, mask: Mask) -> tuple[Tensor, ...]:
        q, v = (split_heads(f(x), self.heads) for f in (self.queries, self.values))
        k = q if self.keys is None else split_heads(self.keys(x), self.heads)
        return self.asking(q), self.answering(k), v

    def across(self, rows: MaskedRows, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (all_pairs(DotPairs(), [q], [k, v], rows),)

    def mix(self, x: Fused, attended: Heads) -> tuple[Fused]:
        x = x + self.attention_norm(self.out(self.join(attended, x.shape[2])))
        return (x + self.feed_forward_norm(self.narrow(self.activation(self.widen(x)))),)

    def join(self, x: Heads, numbers: int) -> Fused:
        return x.unflatten(2, (-1, numbers)).flatten(1, 2)

    def asking(self, q: Float[Tensor, "b h ... e n"]) -> Float[Tensor, "b h ... g n"]:
        """Scaled, and ready for keys from `answering`: their products are the logits."""
        scale = q.shape[-2] ** -0.5
        if not self.distance:
            return scale * q
        return torch.cat([2 * scale * q, torch.ones_like(q[..., :1, :])], -2)

    def answering(self, k: Float[Tensor, "b h ... e n"]) -> Float[Tensor, "b h ... g n"]:
        """-|q|² is the same for all keys, and so -|q - k|² as good as 2 q·k - |k|²."""
        if not self.distance:
            return k
        scale = 1.0 if self.faults else k.shape[-2] ** -0.5
        return torch.cat([k, -scale * k.square().sum(-2, keepdim=True)], -2)


class LatentBlock(VNBlock):
    """Latents attend to a body's tokens, and then tokens to the latents of their body."""

    ties_keys = False

    def __init__(
        self,
        channels: int,
        heads: int,
        head_channels: int,
        widening: int,
        attention: Logits,
        variant: Variant,
        latents: int,
    ) -> None:
        super().__init__(channels, heads, head_channels, widening, attention, variant)
        inner, std = heads * head_channels, variant.std(channels)
        self.pool = nn.Parameter(torch.randn(latents, channels, channels) * std)
        self.latent_out = VNLinear(inner, channels, variant)
        self.latent_keys = VNLinear(channels, inner, variant)
        self.latent_values = VNLinear(channels, inner, variant)
        self.token_queries = VNLinear(channels, inner, variant)

    def project(self, x: Fused, mask: Mask) -> tuple[Tensor, ...]:
        """Queries for the latents; keys and values for these' own queries; what they begin with."""
        assert self.keys is not None
        maps = self.token_queries, self.keys, self.values
        q, k, v = (split_heads(f(x), self.heads) for f in maps)
        return self.asking(q), self.answering(k), v, x

    def across(
        self, rows: MaskedRows, q: Tensor, k: Tensor, v: Tensor, x: Tensor
    ) -> tuple[Tensor, ...]:
        bodies = BodyLatents(rows)
        mean = bodies.mean(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        z = self.learn(mean, k, v, bodies)
        k, v = self.latent_heads(self.latent_keys(z)), self.latent_heads(self.latent_values(z))
        return (bodies.tell(q, self.answering(k), v),)

    def learn(
        self,
        mean: Float[Tensor, "b i d c"],
        k: Float[Tensor, "b h g n"],
        v: Heads,
        bodies: BodyLatents,
    ) -> Float[Tensor, "r i d c"]:
        """The latents, one after the other as if they were rows, and bodies their tokens."""
        start = torch.einsum("bidc,mio->bmodc", mean, self.pool).flatten(0, 1)
        q = self.latent_heads(self.queries(start))
        z = bodies.learn(self.asking(q), k, v).transpose(1, 2).flatten(0, 1)
        return self.latent_out(self.join(z, mean.shape[2]))

    def latent_heads(self, z: Float[Tensor, "r i d c"]) -> Float[Tensor, "b h m e c"]:
        return split_heads(z, self.heads).unflatten(0, (-1, len(self.pool))).transpose(1, 2)
