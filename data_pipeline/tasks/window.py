"""Slices of rows, and what a token's place in its row says: what every sample is made from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int

from data_pipeline.batch import GeometricBatch, Sample

DECAYS = (2.0, 8.0, 32.0)
"""Tokens over which the distance from an end decays by e."""
EDGES = 1 + 2 * len(DECAYS)
"""Number of edge features."""


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
        return Sample(
            self.batch(bodies, **inputs),
            _tensor(target),
            _tensor(weight.astype(np.float32)),
            answer,
            None if marked is None else _tensor(marked),
        )

    def batch(
        self, bodies: tuple[tuple[int, ...], ...] | None = None, **inputs: np.ndarray
    ) -> GeometricBatch:
        """The inputs that are given, without points all zero."""
        inputs = {"points": self.zeros(3), "index": self.index, "mask": self.mask} | inputs
        tensors = {name: _tensor(x) for name, x in inputs.items()}
        return GeometricBatch(**tensors, lengths=self.lengths, bodies=bodies)


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def edges(
    index: Int[np.ndarray, "#b #n"], lengths: Int[np.ndarray, "#b #n"]
) -> Float32[np.ndarray, "b s n"]:
    """Parity, and exp(-d/decay) for the distances d from both ends of rows of `lengths` tokens.

    Unlike sinusoids they mean the same at any length. Zero outside the row.
    """
    n = index.astype(np.float32)
    last = (lengths - 1).astype(np.float32)
    rows, tokens = np.broadcast_shapes(index.shape, lengths.shape)
    out = np.zeros((rows, EDGES, tokens), np.float32)
    out[:, 0] = 1 - 2 * (index % 2)
    for i, decay in enumerate(DECAYS):
        out[:, 1 + 2 * i] = np.exp(-n / np.float32(decay))
        out[:, 2 + 2 * i] = np.exp(np.minimum(n - last, 0) / np.float32(decay))
    return out * ((index >= 0) & (index < lengths))[:, None]
