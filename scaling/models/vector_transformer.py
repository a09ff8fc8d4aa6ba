"""Vector self-attention in place of the long convolution: the SE(3)-Hyena paper's own rival.

    C_ij = q_i × k_j,   w_ij = softmax_j(|C_ij| / sqrt(N))
    u_i = (1/N) sum_j w_ij C_ij × v_j                     Eq. (5) of arXiv 2407.01049
    a_i = sum_j softmax_j(qs_i ks_j) vs_j                 scalars, of which the paper says nothing
    f, x <- f + xi_f(f + a, x + u),  x + xi_x(the same)

with qs, ks, vs, q, k, v = phi(f, x); phi and xi are Clifford MLPs as in SE3Hyena, each channel
attends alone, and N is the length of the token's body. The paper calls it SE(3)-Transformer, which
is the name of another model (Fuchs et al., arXiv 2006.10503).

Known slips. The paper's Code 2 crosses with v_i, not v_j: `values="own"`; then u_i is the mean of
S_ij C_ij, crossed with one vector. Both differ by more than u's own size. Norms over sqrt(N) leave
the softmax nearly uniform (entropy over log N 0.995 for 32 tokens of unit variance, 1.0000 for
2048), u falls as N^(-3/2), and orthogonal q and k are what is most alike: a weak rival. `scale=
"none"` leaves out 1/N, so that u does not vanish.
"""

from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor

from scaling.algebra.clifford import CliffordMLP, embed, grade_0, grade_1
from scaling.algebra.vectors import cross
from scaling.models.blocks import Block, Mask
from scaling.models.protocol import Channels
from scaling.models.streams import Scalars, StreamModel, Vectors
from scaling.ops.attention import VectorPairs, dot_attention
from scaling.ops.masked_rows import MaskedRows, zero_invalid
from scaling.ops.pairs import all_pairs


class VectorTransformer(StreamModel):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        channels: channels between blocks, each one scalar and one vector.
        hidden: multivector channels inside the Clifford MLPs.
        blocks: attention blocks.
        values: whose vector is crossed with: "others" (Eq. 5), or the token's "own" (Code 2).
        scale: "mean" (1/N, the paper's), or "none".
        readout: scale of the initial read-out; small where the answer is near the input.
        positions: sines and cosines of a token's place that join its scalars.
    """

    width = "hidden"

    def __init__(
        self,
        vectors: Channels,
        scalars: Channels,
        channels: Annotated[int, Ge(1)] = 16,
        hidden: Annotated[int, Ge(1)] = 16,
        blocks: Annotated[int, Ge(1)] = 2,
        values: Literal["others", "own"] = "others",
        scale: Literal["mean", "none"] = "mean",
        readout: float = 1.0,
        positions: Annotated[int, Ge(0)] = 16,
    ) -> None:
        made = (VectorAttention(channels, hidden, values, scale) for _ in range(blocks))
        super().__init__(vectors, scalars, channels, made, readout, positions)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {"channels": 4, "hidden": 4, "scale": "none"}


class VectorAttention(Block):
    """One block."""

    def __init__(self, channels: int, hidden: int, values: str, scale: str) -> None:
        super().__init__()
        self.own_values, self.mean = values == "own", scale == "mean"
        self.phi = CliffordMLP(channels, hidden, 3 * channels, grades=2)
        self.xi = CliffordMLP(channels, hidden, channels, grades=2)

    def project(self, f: Scalars, x: Vectors, mask: Mask) -> tuple[Tensor, ...]:
        projected = self.phi(embed(f, x))
        scalars = zero_invalid(grade_0(projected), mask).chunk(3, 1)
        vectors = zero_invalid(grade_1(projected), mask).chunk(3, 1)
        return *scalars, *vectors

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
        a = dot_attention(qs.unsqueeze(2), ks.unsqueeze(2), vs.unsqueeze(2), rows)
        z = rows.length_to(-0.5, qs).unsqueeze(2)
        keys = [k] if self.own_values else [k, v]
        u = all_pairs(VectorPairs(), [z * q], keys, rows)  # z times the sum
        u = cross(u, v) if self.own_values else u
        power = -0.5 if self.mean else 0.5
        return a.squeeze(2), rows.length_to(power, qs).unsqueeze(2) * u

    def mix(self, f: Scalars, x: Vectors, a: Scalars, u: Vectors) -> tuple[Scalars, Vectors]:
        update = self.xi(embed(f + a, x + u))
        return f + grade_0(update), x + grade_1(update)
