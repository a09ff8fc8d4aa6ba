"""Slices of rows: what every task's sample is put together from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import GeometricBatch, Sample


class Window:
    """Tokens [start, stop) of rows; arrays have tokens last.

    Attributes:
        lengths: tokens of each whole row.
        ends: the same, (rows, 1).
        index: place of each token in its row, (rows, tokens).
        mask: whether the row has that token.
    """

    def __init__(self, lengths: Sequence[int], start: int, stop: int) -> None:
        self.lengths = tuple(lengths)
        self.ends = np.array(self.lengths, np.int64)[:, None]
        self.index = np.tile(np.arange(start, stop), (len(self.lengths), 1))
        self.mask = (self.index >= 0) & (self.index < self.ends)

    def zeros(self, *channels: int) -> np.ndarray:
        """(rows, *channels, tokens)."""
        rows, tokens = self.index.shape
        return np.zeros((rows, *channels, tokens), np.float32)

    def sample(
        self,
        target: np.ndarray,
        weight: np.ndarray | None = None,
        marked: np.ndarray | None = None,
        answer: Any = "points",
        bodies: tuple[tuple[int, ...], ...] | None = None,
        **inputs: np.ndarray,
    ) -> Sample:
        """With the inputs that are given, without points all zero; by default every token counts,
        or where targets are per sequence every row that is not empty."""
        if weight is None:
            weight = self.mask if target.ndim == 3 else self.ends[:, 0] > 0
        inputs = {"points": self.zeros(3), "index": self.index, "mask": self.mask} | inputs
        return Sample(
            GeometricBatch(
                **{name: _tensor(x) for name, x in inputs.items()},
                lengths=self.lengths,
                bodies=bodies,
            ),
            _tensor(target),
            _tensor(weight.astype(np.float32)),
            answer,
            None if marked is None else _tensor(marked),
        )


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))
