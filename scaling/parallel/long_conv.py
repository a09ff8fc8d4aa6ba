"""The distributed twin of scaling.ops.long_conv, on a cyclic shard.

Rank r of P holds every P-th token: a polyphase component. The transform of all T = P·L (padded)
tokens is then, with f = k + L·m,

    X[f] = sum_r exp(-2πi r m / P) · exp(-2πi r k / T) · rfft_L(x_r)[k]

that is: a local transform, one all-to-all that hands each rank a slice of k for all r, a twiddle
and a P-point transform. Each rank then holds P·S frequencies of the true spectrum, where products,
foldings and their adjoints are pointwise, and goes back the same way. Nothing here depends on the
number of channels; P need not divide anything. Cf. Inda & Bisseling, Parallel Computing 2001
(cyclic to cyclic with one exchange).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from scaling.algebra.spectra import Bilinear, fold_factor, transform_length
from scaling.parallel.collectives import all_to_all_blocks
from scaling.parallel.shard import SequenceShard


def long_conv(
    product: Bilinear, q: Tensor, k: Tensor, shard: SequenceShard, wraps: list[int] | None
) -> Tensor:
    """Convolves this rank's tokens, q and k (..., c, n_local), with the product's components.

    wraps: lengths at which rows of the first axis wrap (one for all, or one each); None never.
    3 all-to-alls forward and 3 backward, on every rank of the shard.
    """
    rows = 1 if wraps is None else len(wraps)
    transform, fold = transform_length(shard.length, shard.size, wraps)
    plan = _Transform(shard, transform // shard.size, q.dtype, q.device)
    factor = None
    if fold:
        assert wraps is not None
        factor = fold_factor(plan.frequencies, wraps, transform, q.dtype.to_complex())
        factor = factor.movedim(0, 1)[..., None, None, :]  # (phase, row, channel, component, slice)
    shape = (rows, q.shape[:-2].numel() // rows, *q.shape[-2:])
    u = _LongConv.apply(product, q.reshape(shape), k.reshape(shape), plan, factor)
    return u.reshape(*q.shape[:-2], *u.shape[-2:])


class _LongConv(torch.autograd.Function):
    """q, k: (rows, channels, components, n_local). Spectra are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Bilinear,
        q: Tensor,
        k: Tensor,
        plan: "_Transform",
        factor: Tensor | None,
    ) -> Tensor:
        spectrum_q, spectrum_k = plan.forward(q), plan.forward(k)
        ctx.product, ctx.plan = product, plan
        ctx.save_for_backward(spectrum_q, spectrum_k, factor)
        spectrum = product.forward(spectrum_q, spectrum_k)
        return plan.inverse(spectrum if factor is None else spectrum.mul_(factor))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only with create_graph=True
            raise ConfigError(
                "a sharded long convolution has no second derivative (create_graph=True);"
                " take it on one process, with shard=None"
            )
        spectrum_q, spectrum_k, factor = ctx.saved_tensors
        spectrum = ctx.plan.forward(grads[0])
        if factor is not None:
            spectrum.mul_(factor.conj())
        grad_q, grad_k = ctx.product.adjoint(spectrum, spectrum_q, spectrum_k)
        return None, ctx.plan.inverse(grad_q), ctx.plan.inverse(grad_k), None, None


@dataclass(frozen=True)
class _Transform:
    """The distributed real transform of a cyclic shard: tokens <-> this rank's frequencies.

    local: L, tokens of one phase after padding. Frequencies come as (phase m, ..., slice j), which
    is f = k + L·m with k = rank·S + j; k beyond the Hermitian half is padding that carries zeros.
    """

    shard: SequenceShard
    local: int
    dtype: torch.dtype
    device: torch.device

    @property
    def slice(self) -> int:
        """S: frequencies of one phase that a rank holds."""
        return -(-(self.local // 2 + 1) // self.shard.size)

    @property
    def frequencies(self) -> Tensor:
        """Global numbers f of this rank's frequencies: (phase, slice)."""
        start = self.shard.rank * self.slice
        k = torch.arange(start, start + self.slice, device=self.device)
        return k + self.local * torch.arange(self.shard.size, device=self.device)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_local) -> (phase, ..., slice), one all-to-all."""
        ranks = self.shard.size
        padded = torch.nn.functional.pad(x, (0, self.local - x.shape[-1]))
        spectrum = torch.fft.rfft(padded)
        missing = ranks * self.slice - spectrum.shape[-1]
        spectrum = torch.nn.functional.pad(spectrum, (0, missing)).unflatten(-1, (ranks, -1))
        phases = all_to_all_blocks(spectrum.movedim(-2, 0), self.shard.group, "long_conv")
        return torch.fft.fft(phases * self._twiddle(x.ndim), dim=0)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """(phase, ..., slice) -> (..., n_local), one all-to-all."""
        phases = torch.fft.ifft(spectrum, dim=0) * self._twiddle(spectrum.ndim - 1).conj()
        slices = all_to_all_blocks(phases, self.shard.group, "long_conv").movedim(0, -2)
        half = slices.flatten(-2)[..., : self.local // 2 + 1]
        return torch.fft.irfft(half, self.local)[..., : self.shard.n_local]

    def _twiddle(self, ndim: int) -> Tensor:
        table = _twiddle_table(
            self.shard.rank, self.shard.size, self.local, self.slice, self.dtype, self.device
        )
        return table.reshape(self.shard.size, *[1] * (ndim - 1), self.slice)


@lru_cache(maxsize=8)
def _twiddle_table(
    rank: int, size: int, local: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """exp(-2πi r k / T) for all phases r and this rank's k: (size, width)."""
    k = torch.arange(rank * width, (rank + 1) * width, device=device)
    turns = (k * torch.arange(size, device=device)[:, None]).double() / (size * local)
    table = torch.polar(torch.ones_like(turns), -2 * torch.pi * turns)
    return table.to(dtype.to_complex())
