"""Which chains make an item, one or many, and where each of its tokens comes from."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from data_pipeline.counter_rng import hash64, raw64
from data_pipeline.errors import ConfigError
from data_pipeline.store.reader import StoreMixture, before

MOST_COPIES = 1 << 24
"""Of all chains of a split together: about 1 GB of memory."""


@dataclass(frozen=True)
class Pieces:
    """What a slice of an item is made of: runs of tokens of its chains, in order."""

    chains: Int[np.ndarray, " pieces"]
    body: Int[np.ndarray, " pieces"]
    """Place of the chain in the item."""
    starts: Int[np.ndarray, " pieces"]
    """First token of the chain that lies in the slice."""
    stops: Int[np.ndarray, " pieces"]
    lengths: Int[np.ndarray, " pieces"]
    """Tokens of the whole chain."""

    @property
    def tokens(self) -> Int[np.ndarray, " pieces"]:
        return self.stops - self.starts

    @property
    def places(self) -> Int[np.ndarray, " tokens"]:
        """Of every token in its chain."""
        tokens = self.tokens
        return np.arange(tokens.sum()) + np.repeat(self.starts - before(tokens), tokens)


class PackedBodies:
    """Which chains make each item of a split: one, or as many as `packed_length` tokens hold.

    Packed items are runs of the stores' order, so that a slice of one is a run of chunks. Inside
    an item chunks keep their order, and the chains that begin in one chunk come in a random order
    that the sample's key gives; the one that reaches into the next chunk comes last. So a cut
    anywhere costs one chunk that both sides read. With `copies` the order is run through so many
    times.

    Raises:
        ConfigError: a chain exceeds packed_length (named), or the copies are more than MOST_COPIES.
    """

    def __init__(
        self,
        stores: StoreMixture,
        split: str,
        atoms: int,
        packed_length: int | None,
        copies: int = 1,
    ):
        self._stores, self._atoms, self._packed = stores, atoms, packed_length is not None
        longest = int(np.argmax(stores.lengths))
        tokens = int(stores.lengths[longest]) * atoms
        if packed_length is not None and tokens > packed_length:
            raise ConfigError(
                f"the longest chain, {stores.name(longest)}, has {tokens} tokens, more than "
                f"task.packed_length={packed_length}; raise it to {tokens} or more"
            )
        parts = stores.chains(split)
        if copies > 1 and (chains := sum(map(len, parts))) * copies > MOST_COPIES:
            raise ConfigError(
                f"task.packed_copies={copies} of {chains} {split} chains are more than "
                f"{MOST_COPIES}; use at most {max(MOST_COPIES // chains, 1)}"
            )
        parts = [np.tile(part, copies) for part in parts]
        self._chains = np.concatenate(parts)
        self._lengths = stores.lengths[self._chains] * atoms
        firsts, sizes, base = [], [], 0
        for part in parts:
            mine = self._firsts(base, base + len(part), packed_length)
            firsts += mine
            sizes.append(len(mine))
            base += len(part)
        self.sizes = sizes
        """Items of each store."""
        self._firsts_of_items = np.array([*firsts, base])
        ends = np.concatenate([[0], np.cumsum(self._lengths)])
        self.lengths = np.diff(ends[self._firsts_of_items])
        """Tokens of each item."""

    def describe(self, item: int) -> str:
        first, stop = self._firsts_of_items[item : item + 2]
        name = self._stores.name(int(self._chains[first]))
        more = f" and {stop - first - 1} more, packed" if self._packed else ""
        return f"chain {name}{more}"

    def pieces(self, item: int, key: int, start: int, stop: int) -> Pieces:
        """Tokens [start, stop) of an item, 0 <= start < stop <= its length."""
        span = slice(*self._firsts_of_items[item : item + 2])
        chains, lengths = self._chains[span], self._lengths[span]
        if self._packed:
            begin, end = self._stores.pages(chains)
            random = raw64(hash64("pack", key), len(chains))
            order = np.lexsort((random, end > begin, begin))
            chains, lengths = chains[order], lengths[order]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        body = np.arange(
            np.searchsorted(ends, start, side="right"), np.searchsorted(starts, stop, side="left")
        )
        return Pieces(
            chains[body],
            body,
            np.maximum(start - starts[body], 0),
            np.minimum(stop - starts[body], lengths[body]),
            lengths[body],
        )

    def _firsts(self, base: int, stop: int, packed_length: int | None) -> list[int]:
        """Place of the first chain of each item among chains [base, stop)."""
        if packed_length is None:
            return [*range(base, stop)]
        ends = np.cumsum(self._lengths[base:stop])
        firsts, first = [], base
        while first < stop:
            firsts.append(first)
            before = ends[first - base - 1] if first > base else 0
            last = base + int(np.searchsorted(ends, before + packed_length, side="right"))
            first = last
        return firsts
