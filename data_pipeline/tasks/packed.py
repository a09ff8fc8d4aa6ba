"""Which chains make an item, one or many, and where each of its tokens comes from."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

from data_pipeline.counter_rng import hash64, raw64
from data_pipeline.errors import OptionError
from data_pipeline.store.reader import Store

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
        first = np.cumsum(self.tokens) - self.tokens
        return np.arange(self.tokens.sum()) + self.per_token(self.starts - first)

    def per_token(self, x: Shaped[np.ndarray, "pieces ..."]) -> Shaped[np.ndarray, "tokens ..."]:
        """What is said of each piece, said of each of its tokens."""
        return np.repeat(x, self.tokens, axis=0)


class PackedBodies:
    """Which chains make each item of a split: one, or as many as `packed_length` tokens hold.

    Packed items are runs of the store's order, so that a slice of one is a run of chunks. Inside
    an item chunks keep their order, and the chains that begin in one chunk come in a random order
    that the sample's key gives; the one that reaches into the next chunk comes last. So a cut
    anywhere costs one chunk that both sides read. With `copies` the order is run through so many
    times.

    Raises:
        OptionError: a chain exceeds packed_length (named), or the copies are more than MOST_COPIES.
    """

    def __init__(
        self, store: Store, split: str, atoms: int, packed_length: int | None, copies: int = 1
    ):
        self.store, self._packed_length = store, packed_length
        longest = int(np.argmax(store.lengths))
        tokens = int(store.lengths[longest]) * atoms
        if packed_length is not None and tokens > packed_length:
            rule = f"the longest chain, {store.name(longest)}, has {tokens} tokens; raise it"
            raise OptionError("packed_length", packed_length, f"{rule} to {tokens} or more")
        chains = store.chains(split)
        if copies > 1 and len(chains) * copies > MOST_COPIES:
            rule = f"of {len(chains)} {split} chains are more than {MOST_COPIES}; use at most"
            raise OptionError("packed_copies", copies, f"{rule} {MOST_COPIES // len(chains) or 1}")
        self._chains = np.tile(chains, copies)
        self._lengths = store.lengths[self._chains] * atoms
        ends = np.cumsum([0, *self._lengths])
        self._firsts = np.arange(len(ends)) if packed_length is None else _fill(ends, packed_length)
        self.lengths = np.diff(ends[self._firsts])
        """Tokens of each item."""

    def describe(self, item: int) -> str:
        first, stop = self._firsts[item : item + 2]
        name = self.store.name(int(self._chains[first]))
        more = f" and {stop - first - 1} more, packed" if self._packed_length is not None else ""
        return f"chain {name}{more}"

    def bodies(self, item: int, key: int) -> tuple[int, ...]:
        """Tokens of each chain of an item, in order."""
        return tuple(self._in_order(item, key)[1].tolist())

    def pieces(self, item: int, key: int, start: int, stop: int) -> Pieces:
        """Tokens [start, stop) of an item, 0 <= start < stop <= its length."""
        chains, lengths = self._in_order(item, key)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        body = np.flatnonzero((ends > start) & (starts < stop))
        chains, lengths, starts = chains[body], lengths[body], starts[body]
        first, last = np.maximum(start - starts, 0), np.minimum(stop - starts, lengths)
        return Pieces(chains, body, first, last, lengths)

    def _in_order(self, item: int, key: int) -> tuple[np.ndarray, np.ndarray]:
        """Chains of an item, and their tokens."""
        span = slice(*self._firsts[item : item + 2])
        chains, lengths = self._chains[span], self._lengths[span]
        if self._packed_length is None:
            return chains, lengths
        begin, end = self.store.chunks_of(chains)
        random = raw64(hash64("pack", key), len(chains))
        order = np.lexsort((random, end > begin, begin))
        return chains[order], lengths[order]


def _fill(ends: np.ndarray, packed_length: int) -> np.ndarray:
    """Of chains that end at ends[1:]: the first of each item that is as full as can be, and how
    many they are."""
    firsts = [0]
    while firsts[-1] < len(ends) - 1:
        full = ends[firsts[-1]] + packed_length
        firsts.append(int(np.searchsorted(ends, full, side="right")) - 1)
    return np.array(firsts)
