"""What a training task gives: samples by number, in slices, and what trivial answers score."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from data_pipeline.batch import Sample


@runtime_checkable
class Task(Protocol):
    """Splits ("train", "validation", "test") of items 0 .. size - 1."""

    name: str
    vectors: int
    """Vector channels of the inputs."""
    scalars: int
    """Scalar channels of the inputs."""
    unit: float
    """Mean squared error per coordinate of the trivial answer; losses are divided by it."""
    digest: str
    """Hash of all that the samples follow from."""

    def size(self, split: str) -> int: ...

    def parts(self, split: str) -> Sequence[tuple[int, int]]:
        """Items and weight of each source that is mixed into the split: in training, `weight`
        samples of each in every round. Items are numbered through the sources."""
        ...

    def length(self, split: str, item: int) -> int:
        """Tokens of an item."""
        ...

    def longest(self, split: str) -> int:
        """An item that no other exceeds in length."""
        ...

    def describe(self, split: str, item: int) -> str:
        """An item's name in messages."""
        ...

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        """Tokens [start, stop) of one row per item, padded behind its end (mask False, weight 0).

        None is an empty row. Random parts are functions of (key, item, token), so that slices of
        any cut join to the same rows. Per-sequence targets and weights come with every slice.
        """
        ...

    def baselines(self, split: str) -> dict[str, float]:
        """What trivial answers score on the evaluation's samples, in `unit`."""
        ...
