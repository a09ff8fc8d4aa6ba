"""Long convolutions of two sequences by FFT: every token sees all tokens.

The formulas, with * for the sum over j and k_{i-j} read modulo the row's length (circular) or as
zero outside the row (causal):

    scalar      u_i = sum_j q_j k_{i-j}
    vector      u_i = sum_j q_j × k_{i-j}          SE(3)-Hyena, arXiv 2407.01049, Code 1
    geometric   a = qs*ks + q*.k    u = qs*k + ks*q    ua = q*×k

Code 1 is what that paper computes; its Eq. (2), read literally, is not a convolution. The cross
product is taken between spectra: 9 transforms a vector channel instead of 18.

The kernel k is data, with q's shape, or static: then it lacks leading axes of q, is shared along
them, and may be shorter-lived than a batch (parameters, or a function of the token's place). With a
shard every tensor holds this rank's tokens, the kernel too: nobody builds it whole.
"""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from scaling.long_conv.convolution import Convolution
from scaling.long_conv.form import Role, trilinear_form
from scaling.long_conv.operands import (
    Bodies,
    Lengths,
    Operand,
    Padding,
    batch_shape,
    check,
    choose_terms,
)
from scaling.long_conv.rows import row_groups
from scaling.long_conv.transform import Transform
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import timed
from scaling.work import work_counter

WORKSPACE_BYTES = 1 << 30
"""What the buffers of the channels under way may take, per rank; see `scalar_long_conv`."""


def scalar_long_conv(
    q: Float[Tensor, "*b n"],
    k: Float[Tensor, "*c n"],
    shard: SequenceShard | None = None,
    padding: Padding = "circular",
    lengths: Lengths | None = None,
    *,
    bodies: Bodies | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float[Tensor, "*b n"]:
    """Convolution along the sequence: u_i = sum_j q_j k_{i-j}; no 1/N inside.

    circular: indices modulo the row's own length. causal: k is zero outside the row, nothing wraps,
    and u_i depends on tokens 0..i alone. With a cyclic shard, q and k are this rank's tokens;
    values and gradients equal the one-process result for any length, number of channels and ranks,
    in 2 all-to-alls forward and 2 backward for every chunk of channels (operands travel together).
    O(N log N / P) time and O(N / P) memory.

    Half-precision inputs are transformed in float32; the result has q's dtype. Centre the inputs
    first: a float32 transform of a signal with mean m loses about log10(m·sqrt(N)) digits.

    Args:
        lengths: true length of each row of the first axis; tokens beyond it are ignored, whatever
            they hold, and their result is 0. None: all rows are full. A tuple or list of ints costs
            nothing; a tensor is copied to the host, which waits for the device.
        bodies: instead of lengths: for each row the lengths of the bodies that are convolved each
            on its own, as if they were rows; nothing leaks from one to another. None: everything
            sees everything.
        workspace_bytes: channels go in chunks so that two chunks' buffers fit; while one chunk's
            exchange is under way the other's transforms run.

    Raises:
        ShapeError: q, k, lengths, bodies and the shard disagree (shows shapes and dtypes).
        ConfigError: unknown padding, a shard whose layout is not cyclic, lengths and bodies both.
    """
    (u,) = geometric_long_conv(
        (q, None),
        (k, None),
        shard,
        padding,
        lengths,
        bodies=bodies,
        workspace_bytes=workspace_bytes,
    )
    return u


def vector_long_conv(
    q: Float[Tensor, "*b 3 n"],
    k: Float[Tensor, "*c 3 n"],
    shard: SequenceShard | None = None,
    padding: Padding = "circular",
    lengths: Lengths | None = None,
    *,
    bodies: Bodies | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Float[Tensor, "*b 3 n"]:
    """Cross-product convolution along the sequence: u_i = sum_j q_j × k_{i-j}; no 1/N inside.

    Polar q and k give an axial u. Everything else is as in `scalar_long_conv`.
    """
    (u,) = geometric_long_conv(
        (None, q),
        (None, k),
        shard,
        padding,
        lengths,
        terms=("cross",),
        bodies=bodies,
        workspace_bytes=workspace_bytes,
    )
    return u


@timed("transforms")
def geometric_long_conv(
    q: tuple[Float[Tensor, "*b n"] | None, Float[Tensor, "*b 3 n"] | None],
    k: tuple[Float[Tensor, "*c n"] | None, Float[Tensor, "*c 3 n"] | None],
    shard: SequenceShard | None = None,
    padding: Padding = "circular",
    lengths: Lengths | None = None,
    *,
    terms: Sequence[str] | None = None,
    bodies: Bodies | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, ...]:
    """Products of (scalar, vector) operands in one pass: (qs, q), (ks, k) -> (a, u, ua).

    a = qs*ks + q*.k is a polar scalar (..., n), u = qs*k + ks*q a polar vector (..., 3, n),
    ua = q*×k an axial vector: 4 numbers a channel and operand travel in, 7 out. Else as in
    `scalar_long_conv`.

    Args:
        terms: of "scalar" (qs*ks), "dot" (q*.k), "scale" (qs*k + ks*q) and "cross" (q*×k) those
            that are wanted. Results that no term makes are left out of the tuple; an operand that
            no term takes must be None. None: all terms that the operands allow.
    """
    bodies = check(q, k, shard, padding, lengths, bodies, workspace_bytes)
    names = choose_terms(q, k, terms)
    some = next(x for x in q if x is not None)
    shard = None if shard is None or shard.size == 1 else shard
    total = some.shape[-1] if shard is None else shard.length

    # Tensors get four axes: rows, channels, components, tokens. A static k has one row for all.
    batch, kernel = batch_shape(q), batch_shape(k)
    static, by_row = len(kernel) < len(batch), bodies is not None
    rows = batch[0] if by_row else prod(batch[: len(batch) - len(kernel)])
    channels = prod(batch[1:]) if by_row else prod(kernel)
    kernel = batch[1:] if static and by_row else kernel

    def with_four_axes(operand: Operand, shape: tuple[int, ...], rows: int) -> list[Tensor]:
        scalars, vectors = operand
        parts = [None if scalars is None else scalars.unsqueeze(-2), vectors]
        return [
            x.expand(*shape, *x.shape[-2:]).reshape(rows, channels, *x.shape[-2:])
            for x in parts
            if x is not None
        ]

    bodies = [[total]] * rows if bodies is None else bodies
    dtype = torch.promote_types(some.dtype, torch.float32).to_complex()
    form = trilinear_form(
        (q[0] is not None, k[0] is not None), (q[1] is not None, k[1] is not None), names
    )
    many: dict[Role, int] = {"q": rows, "k": 1 if static else rows, "u": rows}
    if counter := work_counter():
        copies = {role: count * channels for role, count in many.items()}
        itemsize = dtype.to_real().itemsize
        form.count_work(counter, copies, total, padding == "circular", itemsize)
    convolution = Convolution(
        form,
        row_groups(bodies if channels else [], padding == "circular", static, shard),
        Transform(shard, dtype, some.device, "long_conv"),
        many,
        torch.is_grad_enabled(),
        workspace_bytes,
    )
    results = convolution(
        with_four_axes(q, batch, rows), with_four_axes(k, kernel, convolution.rows["k"])
    )
    return tuple(u.reshape(*batch, *([] if u.shape[2] == 1 else [3]), u.shape[-1]) for u in results)
