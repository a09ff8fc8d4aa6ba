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
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.algebra.clifford import CliffordMLP, embed, grade_0, grade_1
from scaling.algebra.vectors import cross
from scaling.long_conv.operators import scalar_long_conv, vector_long_conv
from scaling.ops.masked_rows import MaskedRows, zero_invalid
from scaling.ops.offload import offloading
from scaling.ops.tiles import Tiled
from scaling.parallel.shard import SequenceShard

Scalars = Float[Tensor, "b s n"]
Vectors = Float[Tensor, "b v 3 n"]
Mask = Bool[Tensor, "b n"]


class SE3HyenaPaper(Tiled):
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

    gathers_whole = False

    def __init__(
        self,
        vectors: int,
        scalars: int,
        hidden: int = 16,
        gate_hidden: int = 8,
        operators: int = 3,
        residual: bool = False,
        final: bool = False,
    ) -> None:
        super().__init__()
        self.operators = nn.ModuleList(
            PaperOperator(scalars, 1 + vectors, hidden, gate_hidden, residual, final)
            for _ in range(operators)
        )

    def forward(self, batch: GeometricBatch, shard: SequenceShard | None = None) -> GeometricBatch:
        tokens = MaskedRows(batch.mask, shard)
        f = tokens.zero_invalid(batch.scalars)
        x = tokens.zero_invalid(torch.cat([batch.points.unsqueeze(1), batch.vectors], 1))
        with offloading(self.execution):
            for operator in self.operators:
                positions, centre = tokens.centre(x[:, :1])
                f, y = operator(f, torch.cat([positions, x[:, 1:]], 1), tokens)
                x = tokens.zero_invalid(torch.cat([y[:, :1] + centre, y[:, 1:]], 1))
        return batch.replace(points=x[:, 0], vectors=x[:, 1:], scalars=tokens.zero_invalid(f))


class PaperOperator(Tiled):
    """Algorithm 1 on S scalars and V centred vectors."""

    def __init__(
        self, scalars: int, vectors: int, hidden: int, gate_hidden: int, residual: bool, final: bool
    ) -> None:
        super().__init__()
        self.scalars = scalars
        self.residual = residual
        channels = scalars + vectors
        self.phi = CliffordMLP(channels, hidden, 3 * channels, final=final, grades=2)
        self.gamma = CliffordMLP(channels, gate_hidden, 2, final=final, grades=1)
        self.xi = CliffordMLP(channels, hidden, channels, final=final, grades=2)

    def forward(self, f: Scalars, x: Vectors, tokens: MaskedRows) -> tuple[Scalars, Vectors]:
        def block(f: Scalars, x: Vectors) -> tuple[Scalars, Vectors]:
            qs, ks, vs, q, k, v = self.in_tiles(self.project, f, x, tokens.mask)
            shared = {
                "shard": tokens.shard,
                "lengths": tokens.lengths,
                "workspace_bytes": self.execution.workspace_bytes,
            }
            a, u = scalar_long_conv(qs, ks, **shared), vector_long_conv(q, k, **shared)
            z = 1 / tokens.lengths.clamp(min=1).to(f.dtype).reshape(-1, 1, 1)
            return self.in_tiles(self.mix, f, x, vs, v, a, u, z)

        return self.recompute(block, f, x) if self.execution.recompute_operators else block(f, x)

    def project(self, f: Scalars, x: Vectors, mask: Mask) -> tuple[Tensor, ...]:
        """Queries, keys and values: qs, ks, vs and q, k, v."""
        projected = self.phi(self._embed(f, x))
        scalars = zero_invalid(grade_0(projected[:, :, : 3 * self.scalars]), mask)
        vectors = zero_invalid(grade_1(projected[:, :, 3 * self.scalars :]), mask)
        return *scalars.chunk(3, 1), *vectors.chunk(3, 1)

    def mix(
        self,
        f: Scalars,
        x: Vectors,
        vs: Scalars,
        v: Vectors,
        a: Scalars,
        u: Vectors,
        z: Float[Tensor, "b 1 1"],
    ) -> tuple[Scalars, Vectors]:
        """Gates the convolutions, multiplies by values, and what xi makes of it."""
        u = z.unsqueeze(2) * u
        gate_a, gate_u = torch.sigmoid(grade_0(self.gamma(self._embed(a, u)))).chunk(2, 1)
        a, u = gate_a * a, gate_u.unsqueeze(2) * u
        mixed = self.xi(self._embed(f + a * vs, x + cross(u, v)))
        g, y = grade_0(mixed[:, :, : self.scalars]), grade_1(mixed[:, :, self.scalars :])
        return (f + g, x + y) if self.residual else (g, y)

    def _embed(self, f: Scalars, x: Vectors) -> Float[Tensor, "b 4 c n"]:
        """Scalars and vectors as multivector channels of their own: (b, 4, S + V, n)."""
        rows, vectors, _, n = x.shape
        no_vectors, no_scalars = (
            x.new_zeros(rows, self.scalars, 3, n),
            f.new_zeros(rows, vectors, n),
        )
        return embed(torch.cat([f, no_scalars], 1), torch.cat([no_vectors, x], 1))
