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

`salience` multiplies qs and q by S s, a linear map of the input's scalars s after each has lost its
mean over the row and has rms 1 there. What marks a single token then weighs as much as what marks
thousands, so that a lone question is not drowned at any length: without, it starts at 1/N of the
energy of q, and its influence has to be found among the noise of all others.

Vectors enter with their predecessors' (a key has to meet the next token) and with their norms as
scalars, so that magnitudes survive the norms inside the Clifford MLPs.
"""

from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import OptionError
from scaling.algebra.clifford import CliffordMLP, embed, grade_0, grade_1
from scaling.algebra.norms import smooth_sqrt
from scaling.algebra.vectors import cross
from scaling.long_conv.operators import Padding, geometric_long_conv
from scaling.models.blocks import Block, Mask
from scaling.models.messages import ContextTokens, LocalMessages, Messages
from scaling.models.protocol import Channels
from scaling.models.streams import OfBody, Scalars, StreamModel, Vectors
from scaling.ops.masked_rows import MaskedRows, zero_invalid


class SE3Hyena(StreamModel):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        channels: channels between operators, each one scalar and one vector.
        hidden: multivector channels inside the Clifford MLPs.
        operators: long-convolution blocks.
        layers: of the Clifford MLPs.
        local: width of an MLP that weighs a token's own vectors (its and the one before's) into the
            vector channels by their products; 0: none.
        normalise: keys and values have norm 1.
        messages: a local branch before the first operator, between all "pairs" or "neighbours".
        neighbours: of each token, at most.
        context: tokens of each body that attend to all of it, and all to them; 0: none.
        padding: "circular" over each row's own length, or "causal".
        chiral: let axial vectors join the polar ones.
        readout: scale of the initial read-out; small where the answer is near the input.
        salience: weigh the tokens of q by their standardised scalars.

    Raises:
        OptionError: salience without scalars.
    """

    width = "hidden"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        channels: Annotated[int, Ge(1)] = 16,
        hidden: Annotated[int, Ge(1)] = 16,
        operators: Annotated[int, Ge(1)] = 2,
        gate_hidden: Annotated[int, Ge(1)] = 8,
        padding: Padding = "circular",
        chiral: bool = False,
        readout: float = 1.0,
        salience: bool = False,
        layers: Annotated[int, Ge(1)] = 1,
        local: Annotated[int, Ge(0)] = 0,
        normalise: bool = False,
        messages: Messages = "none",
        neighbours: Annotated[int, Ge(1)] = 16,
        context: Annotated[int, Ge(0)] = 0,
    ) -> None:
        if salience and not scalars:
            raise OptionError("salience", True, "needs scalars, and the task gives none")
        listens = scalars * salience
        blocks = (
            HyenaOperator(
                channels, hidden, gate_hidden, padding, chiral, listens, layers, normalise
            )
            for _ in range(operators)
        )
        super().__init__(vectors, scalars, channels, blocks, readout, local=local)
        self.symmetry = "SE(3)" if chiral else "E(3)"
        self.salience = salience
        self.messages = self.context = None
        self.neighbours = neighbours * (messages == "neighbours")
        if messages != "none":
            self.messages = LocalMessages(channels, messages, neighbours)
        if context:
            self.context = ContextTokens(channels, context)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"channels": 4, "hidden": 4, "gate_hidden": 4, "operators": 2}

    def features(self, batch: GeometricBatch, rows: MaskedRows) -> tuple[Tensor, ...]:
        return (rows.standardise(batch.scalars) if self.salience else batch.scalars[:, :0],)

    def prepare(
        self, f: Scalars, x: Vectors, batch: GeometricBatch, rows: MaskedRows
    ) -> tuple[Scalars, Vectors]:
        if self.messages is not None:
            f, x = self.messages(f, x, batch, rows)
        return f if self.context is None else self.context(f, rows), x


class HyenaOperator(Block):
    """One block: project, convolve, mix."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        gate_hidden: int,
        padding: Padding,
        chiral: bool,
        scalars: int,
        layers: int = 1,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.padding: Padding = padding
        self.chiral, self.normalise = chiral, normalise
        self.phi = CliffordMLP(channels, hidden, 3 * channels, layers, grades=2)
        self.gamma = CliffordMLP(channels, gate_hidden, 2 * channels, layers, grades=1)
        self.xi = CliffordMLP(channels, hidden, channels, layers, grades=2)
        self.w = nn.Parameter(torch.ones(5 + chiral, channels, 1))
        # Every channel begins with one scalar, in turn.
        listens = torch.eye(scalars)[torch.arange(channels) % scalars] if scalars else None
        self.salience = None if listens is None else nn.Parameter(listens)

    def project(
        self, f: Scalars, x: Vectors, s: Float[Tensor, "b s n"], mask: Mask
    ) -> tuple[Tensor, ...]:
        projected = self.phi(embed(f, x))
        qs, ks, vs = zero_invalid(grade_0(projected), mask).chunk(3, 1)
        q, k, v = zero_invalid(grade_1(projected), mask).chunk(3, 1)
        if self.normalise:
            ks, k = unit(ks, k)
            vs, v = unit(vs, v)
        if self.salience is not None:
            weight = self.salience @ s
            qs, q = weight * qs, weight.unsqueeze(2) * q
        return qs, ks, vs, q, k, v

    def across(
        self,
        rows: MaskedRows,
        qs: Scalars,
        ks: Scalars,
        vs: Scalars,
        q: Vectors,
        k: Vectors,
        v: Vectors,
    ) -> tuple[Tensor, ...]:
        budget = self.execution.workspace_bytes
        a, u, axial = geometric_long_conv(
            (qs, q), (ks, k), padding=self.padding, workspace_bytes=budget, **rows.spans
        )
        return vs, v, rows.length_to(-0.5, qs), a, u, axial

    def mix(
        self,
        f: Scalars,
        x: Vectors,
        vs: Scalars,
        v: Vectors,
        z: OfBody,
        a: Scalars,
        u: Vectors,
        axial: Vectors,
    ) -> tuple[Scalars, Vectors]:
        a, u, axial = z * a, z.unsqueeze(2) * u, z.unsqueeze(2) * axial
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


def unit(scalars: Scalars, vectors: Vectors) -> tuple[Scalars, Vectors]:
    """Each channel's four numbers with norm 1."""
    norm = smooth_sqrt(scalars.square() + vectors.square().sum(2)) + 1e-6
    return scalars / norm, vectors / norm.unsqueeze(2)
