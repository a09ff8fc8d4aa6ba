"""Blocks of rows that go around the ranks, and their gradients that follow them home.

Rank r works on its own block, then on those of r-1, r-2, ...; while it works on one the next is
under way. So a rank holds at most two blocks of others, and every block makes P-1 steps.
"""

from collections.abc import Iterator

from jaxtyping import Shaped
from torch import Tensor

from scaling.parallel.collectives import Exchange
from scaling.parallel.shard import SequenceShard


def blocks_in_turn(
    own: Shaped[Tensor, "n f"], shard: SequenceShard | None, operator: str
) -> Iterator[tuple[range, Shaped[Tensor, "m f"]]]:
    """Every rank's tokens of the sequence and its block, this rank's first.

    Args:
        own: a row for each of this rank's tokens; must not change until the iterator's end.
    """
    if shard is None:
        yield range(len(own)), own
        return
    block = own.contiguous()
    for rank in _ranks_in_turn(shard):
        coming = None
        if rank != (shard.rank + 1) % shard.size:  # else it has been everywhere
            coming = _to_the_next(block, (rank - 1) % shard.size, shard, operator)
        yield shard.tokens_of(rank), block
        if coming is not None:
            block = coming.wait()


class GradientsHome:
    """What ranks add to the gradients of the blocks of `blocks_in_turn`, on its way to their
    owners: each block's goes with it, one step behind.

        for tokens, block in blocks_in_turn(...):
            home.add(gradient of this rank's results by the block)
        gradient = home.arrived()
    """

    def __init__(self, shard: SequenceShard | None, operator: str) -> None:
        self._shard, self._operator = shard, operator
        self._under_way: Exchange | None = None
        self._own: Tensor | None = None
        self._ranks = _ranks_in_turn(shard) if shard else iter([0])

    def add(self, gradient: Shaped[Tensor, "m f"]) -> None:
        """Of the block in hand; what the ranks before have added arrives meanwhile."""
        rank, shard = next(self._ranks), self._shard
        if self._under_way is not None:
            gradient = gradient + self._under_way.wait()
        if shard is None or shard.size == 1:
            self._own = gradient
        else:
            before = (rank - 1) % shard.size
            self._under_way = _to_the_next(gradient.contiguous(), before, shard, self._operator)

    def arrived(self) -> Shaped[Tensor, "n f"]:
        """The gradient of this rank's own block, of all ranks' results."""
        if self._under_way is not None:
            return self._under_way.wait()
        assert self._own is not None
        return self._own


def _ranks_in_turn(shard: SequenceShard) -> Iterator[int]:
    return ((shard.rank - step) % shard.size for step in range(shard.size))


def _to_the_next(block: Tensor, coming: int, shard: SequenceShard, operator: str) -> Exchange:
    """Sends a block to the next rank; what comes from the one before is of rank `coming`'s size."""
    send, receive = [0] * shard.size, [0] * shard.size
    send[(shard.rank + 1) % shard.size] = len(block)
    receive[(shard.rank - 1) % shard.size] = len(shard.tokens_of(coming))
    return Exchange(block, send, receive, shard.group, operator)
