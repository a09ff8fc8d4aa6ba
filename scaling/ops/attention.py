"""Vector self-attention, the SE(3)-Hyena paper's rival of the vector long convolution.

    C_ij = q_i × k_j,   w_ij = softmax_j(|C_ij| / sqrt(N)),   u_i = (1/N) sum_j w_ij C_ij × v_j

It is Eq. (5) of arXiv 2407.01049; the paper's Code 2 crosses with v_i instead, which leaves one
vector for all values. A weak rival: norms over sqrt(N) make the softmax nearly uniform (entropy
over log N is 0.995 for 32 tokens of unit variance, 1.0000 for 2048), u falls as N^-1.5, and
orthogonal q and k are what is most alike.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.errors import ConfigError, ShapeError
from scaling.algebra.vectors import cross

Vectors = Float[Tensor, "*b 3 n"]
BLOCK = 256
"""Queries, and keys, of a block: its pairs fit a CPU's cache."""


def vector_attention(q: Vectors, k: Vectors, v: Vectors, block: int | None = None) -> Vectors:
    """u_i = (1/N) sum_j softmax_j(|q_i × k_j| / sqrt(N)) (q_i × k_j) × v_j, each channel alone.

    Polar q, k and v give a polar u. O(N²) time.

    Args:
        block: None: to the letter, all N² pairs at once and kept for the backward pass, O(N²)
            memory. Else that many queries and keys at once with running maximum and sum (Dao et
            al., arXiv 2205.14135), O(N + block²) memory; pairs are computed again for the gradient,
            and there is no second derivative.

    Raises:
        ShapeError: q, k and v differ in shape or dtype.
        ConfigError: block < 1.
    """
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        shown = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ShapeError(f"q, k and v must have one shape and dtype, not {shown}")
    if block is not None:
        if block < 1:
            raise ConfigError(f"block={block}: attend to at least one token at once")
        return _BlockedAttention.apply(q, k, v, block)
    pairs = cross(q.unsqueeze(-1), k.unsqueeze(-2), dim=-3)
    w = torch.softmax(torch.linalg.vector_norm(pairs, dim=-3) / math.sqrt(q.shape[-1]), -1)
    return (w.unsqueeze(-3) * cross(pairs, v.unsqueeze(-2), dim=-3)).mean(-1)


class _BlockedAttention(torch.autograd.Function):
    """Blocks of pairs by matrix products: (q × k) × v = (q·v) k - (k·v) q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        n = q.shape[-1]
        u, normaliser = torch.empty_like(q), q.new_empty(*q.shape[:-2], n)
        for i in _blocks(n, block):
            most = q.new_full((*q.shape[:-2], i.stop - i.start), -math.inf)
            total, values = torch.zeros_like(most), torch.zeros_like(q[..., i])
            for j in _blocks(n, block):
                logits = _logits(q[..., i], k[..., j], n)
                larger = torch.maximum(most, logits.amax(-1))
                shrink, w = (most - larger).exp(), (logits - larger.unsqueeze(-1)).exp()
                total = shrink * total + w.sum(-1)
                found = _weighted(w, q[..., i], k[..., j], v[..., j])
                values, most = shrink.unsqueeze(-2) * values + found, larger
            u[..., i] = values / (n * total.unsqueeze(-2))
            normaliser[..., i] = most + total.log()
        ctx.save_for_backward(q, k, v, u, normaliser)
        ctx.block = block
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With w_ij = exp(logit_ij - normaliser_i), block by block the gradient of
        sum_ij w_ij (g_i·(C_ij × v_j) / N - g_i·u_i), where the last term is held constant."""
        q, k, v, u, normaliser = ctx.saved_tensors
        n, g = q.shape[-1], grads[0]
        mean = (g * u).sum(-2)
        found = [torch.zeros_like(x) for x in (q, k, v)]
        for i in _blocks(n, ctx.block):
            for j in _blocks(n, ctx.block):
                places = (i, j, j)
                cut = [
                    x[..., at].detach().requires_grad_()
                    for x, at in zip((q, k, v), places, strict=True)
                ]
                with torch.enable_grad():
                    w = (_logits(cut[0], cut[1], n) - normaliser[..., i].unsqueeze(-1)).exp()
                    part = (g[..., i] * _weighted(w, *cut)).sum() / n
                    part = part - (mean[..., i] * w.sum(-1)).sum()
                here = torch.autograd.grad(part, cut)
                for total, at, grad in zip(found, places, here, strict=True):
                    total[..., at] += grad
        return *found, None


def _blocks(n: int, block: int) -> Iterator[slice]:
    for start in range(0, n, block):
        yield slice(start, min(start + block, n))


def _logits(q: Tensor, k: Tensor, n: int) -> Float[Tensor, "*b i j"]:
    """|q_i × k_j| / sqrt(n), as the root of |q_i|² |k_j|² - (q_i·k_j)²."""
    squares = q.square().sum(-2).unsqueeze(-1) * k.square().sum(-2).unsqueeze(-2)
    squares = squares - (q.mT @ k).square()
    # Parallel vectors: rounding must not make a root of less than 0, nor an infinite slope.
    return squares.clamp(min=torch.finfo(q.dtype).tiny).sqrt() / math.sqrt(n)


def _weighted(w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "*b 3 i"]:
    """sum_j w_ij (q_i × k_j) × v_j."""
    first = k @ (w * (q.mT @ v)).mT
    return first - (w @ (k * v).sum(-2).unsqueeze(-1)).mT * q
