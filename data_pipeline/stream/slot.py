"""A rank's place in the data."""

from dataclasses import dataclass


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
