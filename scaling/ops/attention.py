"""Vector self-attention, the SE(3)-Hyena paper's rival of the vector long convolution.

    C_ij = q_i × k_j,   w_ij = softmax_j(|C_ij| / sqrt(N)),   u_i = (1/N) sum_j w_ij C_ij × v_j

It is Eq. (5) of arXiv 2407.01049; the paper's Code 2 crosses with v_i instead, which leaves one
vector for all values. A weak rival: norms over sqrt(N) make the softmax nearly uniform (entropy
over log N is 0.995 for 32 tokens of unit variance, 1.0000 for 2048), u falls as N^-1.5, and
orthogonal q and k are what is most alike.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.errors import ShapeError
from scaling.algebra.vectors import cross
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.pairs import SoftmaxTerms, all_pairs
from scaling.parallel.shard import SequenceShard

Vectors = Float[Tensor, "*b 3 n"]


def vector_attention(
    q: Vectors,
    k: Vectors,
    v: Vectors,
    block: int | None = None,
    shard: SequenceShard | None = None,
) -> Vectors:
    """u_i = (1/N) sum_j softmax_j(|q_i × k_j| / sqrt(N)) (q_i × k_j) × v_j, each channel alone.

    Polar q, k and v give a polar u. O(N²) time.

    Args:
        block: None: to the letter, all N² pairs at once and kept for the backward pass, O(N²)
            memory. Else that many queries and keys at once, O(N + block²) memory: `all_pairs`.
        shard: which tokens of the sequence these are; always in blocks then.

    Raises:
        ShapeError: q, k and v differ in shape or dtype.
        OptionError: block < 1.
    """
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        shown = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ShapeError(f"q, k and v must have one shape and dtype, not {shown}")
    n = max(q.shape[-1] if shard is None else shard.length, 1)
    if block is not None or shard is not None:
        x, y, z = (each.reshape(-1, 1, *each.shape[-2:]) for each in (q, k, v))
        rows = MaskedRows(torch.ones(len(x), x.shape[-1], dtype=torch.bool, device=q.device), shard)
        u = all_pairs(VectorPairs(), [x / math.sqrt(n)], [y, z], rows, block=block)
        return (u / math.sqrt(n)).reshape(q.shape)
    pairs = cross(q.unsqueeze(-1), k.unsqueeze(-2), dim=-3)
    w = torch.softmax(torch.linalg.vector_norm(pairs, dim=-3) / math.sqrt(n), -1)
    return (w.unsqueeze(-3) * cross(pairs, v.unsqueeze(-2), dim=-3)).mean(-1)


def dot_attention(
    q: Float[Tensor, "b h d n"],
    k: Float[Tensor, "b h d n"],
    v: Float[Tensor, "b h e n"],
    rows: MaskedRows,
    causal: bool = False,
) -> Float[Tensor, "b h e n"]:
    """u_i = sum_j softmax_j(q_i·k_j / sqrt(d)) v_j over the valid tokens of i's body, h heads apart
    (Vaswani et al., arXiv 1706.03762). O(N²) time, O(N) memory."""
    return all_pairs(DotPairs(), [q / math.sqrt(q.shape[2])], [k, v], rows, causal=causal)


def split_heads(x: Float[Tensor, "b c ... n"], heads: int) -> Float[Tensor, "b h d n"]:
    """Channels in `heads` groups, each with all numbers of its channels."""
    return x.unflatten(1, (heads, -1)).flatten(2, -2)


class DotPairs(SoftmaxTerms):
    """Logits q·k."""

    def logits(
        self, q: Sequence[Tensor], k: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Float[Tensor, "b h i j"]:
        return q[0].mT @ k[0]

    def weighted(
        self,
        w: Float[Tensor, "b h i j"],
        q: Sequence[Tensor],
        k: Sequence[Tensor],
        shared: Sequence[Tensor],
    ) -> Float[Tensor, "b h d i"]:
        """sum_j w_ij v_j."""
        return k[1] @ w.mT


class VectorPairs(SoftmaxTerms):
    """Logits |q × k|; by matrix products: (q × k) × v = (q·v) k - (k·v) q."""

    def logits(
        self, q: Sequence[Tensor], k: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Float[Tensor, "b h i j"]:
        """As the root of |q_i|² |k_j|² - (q_i·k_j)²."""
        (x,), y = q, k[0]
        squares = x.square().sum(-2).unsqueeze(-1) * y.square().sum(-2).unsqueeze(-2)
        squares = squares - (x.mT @ y).square()
        # Parallel vectors: rounding must not make a root of less than 0, nor an infinite slope.
        return squares.clamp(min=torch.finfo(x.dtype).tiny).sqrt()

    def weighted(
        self,
        w: Float[Tensor, "b h i j"],
        q: Sequence[Tensor],
        k: Sequence[Tensor],
        shared: Sequence[Tensor],
    ) -> Float[Tensor, "b h d i"]:
        """sum_j w_ij (q_i × k_j) × v_j; without v, sum_j w_ij q_i × k_j."""
        (x,), y, *values = q, *k
        if not values:
            return cross(x, y @ w.mT)
        (v,) = values
        first = y @ (w * (x.mT @ v)).mT
        return first - (w @ (y * v).sum(-2).unsqueeze(-1)).mT * x
