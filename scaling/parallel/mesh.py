"""Ranks arranged as data parallel × sequence parallel, with a group for those that share a row."""

import torch.distributed as dist

from data_pipeline.errors import ConfigError
from data_pipeline.stream.slot import DataSlot
from scaling.parallel.collectives import Group, group_rank, group_size


class Mesh:
    """dp × sp ranks; the ranks that share a sequence are neighbours: rank = dp_rank · sp + sp_rank.

    Collective: every rank of the world builds the same mesh at the same time.

    Attributes:
        slot: which part of the data is this rank's.
        sequence_group: the ranks that share this rank's sequences.

    Raises:
        ConfigError: dp · sp is not the number of ranks.
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
    """Raises ConfigError unless dp · sp is the number of ranks."""
    if dp < 1 or sp < 1 or dp * sp != world:
        raise ConfigError(
            f"dp({dp}) * sp({sp}) = {dp * sp}, but the world has {world} rank"
            f"{'s' * (world != 1)}; {_ways_out(dp, sp, world)}"
        )


def _ways_out(dp: int, sp: int, world: int) -> str:
    if dp >= 1 and world % dp == 0:
        return f"try parallel.sp={world // dp}, or start {max(dp * sp, 1)} ranks"
    if sp >= 1 and world % sp == 0:
        return f"try parallel.dp={world // sp}, or start {max(dp * sp, 1)} ranks"
    return f"try parallel.dp=1 parallel.sp={world}"
