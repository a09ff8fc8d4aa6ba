"""The order of samples as arithmetic: which item comes at which place of an endless run, and which
of its tokens are a rank's."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from data_pipeline.counter_rng import hash64, permuted, raw64


class Order:
    """Items by place: every item once an epoch, each epoch in an order of its own.

    Several parts with weights: places come in rounds of as many as the weights' sum, each round in
    a random order with `weight` places for each part; a part's own places walk through its own
    epochs. Nothing but the place is needed to know the item.

    Buckets: in a window of `bucket` batches the samples are sorted by length and cut into batches
    again, whose order is random. Windows end with the epoch, so each item still comes once; with
    several parts they do not, and an item may come up to a window early or late.

    Args:
        parts: (number of items, weight) of each part; items are numbered through them.
        key: whatever decides the order: seed, split, digest.
        lengths: of the items, for buckets.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, int]],
        key: tuple[int | str, ...],
        batch_size: int = 1,
        bucket: int = 1,
        lengths: Int[np.ndarray, " items"] | None = None,
    ):
        self._sizes = [size for size, _ in parts]
        self._bases = np.cumsum([0, *self._sizes])
        self._epoch = self._sizes[0] if len(parts) == 1 else sys.maxsize
        self._weights = [weight for _, weight in parts]
        self._key, self._lengths = key, lengths if bucket > 1 else None
        self._batch_size, self._window_size = batch_size, batch_size * bucket
        self._round = lru_cache(16)(self._mix)
        self._sorted = lru_cache(2)(self._sort)

    def samples(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(item, place) of the samples number [start, stop) of a run; places name the samples."""
        places = [self._place(number) for number in range(start, stop)]
        return [(self.item(place), place) for place in places]

    def item(self, place: int) -> int:
        if len(self._sizes) == 1:
            return self._of_part(place, 0)
        turn, slot = divmod(place, sum(self._weights))
        parts = self._round(turn)
        part = parts[slot]
        own = turn * self._weights[part] + parts[:slot].count(part)
        return int(self._bases[part]) + self._of_part(own, part, part)

    def _mix(self, turn: int) -> list[int]:
        """The parts in their order in a round."""
        parts = np.repeat(np.arange(len(self._weights)), self._weights)
        return parts[np.argsort(raw64(hash64("round", turn, *self._key), len(parts)))].tolist()

    def _of_part(self, place: int, part: int, *name: int) -> int:
        size, (seed, *rest) = self._sizes[part], self._key
        epoch, place = divmod(place, size)
        return permuted(place, size, hash64(seed, epoch, *rest, *name))

    def _place(self, number: int) -> int:
        """Of a sample in its window, which the epoch ends."""
        if self._lengths is None:
            return number
        epoch = number // self._epoch * self._epoch
        start = number - (number - epoch) % self._window_size
        stop = min(start + self._window_size, epoch + self._epoch)
        return int(self._sorted(start, stop)[number - start])

    def _sort(self, start: int, stop: int) -> np.ndarray:
        """The places of a window in the order in which they come."""
        places = np.arange(start, stop)
        assert self._lengths is not None
        lengths = self._lengths[[self.item(place) for place in places.tolist()]]
        places = places[np.argsort(lengths, kind="stable")]
        # Batches begin at multiples of their size; the window's ends may cut one.
        grid = range(start // self._batch_size * self._batch_size, stop, self._batch_size)
        cuts = (np.clip([*grid, stop], start, stop) - start).tolist()
        order = np.argsort(raw64(hash64("bucket", start, *self._key), len(cuts) - 1))
        out = np.empty_like(places)
        out[np.concatenate([np.arange(cuts[batch], cuts[batch + 1]) for batch in order])] = places
        return out


@dataclass(frozen=True)
class DataSlot:
    """Data-parallel rank `dp_rank` of `dp` reads its own rows; of each, sequence-parallel rank
    `sp_rank` of `sp` reads its own tokens."""

    dp_rank: int = 0
    dp: int = 1
    sp_rank: int = 0
    sp: int = 1

    def rows(self, total: int, together: int) -> range:
        """First rows of this rank's micro-batches of `together` rows, in turn with other ranks."""
        return range(self.dp_rank * together, total, self.dp * together)

    def tokens(self, length: int) -> tuple[int, int]:
        """This rank's tokens [start, stop) of rows of `length`."""
        return length * self.sp_rank // self.sp, length * (self.sp_rank + 1) // self.sp


WHOLE = DataSlot()
"""One rank that reads everything."""
