"""Ranks arranged as data parallel × sequence parallel, with a group for those that share a row."""

import torch.distributed as dist

from data_pipeline.errors import OptionError
from data_pipeline.stream.order import DataSlot
from scaling.parallel.collectives import Group, group_rank, group_size


class Mesh:
    """dp × sp ranks; the ranks that share a sequence are neighbours: rank = dp_rank · sp + sp_rank.

    Collective: every rank of the world builds the same mesh at the same time.

    Attributes:
        slot: which part of the data is this rank's.
        sequence_group: the ranks that share this rank's sequences.

    Raises:
        OptionError: dp · sp is not the number of ranks.
    """

    def __init__(self, dp: int, sp: int) -> None:
        self.world, self.rank = group_size(None), group_rank(None)
        check_sizes(dp, sp, self.world)
        dp_rank, sp_rank = divmod(self.rank, sp)
        self.slot = DataSlot(dp_rank, dp, sp_rank, sp)
        self.sequence_group: Group = None
        for first in range(0, self.world, sp) if self.world > 1 else ():
            group = dist.new_group(list(range(first, first + sp)))  # every rank makes all of them
            if isinstance(group, dist.ProcessGroup):
                self.sequence_group = group


def check_sizes(dp: int, sp: int, world: int) -> None:
    """Raises OptionError unless dp · sp is the number of ranks."""
    if min(dp, sp) < 1 or dp * sp != world:
        fitting = [f"dp={world // sp}"] if sp >= 1 and world % sp == 0 else []
        fitting += [f"sp={world // dp}"] if dp >= 1 and world % dp == 0 else []
        ways = " or ".join(fitting) or f"dp=1 sp={world}"
        raise OptionError(
            "sp",
            sp,
            f"dp({dp}) * sp({sp}) = {dp * sp}, but the world has {world} rank"
            f"{'s' * (world != 1)}; try {ways}, or start {max(dp * sp, 1)} ranks",
        )
