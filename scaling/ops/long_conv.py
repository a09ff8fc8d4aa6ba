"""Long convolutions of two sequences by FFT; both operands are data, every token sees all tokens.

The formulas, with * for the sum over j and k_{i-j} read modulo the row's length (circular) or as
zero outside the row (causal):

    scalar      u_i = sum_j q_j k_{i-j}
    vector      u_i = sum_j q_j × k_{i-j}          SE(3)-Hyena, arXiv 2407.01049, Code 1
    geometric   a = qs*ks + q*.k    u = qs*k + ks*q    ua = q*×k

Code 1 is what that paper computes; its Eq. (2), read literally, is not a convolution. The cross
product is taken between spectra: 9 transforms a vector channel instead of 18.

Without a shard these run on one process, as plain torch operations with torch's own gradients: the
oracle of scaling.parallel.long_conv, which serves the same functions on a sharded sequence.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_pipeline.errors import ConfigError, ShapeError
from scaling.algebra.spectra import (
    CROSS,
    GEOMETRIC,
    SCALAR,
    Bilinear,
    fold_factor,
    transform_length,
)
from scaling.parallel import long_conv as distributed
from scaling.parallel.shard import SequenceShard

Padding = Literal["circular", "causal"]


def scalar_long_conv(
    q: Float[Tensor, "*b n"],
    k: Float[Tensor, "*b n"],
    shard: SequenceShard | None = None,
    padding: Padding = "circular",
    lengths: Int[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*b n"]:
    """Convolution along the sequence: u_i = sum_j q_j k_{i-j}; no 1/N inside.

    circular: indices modulo the row's own length. causal: k is zero outside the row, nothing wraps,
    and u_i depends on tokens 0..i alone. With a cyclic shard, q and k are this rank's tokens;
    values and gradients equal the one-process result for any length, number of channels and ranks,
    in 3 all-to-alls forward and 3 backward. O(N log N / P) time and O(N / P) memory.

    Half-precision inputs are transformed in float32; the result has q's dtype. Centre the inputs
    first: a float32 transform of a signal with mean m loses about log10(m·sqrt(N)) digits.

    Args:
        lengths: true length of each row of the first axis; tokens beyond it are ignored, whatever
            they hold, and their result is 0. None: all rows are full.

    Raises:
        ShapeError: q, k, lengths and the shard disagree (the text shows shapes and dtypes).
        ConfigError: unknown padding, or a shard whose layout is not cyclic.
    """
    _check(q, k, shard, padding, lengths, components=0)
    u = _convolve(SCALAR, q.unsqueeze(-2), k.unsqueeze(-2), shard, padding, lengths)
    return u.squeeze(-2)


def vector_long_conv(
    q: Float[Tensor, "*b 3 n"],
    k: Float[Tensor, "*b 3 n"],
    shard: SequenceShard | None = None,
    padding: Padding = "circular",
    lengths: Int[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*b 3 n"]:
    """Cross-product convolution along the sequence: u_i = sum_j q_j × k_{i-j}; no 1/N inside.

    Polar q and k give an axial u. Everything else is as in `scalar_long_conv`.
    """
    _check(q, k, shard, padding, lengths, components=3)
    return _convolve(CROSS, q, k, shard, padding, lengths)


def geometric_long_conv(
    q: tuple[Float[Tensor, "*b n"], Float[Tensor, "*b 3 n"]],
    k: tuple[Float[Tensor, "*b n"], Float[Tensor, "*b 3 n"]],
    shard: SequenceShard | None = None,
    padding: Padding = "circular",
    lengths: Int[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, "*b n"], Float[Tensor, "*b 3 n"], Float[Tensor, "*b 3 n"]]:
    """All products of (scalar, vector) operands in one pass: (qs, q), (ks, k) -> (a, u, ua).

    a = qs*ks + q*.k is a polar scalar, u = qs*k + ks*q a polar vector, ua = q*×k an axial vector:
    4 numbers a channel and operand travel in, 7 out. Else as in `scalar_long_conv`.
    """
    (qs, qv), (ks, kv) = q, k
    _check(qs, ks, shard, padding, lengths, components=0)
    _check(qv, kv, shard, padding, lengths, components=3)
    if qv.shape[:-2] + qv.shape[-1:] != qs.shape or qs.dtype != qv.dtype:
        raise ShapeError(f"scalars {tuple(qs.shape)} and vectors {tuple(qv.shape)} disagree")
    left, right = (torch.cat([s.unsqueeze(-2), v], -2) for s, v in (q, k))
    result = _convolve(GEOMETRIC, left, right, shard, padding, lengths)
    a, u, axial = result.split([1, 3, 3], -2)
    return a.squeeze(-2), u, axial


def _convolve(
    product: Bilinear,
    q: Float[Tensor, "*b c n"],
    k: Float[Tensor, "*b c n"],
    shard: SequenceShard | None,
    padding: Padding,
    lengths: Int[Tensor, " rows"] | None,
) -> Float[Tensor, "*b d n"]:
    result_dtype = q.dtype
    q, k = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (q, k))
    total = q.shape[-1] if shard is None else shard.length
    beyond = None
    if lengths is not None:
        index = torch.arange(total) if shard is None else shard.index
        rows = lengths.reshape(-1, *[1] * (q.ndim - 1))
        beyond = index.to(q.device) >= rows.to(q.device)
        q, k = q.masked_fill(beyond, 0), k.masked_fill(beyond, 0)  # also where they hold NaN
    row_lengths = [total] if lengths is None else lengths.tolist()
    wraps = row_lengths if padding == "circular" else None
    if total == 0 or 0 in q.shape[:-1]:
        u = product.forward(q, k)  # no token, row or channel: nothing to convolve, on any rank
    elif shard is None or shard.size == 1:
        u = _local(product, q, k, wraps)
    else:
        u = distributed.long_conv(product, q, k, shard, wraps)
    if beyond is not None:
        u = u.masked_fill(beyond, 0)
    return u.to(result_dtype)


def _local(product: Bilinear, q: Tensor, k: Tensor, wraps: list[int] | None) -> Tensor:
    """One process. wraps: lengths at which the rows wrap (one for all, or one each), or None."""
    length = q.shape[-1]
    transform, fold = transform_length(length, 1, wraps)
    spectrum = product.forward(torch.fft.rfft(q, transform), torch.fft.rfft(k, transform))
    if fold:
        assert wraps is not None
        bins = torch.arange(transform // 2 + 1, device=q.device)
        factor = fold_factor(bins, wraps, transform, spectrum.dtype)
        spectrum = spectrum * factor.reshape(-1, *[1] * (q.ndim - 2), len(bins))
    return torch.fft.irfft(spectrum, transform)[..., :length]


def _check(
    q: Tensor,
    k: Tensor,
    shard: SequenceShard | None,
    padding: Padding,
    lengths: Tensor | None,
    components: int,
) -> None:
    """Every rank checks the same facts, so all raise or none."""
    if padding not in get_args(Padding):
        raise ConfigError(f"unknown padding {padding!r}; use one of {get_args(Padding)}")
    if q.shape != k.shape:
        raise ShapeError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must have one shape")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ShapeError(f"q {q.dtype} and k {k.dtype} must have one real floating-point dtype")
    if components and (q.ndim < 2 or q.shape[-2] != components):
        raise ShapeError(f"vectors need shape (..., {components}, n), not {tuple(q.shape)}")
    if shard is not None and shard.layout != "cyclic":
        raise ConfigError(f"a long convolution needs a cyclic shard, not {shard.layout}")
    if shard is not None and q.shape[-1] != shard.n_local:
        raise ShapeError(f"{shard} holds {shard.n_local} tokens, but q is {tuple(q.shape)}")
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"lengths are {lengths.dtype}; count tokens in int64")
    total = q.shape[-1] if shard is None else shard.length
    if q.ndim < 2 + bool(components) or lengths.shape != q.shape[:1]:
        raise ShapeError(
            f"lengths {tuple(lengths.shape)} must be one a row of the first axis of"
            f" {tuple(q.shape)}"
        )
    if not all(0 <= length <= total for length in lengths.tolist()):
        raise ShapeError(f"lengths {lengths.tolist()} must lie between 0 and {total}")
