"""What a training task gives: samples by number, in slices, and what trivial answers score."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, cast

import numpy as np
from jaxtyping import Int

from data_pipeline.batch import Sample
from data_pipeline.options import check_options


class Task(ABC):
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

    @abstractmethod
    def lengths(self, split: str) -> Int[np.ndarray, " items"]:
        """Tokens of each item."""

    @abstractmethod
    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        """Tokens [start, stop) of one row per item, padded behind its end (mask False, weight 0).

        None is an empty row. Random parts are functions of (key, item, token), so that slices of
        any cut join to the same rows. With every slice come the lengths and bodies of whole rows,
        and targets and weights per sequence.
        """

    @abstractmethod
    def baselines(self, split: str) -> dict[str, float]:
        """What trivial answers score on the evaluation's samples, in `unit`."""

    def hash(self, *options: Any) -> str:
        """A digest of the task's name and of whatever else its samples follow from."""
        return hashlib.sha256(json.dumps([self.name, *options]).encode()).hexdigest()

    def size(self, split: str) -> int:
        return len(self.lengths(split))

    def row_lengths(self, split: str, items: Sequence[int | None]) -> tuple[int, ...]:
        """Tokens of a row for each item; None is an empty row."""
        return tuple(0 if item is None else self.length(split, item) for item in items)

    def length(self, split: str, item: int) -> int:
        return int(self.lengths(split)[item])

    def longest(self, split: str) -> int:
        """An item that no other exceeds in length."""
        return int(np.argmax(self.lengths(split)))

    def parts(self, split: str) -> Sequence[tuple[int, int]]:
        """Items and weight of each source that is mixed into the split: in training, `weight`
        samples of each in every round. Items are numbered through the sources."""
        return [(self.size(split), 1)]

    def describe(self, split: str, item: int) -> str:
        """An item's name in messages."""
        return f"sequence {item} of {split}"


class ProceduralTask(Task):
    """For dataclasses of made sequences, all of one length: samples follow from the options and the
    item's number."""

    tokens: int
    """Length of every sequence."""
    train_size: int
    held_out_size: int
    came_later: ClassVar[dict[str, Any]] = {}
    """Options that earlier versions had not, and what those did: with it, their runs go on."""

    def _settle(self) -> None:
        """Checks the options; then their digest.

        Raises:
            OptionError: one breaks the bounds at its field.
        """
        check_options(self)
        self.digest = self.hash(self.options())

    def options(self) -> dict[str, Any]:
        """What the samples follow from."""
        options = asdict(cast(Any, self))
        return {k: v for k, v in options.items() if (k, v) not in self.came_later.items()}

    def read_out(self, scalars: np.ndarray) -> dict[str, Any]:
        """What answers, and at which tokens, if not the points at all of them."""
        return {}

    def lengths(self, split: str) -> np.ndarray:
        size = self.train_size if split == "train" else self.held_out_size
        return np.broadcast_to(self.tokens, size)
