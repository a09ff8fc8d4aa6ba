"""Error by position: how far behind the start of their sequence answers are still right.

A row of an evaluation is one observation, since its tokens share their sequence: the standard
error is that of a ratio of sums over rows, the error's and the weight's.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from scaling.parallel.collectives import Group, all_reduce_sum, sum_over_ranks
from scaling.parallel.shard import SequenceShard
from scaling.runs.rows import Row

PARTS = 8


class ErrorByPosition:
    """Gathers weighted errors of tokens in equal parts of [0, length), on the device.

    Args:
        length: tokens of the longest sequence.
        group: all the ranks that evaluate; None is the world.
    """

    def __init__(
        self, length: int, device: torch.device | str = "cpu", group: Group = None
    ) -> None:
        self._bounds = [length * part // PARTS for part in range(PARTS + 1)]
        self._inner = torch.tensor(self._bounds[1:-1], device=device)
        self._group = group
        # Of each part: rows, errors, weights, errors², errors · weights, weights².
        self._sums = torch.zeros(6, PARTS, dtype=torch.float64, device=device)

    def add(
        self, error: Float[Tensor, "b n"], weight: Float[Tensor, "b n"], shard: SequenceShard
    ) -> None:
        """This rank's tokens of some sequences: weighted errors and weights. Collective."""
        part = torch.bucketize(shard.index_on(error.device), self._inner, right=True)
        both = torch.stack([error, weight]).double()
        own = both.new_zeros(*both.shape[:2], PARTS).index_add_(2, part, both)
        e, w = all_reduce_sum(own, shard.group, "error_by_position")
        self._sums += torch.stack([(w > 0).double(), e, w, e * e, e * w, w * w]).sum(1) / shard.size

    def rows(self, unit: float) -> list[Row]:
        """Of each part where something counts: its first token and the one behind its last, loss in
        `unit`, and the loss's standard error; None where a single row counts. Collective."""
        columns = sum_over_ranks(self._sums.clone(), self._group).T.tolist()
        found = []
        for part, (rows, e, w, ee, ew, ww) in enumerate(columns):
            if w > 0:
                loss, n = e / w, round(rows)
                spread = max(ee - 2 * loss * ew + loss * loss * ww, 0)  # sum of (e - loss w)²
                error = math.sqrt(spread * n / (n - 1)) / w / unit if n > 1 else None
                first, behind = self._bounds[part : part + 2]
                found.append(
                    {"from": first, "to": behind, "loss": loss / unit, "standard_error": error}
                )
        return found
