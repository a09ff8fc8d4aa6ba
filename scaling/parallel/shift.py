"""Every token's predecessor, on a cyclic shard."""

import torch
from torch import Tensor

from scaling.parallel.collectives import all_to_all
from scaling.parallel.shard import SequenceShard


def previous(x: Tensor, shard: SequenceShard | None) -> Tensor:
    """y_i = x_{i-1}, y_0 = 0, along the last axis; differentiable.

    A cyclic shard's predecessors all live on the rank before: one exchange with the neighbours.
    """
    if x.shape[-1] == 0 and (shard is None or shard.length == 0):
        return x
    if shard is None or shard.size == 1:
        return torch.nn.functional.pad(x, (1, -1))
    index = shard.index
    send = [0] * shard.size
    send[(shard.rank + 1) % shard.size] = int((index + 1 < shard.length).sum())
    receive = [0] * shard.size
    receive[(shard.rank - 1) % shard.size] = int((index > 0).sum())
    rows = x.movedim(-1, 0)[: sum(send)]
    received = all_to_all(rows, send, receive, shard.group, "previous").movedim(0, -1)
    return torch.nn.functional.pad(received, (shard.n_local - received.shape[-1], 0))
