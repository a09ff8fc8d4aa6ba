"""Attention between tokens and a few latents of their body: time and memory linear in the length.

Latents learn from tokens, and tokens from latents:

    z_m = sum_n softmax_n(q_m·k_n) v_n,    u_n = sum_m softmax_m(q_n·k_m) v_m

over the valid tokens n and the latents m of one body. The last axis is n, this rank's tokens, or c,
the bodies of a row; latents are the same on every rank.
"""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from scaling.ops.masked_rows import MaskedRows
from scaling.parallel.collectives import all_reduce_max, all_reduce_sum
from scaling.work import work_counter


class BodyLatents:
    """Latents of each body of some rows. Those of several bodies are gone through one after the
    other: set beside their tokens all at once they would take m times the memory of these."""

    def __init__(self, rows: MaskedRows) -> None:
        self._rows, self._several, self._bodies = rows, rows.bodies is not None, 1
        self._body = torch.zeros_like(rows.mask, dtype=torch.long)
        if rows.bodies is not None:
            self._body = rows.body_at(rows.index)
            self._bodies = 1 + max(map(len, rows.bodies), default=0)  # the last: behind a row's end

    def mean(self, x: Float[Tensor, "b e n"]) -> Float[Tensor, "b e c"]:
        """Mean over the valid tokens of each body; 0 for a body without any."""
        with _without_autocast(x):
            x = self._rows.zero_invalid(_full(x)).unsqueeze(1)
            valid = self._rows.mask[:, None, None].to(x.dtype)
            return self._mean(valid, x).squeeze(2).squeeze(1)

    def learn(
        self,
        q: Float[Tensor, "b h m e c"],
        k: Float[Tensor, "b h e n"],
        v: Float[Tensor, "b h f n"],
    ) -> Float[Tensor, "b h m f c"]:
        """z, of latents that ask q; 0 for a body without valid tokens."""
        hidden = ~self._rows.mask[:, None, None]
        with _without_autocast(k):
            q, k, v = _full(q), _full(k), self._rows.zero_invalid(_full(v))
            logits = self._products(q, k).masked_fill(hidden, -torch.inf)
            return self._mean((logits - self._most(logits.detach())).exp(), v)

    def tell(
        self,
        q: Float[Tensor, "b h e n"],
        k: Float[Tensor, "b h m e c"],
        v: Float[Tensor, "b h m f c"],
    ) -> Float[Tensor, "b h f n"]:
        """u, of tokens that ask q."""
        with _without_autocast(q):
            w, v = torch.softmax(self._products(_full(k), _full(q)), 2), _full(v)
            if not self._several:
                return v[..., 0].mT @ w
            total: Any = 0
            for weight, one in zip(w.unbind(2), v.unbind(2), strict=True):
                total = total + weight.unsqueeze(2) * self._at_tokens(one)
            return total

    def _products(
        self, z: Float[Tensor, "b h m e c"], x: Float[Tensor, "b h e n"]
    ) -> Float[Tensor, "b h m n"]:
        """Of each token with the latents of its body."""
        if not self._several:
            return z[..., 0] @ x
        return torch.stack([(self._at_tokens(one) * x).sum(2) for one in z.unbind(2)], 2)

    def _mean(
        self, w: Float[Tensor, "b h m n"], x: Float[Tensor, "b h f n"]
    ) -> Float[Tensor, "b h m f c"]:
        """sum_n w_n x_n / sum_n w_n over each body, on all ranks, by one exchange."""
        x = torch.cat([x, torch.ones_like(x[:, :, :1])], 2)
        if self._several:
            sums = torch.stack([self._sums(one.unsqueeze(2) * x) for one in w.unbind(2)], 2)
        else:
            sums = (w @ x.mT).unsqueeze(-1)
        if counter := work_counter():
            counter.row_sum(sums)
        if self._rows.shard is not None:
            sums = all_reduce_sum(sums, self._rows.shard.group, "latents")
        total = sums[..., -1:, :]
        return sums[..., :-1, :] / total.masked_fill(total == 0, 1)

    def _sums(self, x: Float[Tensor, "b h e n"]) -> Float[Tensor, "b h e c"]:
        """Over each body's tokens on this rank."""
        sums = x.new_zeros(*x.shape[:-1], self._bodies)
        return sums.scatter_add(-1, self._body_of_each(x), x)

    def _most(self, x: Float[Tensor, "b h m n"]) -> Float[Tensor, "b h m n"]:
        """Largest number of each token's body, on all ranks; 0 where it is infinite."""
        most = x.new_full((*x.shape[:-1], self._bodies), -torch.inf)
        most = most.scatter_reduce(-1, self._body_of_each(x), x, "amax")
        if counter := work_counter():
            counter.row_sum(most)
        if self._rows.shard is not None:
            most = all_reduce_max(most, self._rows.shard.group, "latents")
        return self._at_tokens(most.masked_fill(most == -torch.inf, 0))

    def _at_tokens(self, z: Float[Tensor, "b h e c"]) -> Float[Tensor, "b h e n"]:
        """Its body's numbers, for each token."""
        return z.gather(-1, self._body_of_each(z))

    def _body_of_each(self, x: Shaped[Tensor, "b h e _"]) -> Shaped[Tensor, "b h e n"]:
        return self._body[:, None, None].expand(*x.shape[:-1], -1)


def _without_autocast(x: Tensor) -> torch.autocast:
    """Numbers keep the type that they have."""
    device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
    return torch.autocast(device, enabled=False)


def _full(x: Tensor) -> Tensor:
    """In enough digits for a long sum."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
