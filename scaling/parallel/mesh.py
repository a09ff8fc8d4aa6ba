"""Ranks arranged as data parallel × sequence parallel, with a group for those that share a row."""

from datetime import timedelta

import torch.distributed as dist

from data_pipeline.errors import OptionError
from data_pipeline.stream.order import DataSlot
from scaling.parallel.collectives import Group, group_rank, group_size


class Mesh:
    """dp × sp ranks; the ranks that share a sequence are neighbours: rank = dp_rank · sp + sp_rank.

    Collective: every rank of the world builds the same mesh at the same time.

    Args:
        timeout_s: what the group waits; None: PyTorch's half an hour.

    Attributes:
        slot: which part of the data is this rank's.
        sequence_group: the ranks that share this rank's sequences.

    Raises:
        OptionError: dp · sp is not the number of ranks.
    """

    def __init__(self, dp: int, sp: int, timeout_s: float | None = None) -> None:
        self.world, self.rank = group_size(None), group_rank(None)
        check_sizes(dp, sp, self.world)
        dp_rank, sp_rank = divmod(self.rank, sp)
        self.slot = DataSlot(dp_rank, dp, sp_rank, sp)
        self.sequence_group: Group = None
        for first in range(0, self.world, sp) if self.world > 1 else ():
            timeout = None if timeout_s is None else group_timeout(timeout_s, dist.get_backend())
            ranks = list(range(first, first + sp))
            group = dist.new_group(ranks, timeout)  # every rank makes all of them
            if isinstance(group, dist.ProcessGroup):
                self.sequence_group = group


def group_timeout(seconds: float, backend: str) -> timedelta:
    """For a process group. NCCL's watchdog ends a process without a word: a minute later, so that
    others can speak."""
    return timedelta(seconds=seconds + (60 if backend == "nccl" else 0))


def check_sizes(dp: int, sp: int, world: int) -> None:
    """Raises OptionError unless dp · sp is the number of ranks."""
    if min(dp, sp) < 1 or dp * sp != world:
        fitting = f"sp={world // dp}" if dp >= 1 and world % dp == 0 else f"dp=1 sp={world}"
        raise OptionError(
            "sp",
            sp,
            f"dp({dp}) * sp({sp}) = {dp * sp}, but the world has {world} rank"
            f"{'s' * (world != 1)}; try {fitting}, or start {max(dp * sp, 1)} ranks",
        )
