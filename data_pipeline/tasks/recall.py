"""Equivariant associative recall: which value followed this key? (SE(3)-Hyena, arXiv 2407.01049)

Keys and values alternate; the last token is a key that occurred before, and the answer is its
value. Vectors have random directions and magnitudes U[1, V]; values are independent of keys (the
paper also calls them rotated keys, but a rotation could not change the magnitude).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float32, Float64

from data_pipeline.batch import Sample
from data_pipeline.counter_rng import evaluation_key, hash64, normals, rotations, uniforms
from data_pipeline.tasks.protocol import ProceduralTask
from data_pipeline.tasks.window import EDGES, Window, edges

MOST_PAIRS = 1 << 20
"""Every sequence makes the whole vocabulary: here, 50 MB."""


@dataclass
class Recall(ProceduralTask):
    """Sequences that follow from their number alone; no data is needed.

    vectors: one channel, the keys and values. scalars: edge features, whose parity is +1 for keys
    and -1 for values, and a mark on the query. points are zero: nothing has a place. target: the
    value, one per sequence. Where the length is even, a token of noise goes first.
    """

    tokens: Annotated[int, Ge(3)] = 32
    """Length of every sequence: of key, value and query at least."""
    pairs: Annotated[int, Ge(1), Le(MOST_PAIRS)] = 4
    """V: pairs in the vocabulary, and the largest magnitude."""
    vocabulary: Literal["random", "fixed"] = "random"
    """A fresh one in each sequence; or one for all, turned at random in training."""
    train_size: Annotated[int, Ge(1)] = 1 << 20
    """Sequences of an epoch; the paper has 2600."""
    held_out_size: Annotated[int, Ge(1)] = 200
    """Sequences of validation and of test, as in the paper."""
    seed: int = 0
    """Of the sequences; not of the training."""
    readout: Literal["mean", "marked"] = "mean"
    """Of the answer: from all tokens, which suits convolutions that bring the query to the values;
    or from the query, which suits attention that brings the values to the query."""

    name = "recall"
    vectors = 1
    scalars = EDGES + 1
    came_later: ClassVar = {"readout": "mean"}

    def __post_init__(self) -> None:
        self._settle()
        self.unit = (self.pairs**2 + self.pairs + 1) / 9
        """Mean square of a target's coordinate: the third of E m² for m in U[1, V]."""
        self._front = 1 - self.tokens % 2
        self._occurrences = (self.tokens - 1 - self._front) // 2

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        """See Task. Keys turn a fixed vocabulary in training and do nothing else."""
        window = Window(self.row_lengths(split, items), start, stop)
        vectors, target = window.zeros(1, 3), np.zeros((len(items), 3), np.float32)
        for row, (item, key) in enumerate(zip(items, keys, strict=True)):
            if item is not None:
                tokens, target[row] = self._sequence(split, item, key, start, stop)
                vectors[row, 0, :, : len(tokens)] = tokens.T
        query = window.mask & (window.index == self.tokens - 1)
        scalars = np.concatenate([edges(window.index, window.ends), query[:, None]], 1)
        # Keys are even from the front on.
        scalars[:, 0] *= (window.index >= self._front) * (1 - 2 * self._front)
        return window.sample(target, vectors=vectors, scalars=scalars, **self.read_out(scalars))

    def read_out(self, scalars: Float32[np.ndarray, "b s n"]) -> dict[str, Any]:
        query = scalars[:, -1] > 0
        return {"answer": "vectors", "marked": query if self.readout == "marked" else None}

    def baselines(self, split: str) -> dict[str, float]:
        """Mean squared error per coordinate, over the unit, of answering zero and of answering the
        mean of the sequence's values; of training's sequences as many as are held out."""
        items = range(min(self.size(split), self.held_out_size))
        zero = mean = 0.0
        for item in items:
            key = evaluation_key(split, item)
            tokens, answer = self._sequence(split, item, key, 0, self.tokens)
            zero += float((answer**2).sum())
            mean += float(((tokens[self._front + 1 :: 2].mean(0) - answer) ** 2).sum())
        scale = 3 * len(items) * self.unit
        return {"zero": zero / scale, "mean of the values": mean / scale}

    def _sequence(
        self, split: str, item: int, key: int, start: int, stop: int
    ) -> tuple[Float64[np.ndarray, "n 3"], Float64[np.ndarray, "3"]]:
        """The existing tokens of [start, stop), and the answer."""
        own = hash64(self.seed, split, item)
        words = self._vocabulary(split, own, key)
        # Place -1 is the noise at the front; each pair has two places, the query the last one.
        places = np.arange(start, min(stop, self.tokens)) - self._front
        first = max(int(places[0]), 0) // 2 if len(places) else 0
        last = max(int(places[-1]), 0) // 2 + 1 if len(places) else 0
        chosen = self._choices(hash64("pairs", own), first, last)
        asked = hash64("query", own)
        pair = int(uniforms(asked, 0, 1)[0, 0] * self._occurrences)
        answer = self._choices(hash64("pairs", own), pair, pair + 1)[0]
        tokens = words[chosen[np.maximum(places // 2 - first, 0)], places % 2]
        tokens[places == 2 * self._occurrences] = words[answer, 0]
        tokens[places == -1] = _random_vectors(hash64("front", own), 1, self.pairs)[0]
        return tokens, words[answer, 1]

    def _choices(self, key: int, start: int, stop: int) -> np.ndarray:
        """Which pair of the vocabulary stands in each of [start, stop)."""
        return (uniforms(key, start, stop)[:, 0] * self.pairs).astype(np.int64)

    def _vocabulary(self, split: str, own: int, key: int) -> Float64[np.ndarray, "pairs 2 3"]:
        """Keys and values."""
        fixed = self.vocabulary == "fixed"
        source = hash64("vocabulary", self.seed if fixed else own)
        words = _random_vectors(source, 2 * self.pairs, self.pairs).reshape(self.pairs, 2, 3)
        return words @ rotations(key, 0, 1)[0] if fixed and split == "train" else words


def _random_vectors(key: int, count: int, largest: int) -> Float64[np.ndarray, "count 3"]:
    """Directions of normalised Gaussians, magnitudes U[1, largest]."""
    x = normals(hash64("direction", key), 0, count)[:, :3]
    magnitude = 1 + (largest - 1) * uniforms(hash64("magnitude", key), 0, count)[:, :1]
    return magnitude * x / np.linalg.norm(x, axis=1, keepdims=True)
