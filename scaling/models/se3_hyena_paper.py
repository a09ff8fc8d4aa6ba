"""SE(3)-Hyena as its paper has it (Algorithm 1 of arXiv 2407.01049); trains poorly, see below.

With xc the centred positions and f the scalars, one operator is

    qs, ks, vs, q, k, v = phi(f, xc)
    u = (1/N) sum_j q_j × k_{i-j},  a = sum_j qs_j ks_{i-j}         indices modulo N
    g = sigmoid(gamma(a, u));  u <- g_v u;  a <- g_s a
    f, x <- xi(f + a vs, xc + u × v), positions uncentred

How its ambiguities are read here:

- Eqs. (2) and (3), as printed, are no convolutions; Code 1 is what is computed.
- "Grade-one" scalars and "grade-two" vectors count from 1: grades 0 and 1.
- The text on gates swaps cross and element-wise products; Algorithm 1 is followed.
- Scalars enter as one multivector channel each, vectors likewise; phi gives S-wide scalar streams,
  so that f + a·vs exists, and one vector stream a vector channel (the paper has one vector).
- Clifford MLPs have 2 layers and end in their norm, so outputs have norm 1 whatever the input's
  scale: magnitudes cannot be regressed. `final` adds a last linear map.
- No residual connection around an operator is given; `residual` adds one.
- One gate a stream. Depth and widths of Clifford MLPs are not given beyond hidden and gate width.
- N is the row's true length; the padding of a batch, of which nothing is said, changes nothing.

1/N makes the vector branch vanish on long sequences (its rms falls as N^(-1/2)), and with one
vector q, k and v are parallel to it token by token. The default model, SE3Hyena, mends both.

Where all points of a row coincide and its scalars are 0, every multivector is 0, each of the norms
multiplies the gradient by up to 1e4 (they are smoothed at 1e-4), and three operators make 1e22 of
it. Nothing in the paper forbids it: clip gradients, or leave such rows out.
"""

from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.algebra.clifford import CliffordMLP, embed, grade_0, grade_1
from scaling.algebra.vectors import cross
from scaling.long_conv.operators import scalar_long_conv, vector_long_conv
from scaling.models.blocks import Block, Mask
from scaling.models.protocol import Channels, Model
from scaling.models.streams import OfBody, Scalars, Vectors
from scaling.ops.masked_rows import MaskedRows, zero_invalid
from scaling.ops.offload import offloading
from scaling.parallel.shard import SequenceShard


class SE3HyenaPaper(Model):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels S of the input.
        hidden: multivector channels inside phi and xi (paper: 128 for recall, 16 for n-body).
        gate_hidden: those inside gamma (paper: 8).
        operators: blocks (paper: 3 for recall).
        residual: add each operator's input to its output.
        final: a last linear map in phi and xi.
    """

    width = "hidden"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        hidden: Annotated[int, Ge(1)] = 16,
        gate_hidden: Annotated[int, Ge(1)] = 8,
        operators: Annotated[int, Ge(1)] = 3,
        residual: bool = False,
        final: bool = False,
    ) -> None:
        super().__init__(vectors, scalars)
        self.operators = nn.ModuleList(
            PaperOperator(scalars, 1 + vectors, hidden, gate_hidden, residual, final)
            for _ in range(operators)
        )

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"hidden": 6, "gate_hidden": 4, "operators": 2}

    def move(self, batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
        rows = MaskedRows.of(batch, shard)
        f = rows.zero_invalid(batch.scalars)
        x = rows.zero_invalid(torch.cat([batch.points.unsqueeze(1), batch.vectors], 1))
        with offloading(self.execution):
            for operator in self.operators:
                positions, centre = rows.centre(x[:, :1])
                f, y = operator(f, torch.cat([positions, x[:, 1:]], 1), rows=rows)
                x = rows.zero_invalid(torch.cat([y[:, :1] + centre, y[:, 1:]], 1))
        return batch.replace(points=x[:, 0], vectors=x[:, 1:], scalars=rows.zero_invalid(f))


class PaperOperator(Block):
    """Algorithm 1 on S scalars and V centred vectors."""

    def __init__(
        self, scalars: int, vectors: int, hidden: int, gate_hidden: int, residual: bool, final: bool
    ) -> None:
        super().__init__()
        self.scalars, self.vectors, self.residual = scalars, vectors, residual
        channels = scalars + vectors
        self.phi = CliffordMLP(channels, hidden, 3 * channels, final=final, grades=2)
        self.gamma = CliffordMLP(channels, gate_hidden, 2, final=final, grades=1)
        self.xi = CliffordMLP(channels, hidden, channels, final=final, grades=2)

    def project(self, f: Scalars, x: Vectors, mask: Mask) -> tuple[Tensor, ...]:
        projected = self.phi(self._embed(f, x))
        scalars = zero_invalid(grade_0(projected[:, :, : 3 * self.scalars]), mask)
        vectors = zero_invalid(grade_1(projected[:, :, 3 * self.scalars :]), mask)
        return *scalars.chunk(3, 1), *vectors.chunk(3, 1)

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
        budget, spans = self.execution.workspace_bytes, rows.spans
        a = scalar_long_conv(qs, ks, workspace_bytes=budget, **spans)
        u = vector_long_conv(q, k, workspace_bytes=budget, **spans)
        return vs, v, rows.length_to(-1.0, qs), a, u

    def mix(
        self, f: Scalars, x: Vectors, vs: Scalars, v: Vectors, z: OfBody, a: Scalars, u: Vectors
    ) -> tuple[Scalars, Vectors]:
        u = z.unsqueeze(2) * u
        gate_a, gate_u = torch.sigmoid(grade_0(self.gamma(self._embed(a, u)))).chunk(2, 1)
        a, u = gate_a * a, gate_u.unsqueeze(2) * u
        mixed = self.xi(self._embed(f + a * vs, x + cross(u, v)))
        g, y = grade_0(mixed[:, :, : self.scalars]), grade_1(mixed[:, :, self.scalars :])
        return (f + g, x + y) if self.residual else (g, y)

    def _embed(self, f: Scalars, x: Vectors) -> Float[Tensor, "b 4 m n"]:
        """Scalars and vectors as multivector channels of their own: (b, 4, S + V, n)."""
        rows, vectors, _, n = x.shape
        no_vectors = x.new_zeros(rows, self.scalars, 3, n)
        no_scalars = f.new_zeros(rows, vectors, n)
        return embed(torch.cat([f, no_scalars], 1), torch.cat([no_vectors, x], 1))
