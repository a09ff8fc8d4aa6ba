"""Which chains make an item, one or many, and where each of its tokens comes from."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise

import numpy as np
from jaxtyping import Int, Shaped

from data_pipeline.counter_rng import hash64, raw64
from data_pipeline.errors import OptionError
from data_pipeline.store.mixture import StoreMixture
from data_pipeline.store.reader import before

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
        return np.arange(self.tokens.sum()) + self.per_token(self.starts - before(self.tokens))

    def per_token(self, x: Shaped[np.ndarray, "pieces ..."]) -> Shaped[np.ndarray, "tokens ..."]:
        """What is said of each piece, said of each of its tokens."""
        return np.repeat(x, self.tokens, axis=0)


def join(pieces: Sequence[Pieces]) -> Pieces:
    """Pieces of several slices, one after another."""
    none = np.zeros(0, np.int64)
    names = [field.name for field in fields(Pieces)]
    return Pieces(*(np.concatenate([none, *(getattr(p, n) for p in pieces)]) for n in names))


class PackedBodies:
    """Which chains make each item of a split: one, or as many as `packed_length` tokens hold.

    Packed items are runs of the stores' order, so that a slice of one is a run of chunks. Inside
    an item chunks keep their order, and the chains that begin in one chunk come in a random order
    that the sample's key gives; the one that reaches into the next chunk comes last. So a cut
    anywhere costs one chunk that both sides read. With `copies` the order is run through so many
    times.

    Raises:
        OptionError: a chain exceeds packed_length (named), or the copies are more than MOST_COPIES.
    """

    def __init__(
        self,
        stores: StoreMixture,
        split: str,
        atoms: int,
        packed_length: int | None,
        copies: int = 1,
    ):
        self._stores, self._packed_length = stores, packed_length
        longest = int(np.argmax(stores.lengths))
        tokens = int(stores.lengths[longest]) * atoms
        if packed_length is not None and tokens > packed_length:
            rule = f"the longest chain, {stores.name(longest)}, has {tokens} tokens; raise it"
            raise OptionError("packed_length", packed_length, f"{rule} to {tokens} or more")
        parts = stores.chains(split)
        if copies > 1 and (chains := sum(map(len, parts))) * copies > MOST_COPIES:
            rule = f"of {chains} {split} chains are more than {MOST_COPIES}; use at most"
            raise OptionError("packed_copies", copies, f"{rule} {max(MOST_COPIES // chains, 1)}")
        parts = [np.tile(part, copies) for part in parts]
        self._chains = np.concatenate(parts)
        self._lengths = stores.lengths[self._chains] * atoms
        bounds = np.cumsum([0, *map(len, parts)]).tolist()
        firsts = [self._first_chains(*part) for part in pairwise(bounds)]
        self.sizes = [len(part) for part in firsts]
        """Items of each store."""
        self._firsts = np.array([*chain.from_iterable(firsts), bounds[-1]])
        self.lengths = np.diff(np.concatenate([[0], np.cumsum(self._lengths)])[self._firsts])
        """Tokens of each item."""

    def describe(self, item: int) -> str:
        first, stop = self._firsts[item : item + 2]
        name = self._stores.name(int(self._chains[first]))
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
        begin, end = self._stores.pages(chains)
        random = raw64(hash64("pack", key), len(chains))
        order = np.lexsort((random, end > begin, begin))
        return chains[order], lengths[order]

    def _first_chains(self, base: int, stop: int) -> list[int]:
        """Place of the first chain of each item among chains [base, stop)."""
        if self._packed_length is None:
            return [*range(base, stop)]
        ends = np.cumsum(self._lengths[base:stop])
        firsts, first, full = [], base, 0
        while first < stop:
            firsts.append(first)
            first = base + int(np.searchsorted(ends, full + self._packed_length, side="right"))
            full = int(ends[first - base - 1])
        return firsts
