"""Rows of other ranks' tokens that a rank works with beside its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from scaling.parallel.collectives import all_to_all
from scaling.parallel.shard import SequenceShard


@dataclass(frozen=True)
class Halo:
    """Which of its rows a rank sends to whom, and how many it gets of each. Without a shard: none.

    Attributes:
        sent: own rows for the first rank, then for the second, ...
        send_counts, receive_counts: rows to and from each rank.
    """

    shard: SequenceShard | None = None
    sent: Int[Tensor, " s"] | None = None
    send_counts: Sequence[int] = field(default=())
    receive_counts: Sequence[int] = field(default=())

    @classmethod
    def asked_for(
        cls,
        wanted: Int[Tensor, " h"],
        counts: Int[Tensor, " p"],
        shard: SequenceShard,
        operator: str,
    ) -> "Halo":
        """The rows that every rank wants of the others; the host waits for their numbers.

        Args:
            wanted: numbers of rows of the first rank, then of the second, ...
            counts: how many of each.
        """
        ones = [1] * shard.size
        asked = all_to_all(counts, ones, ones, shard.group, operator)
        receive, send = torch.stack([counts, asked]).tolist()
        sent = all_to_all(wanted, receive, send, shard.group, operator)
        return cls(shard, sent, send, receive)

    def beside(self, own: Shaped[Tensor, "n f"], operator: str) -> Shaped[Tensor, "m f"]:
        """Own rows, and behind them those asked for, in their order; differentiable. One exchange,
        whatever is in a row."""
        if self.shard is None or self.shard.size == 1:
            return own
        assert self.sent is not None
        counts = (self.send_counts, self.receive_counts)
        rows = own.index_select(0, self.sent)
        return torch.cat([own, all_to_all(rows, *counts, self.shard.group, operator)])
