"""What a long convolution accepts, and what it says of the rest."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from data_pipeline.errors import ConfigError, ShapeError
from scaling.long_conv.form import PRODUCTS
from scaling.parallel.shard import SequenceShard

Padding = Literal["circular", "causal"]
Lengths = Sequence[int] | Int[Tensor, " rows"]
"""True length of every row of the first axis; a tensor is copied to the host."""
Bodies = Sequence[Sequence[int]]
"""Lengths of the bodies in every row of the first axis, one behind the other."""
Operand = tuple[Tensor | None, Tensor | None]
"""Scalars (..., n) and vectors (..., 3, n)."""


def batch_shape(operand: Operand) -> tuple[int, ...]:
    scalars, vectors = operand
    if scalars is not None:
        return tuple(scalars.shape[:-1])
    assert vectors is not None
    return tuple(vectors.shape[:-2])


def choose_terms(q: Operand, k: Operand, terms: Sequence[str] | None) -> tuple[str, ...]:
    """The terms in their order; None: all that the operands allow.

    Raises:
        ConfigError: an unknown term, one that lacks an operand, or an operand without a term.
    """
    (qs, qv), (ks, kv) = ([x is not None for x in operand] for operand in (q, k))
    takes: dict[str, list[bool]] = {  # qs, q, ks, k
        "scalar": [qs and ks, False, qs and ks, False],
        "dot": [False, qv and kv, False, qv and kv],
        "scale": [qs and kv, qv and ks, qv and ks, qs and kv],
        "cross": [False, qv and kv, False, qv and kv],
    }
    names = tuple(
        name for name in PRODUCTS if (any(takes[name]) if terms is None else name in terms)
    )
    for name in terms or ():
        if name not in PRODUCTS:
            raise ConfigError(f"unknown term {name!r}; use some of {PRODUCTS}")
        if not any(takes[name]):
            raise ConfigError(f"the term {name!r} lacks an operand; see geometric_long_conv")
    operands = {"qs": qs, "q": qv, "ks": ks, "k": kv}
    for number, (operand, given) in enumerate(operands.items()):
        if given and not any(takes[name][number] for name in names):
            raise ConfigError(f"no term of {names} takes {operand}; give None in its place")
    return names


def check(
    q: Operand,
    k: Operand,
    shard: SequenceShard | None,
    padding: Padding,
    lengths: Lengths | None,
    bodies: Bodies | None,
    workspace_bytes: int,
) -> Bodies | None:
    """The bodies of every row, if they are not all full rows; the only place that may wait for the
    device, where lengths are a tensor. Every rank checks the same facts, so all raise or none."""
    if padding not in get_args(Padding):
        raise ConfigError(f"unknown padding {padding!r}; use one of {get_args(Padding)}")
    if shard is not None and shard.layout != "cyclic":
        raise ConfigError(f"a long convolution needs a cyclic shard, not {shard.layout}")
    if workspace_bytes < 1:
        raise ConfigError(f"workspace_bytes={workspace_bytes} must be 1 or more")
    for operand in (q, k):
        _check_operand(operand)
    some, kernel = (next(x for x in operand if x is not None) for operand in (q, k))
    if some.dtype != kernel.dtype or not some.is_floating_point():
        raise ShapeError(
            f"q {some.dtype} and k {kernel.dtype} must have one real floating-point dtype"
        )
    batch, kernel_batch = batch_shape(q), batch_shape(k)
    if (
        batch[len(batch) - len(kernel_batch) :] != kernel_batch
        or some.shape[-1] != kernel.shape[-1]
    ):
        raise ShapeError(
            f"q {tuple(some.shape)} and k {tuple(kernel.shape)} must have one shape;"
            " a static k may lack leading axes"
        )
    if shard is not None and some.shape[-1] != shard.n_local:
        raise ShapeError(f"{shard} holds {shard.n_local} tokens, but q is {tuple(some.shape)}")
    total = some.shape[-1] if shard is None else shard.length
    if lengths is not None and bodies is not None:
        raise ConfigError("give lengths or bodies: bodies bring their own lengths")
    if isinstance(lengths, Tensor):
        if lengths.dtype not in (torch.int32, torch.int64) or lengths.ndim != 1:
            raise ShapeError(
                f"lengths {tuple(lengths.shape)} {lengths.dtype}: give one int64 a row of the first"
                f" axis of {tuple(some.shape)}"
            )
        lengths = lengths.tolist()
    name, rows = ("bodies", bodies) if lengths is None else ("lengths", [[n] for n in lengths])
    if rows is None:
        return None
    if not batch or len(rows) != batch[0]:
        raise ShapeError(
            f"{name} of {len(rows)} rows must be one a row of the first axis of {tuple(some.shape)}"
        )
    for row, each in enumerate(rows):
        if not all(isinstance(n, int) and n >= 0 for n in each) or sum(each) > total:
            raise ShapeError(
                f"{name} of row {row} are {list(each)}: use ints >= 0 that make at most the row's"
                f" {total} tokens"
            )
    return rows


def _check_operand(operand: Operand) -> None:
    scalars, vectors = operand
    if scalars is None and vectors is None:
        raise ShapeError("an operand (None, None) holds nothing; give scalars, vectors or both")
    if scalars is not None and scalars.ndim < 1:
        raise ShapeError("scalars need shape (..., n), not ()")
    if vectors is not None and (vectors.ndim < 2 or vectors.shape[-2] != 3):
        raise ShapeError(f"vectors need shape (..., 3, n), not {tuple(vectors.shape)}")
    if scalars is None or vectors is None:
        return
    if vectors.shape[:-2] + vectors.shape[-1:] != scalars.shape or scalars.dtype != vectors.dtype:
        raise ShapeError(
            f"scalars {tuple(scalars.shape)} and vectors {tuple(vectors.shape)} disagree, or"
            f" {scalars.dtype} and {vectors.dtype} do"
        )
