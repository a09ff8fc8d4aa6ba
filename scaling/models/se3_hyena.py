"""SE(3)-Hyena with polar and axial products: the default model.

The operator of SE(3)-Hyena (arXiv 2407.01049) convolves scalars with scalars and crosses vectors
with vectors. Here every product of a scalar and a vector takes part: per channel c, with * a long
convolution along the sequence and z = N^(-1/2), N the row's length,

    a  = z (qs*ks + q*.k)         polar scalar
    u  = z (qs*k + ks*q)          polar vector
    ua = z (q*×k)                 axial vector
    ga, gu = sigmoid(gamma(a, u));  a <- ga a;  u <- gu u;  ua <- gu ua
    f' = f + xi_f(f + w0 a vs + w1 u·v, x + w2 a v + w3 u vs + w4 ua×v)
    x' = x + xi_x(the same)

phi (which makes q, k, v), gamma and xi are Clifford MLPs. Weights on the terms of a and u would be
products of the scales that phi's last linear map learns for qs, ks, q and k: there are none.
All terms are polar: the model is exactly E(3)-equivariant and cannot tell mirror images; `chiral`
lets ua join the vectors, which leaves SE(3).

Vectors enter with their predecessors' (a key has to meet the next token) and with their norms as
scalars, so that magnitudes survive the norms inside the Clifford MLPs.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.algebra.clifford import CliffordMLP, embed, grade_0, grade_1, smooth_sqrt
from scaling.algebra.spectra import cross
from scaling.ops.long_conv import Padding, geometric_long_conv
from scaling.ops.tokens import Tokens
from scaling.parallel.shard import SequenceShard

Scalars = Float[Tensor, "b c n"]
Vectors = Float[Tensor, "b c 3 n"]


class SE3Hyena(nn.Module):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        channels: channels between operators, each one scalar and one vector.
        hidden: multivector channels inside the Clifford MLPs.
        operators: long-convolution blocks.
        padding: "circular" over each row's own length, or "causal".
        chiral: let axial vectors join the polar ones.
        readout: scale of the initial read-out; small where the answer is near the input.
    """

    def __init__(
        self,
        vectors: int,
        scalars: int,
        channels: int = 16,
        hidden: int = 16,
        operators: int = 2,
        gate_hidden: int = 8,
        padding: Padding = "circular",
        chiral: bool = False,
        readout: float = 1.0,
    ) -> None:
        super().__init__()
        inputs = 1 + vectors
        self.embed_vectors = ChannelLinear(2 * inputs, channels)
        self.embed_scalars = ChannelLinear(scalars + inputs, channels, bias=True)
        self.operators = nn.ModuleList(
            HyenaOperator(channels, hidden, gate_hidden, padding, chiral) for _ in range(operators)
        )
        self.read_vectors = ChannelLinear(channels, inputs, gain=readout)
        self.read_scalars = ChannelLinear(channels, scalars, bias=True, gain=readout)

    def forward(self, batch: GeometricBatch, shard: SequenceShard | None = None) -> GeometricBatch:
        tokens = Tokens(batch.mask, shard)
        points, vectors = tokens.keep(batch.points), tokens.keep(batch.vectors)
        scalars = tokens.keep(batch.scalars)
        centred, _ = tokens.centre(points)
        given = torch.cat([centred.unsqueeze(1), vectors], 1)
        norms = torch.log1p(smooth_sqrt(given.square().sum(2)))
        x = self.embed_vectors(torch.cat([given, tokens.previous(given)], 1))
        f = self.embed_scalars(torch.cat([scalars, norms], 1))
        for operator in self.operators:
            f, x = operator(f, x, tokens)
        step = tokens.keep(self.read_vectors(x))
        return batch.replace(
            points=points + step[:, 0],
            vectors=vectors + step[:, 1:],
            scalars=scalars + tokens.keep(self.read_scalars(f)),
        )


class HyenaOperator(nn.Module):
    """One block: project, convolve, gate, project, add."""

    def __init__(
        self, channels: int, hidden: int, gate_hidden: int, padding: Padding, chiral: bool
    ) -> None:
        super().__init__()
        self.padding: Padding = padding
        self.chiral = chiral
        self.phi = CliffordMLP(channels, hidden, 3 * channels)
        self.gamma = CliffordMLP(channels, gate_hidden, 2 * channels)
        self.xi = CliffordMLP(channels, hidden, channels)
        self.w = nn.Parameter(torch.ones(5 + chiral, channels, 1))

    def forward(self, f: Scalars, x: Vectors, tokens: Tokens) -> tuple[Scalars, Vectors]:
        projected = self.phi(embed(f, x))
        qs, ks, vs = tokens.keep(grade_0(projected)).chunk(3, 1)
        q, k, v = tokens.keep(grade_1(projected)).chunk(3, 1)
        z = tokens.lengths.clamp(min=1).to(f.dtype).rsqrt().reshape(-1, 1, 1)
        a, u, axial = geometric_long_conv(
            (z * qs, z.unsqueeze(-1) * q), (ks, k), tokens.shard, self.padding, tokens.lengths
        )
        gate_a, gate_u = torch.sigmoid(grade_0(self.gamma(embed(a, u)))).chunk(2, 1)
        a, u, axial = gate_a * a, gate_u.unsqueeze(2) * u, gate_u.unsqueeze(2) * axial
        w = self.w
        g = f + w[0] * a * vs + w[1] * (u * v).sum(2)
        y = x + (w[2] * a).unsqueeze(2) * v + u * (w[3] * vs).unsqueeze(2)
        y = y + w[4].unsqueeze(1) * cross(axial, v)
        if self.chiral:
            y = y + w[5].unsqueeze(1) * axial
        update = self.xi(embed(g, y))
        return f + grade_0(update), x + grade_1(update)


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
