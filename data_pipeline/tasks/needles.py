"""Recall over long distances: the first token asks for a key; which values followed it?

Pairs, a key and behind it its value, lie anywhere in the sequence among vectors that mean nothing.
Every value answers where it stands: with itself if its key is the one that the first token asks
for, else with zero. A token that knows its own pair alone cannot tell: the question, up to a whole
sequence away, decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float64, Int64

from data_pipeline.batch import Sample
from data_pipeline.counter_rng import hash64, normals, rotations, uniforms
from data_pipeline.errors import OptionError
from data_pipeline.tasks.protocol import ProceduralTask
from data_pipeline.tasks.window import Window

MOST_KEYS = 6
"""Both ways along three axes."""


@dataclass
class Needles(ProceduralTask):
    """Sequences that follow from their number alone, made slice by slice.

    vectors: one channel. A sequence's keys are random unit vectors at right angles to each other,
    or opposite; values have random directions and magnitudes U[1, 2], no two alike. scalars: marks
    of the question, of keys and of values. points are zero: nothing has a place. target: per token,
    and values alone count. A slice costs its own tokens and pairs.
    """

    tokens: int = 1 << 14
    """Length of every sequence."""
    pairs: Annotated[int, Ge(1)] = 1 << 10
    """Each lies at random in its own one of as many equal parts of the sequence."""
    keys: Annotated[int, Ge(1), Le(MOST_KEYS)] = 3
    """Different keys; each pair has any of them. The fourth to the sixth oppose the others."""
    noise: Annotated[float, Ge(0)] = 1.0
    """Length of the vectors of tokens that are in no pair."""
    train_size: Annotated[int, Ge(1)] = 1 << 20
    """Sequences of an epoch."""
    held_out_size: Annotated[int, Ge(1)] = 8
    """Sequences of validation and of test."""
    seed: int = 0
    """Of the sequences; not of the training."""

    name = "needles"
    vectors = 1
    scalars = 3

    def __post_init__(self) -> None:
        self._settle()
        if self.tokens < (least := 1 + 2 * self.pairs):
            rule = f"a question and pairs={self.pairs} need {least} or more"
            raise OptionError("tokens", self.tokens, rule)
        self.unit = 7 / 9 / self.keys
        """Mean square of a target's coordinate: the third of E m² for m in U[1, 2], if asked."""

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        """See Task. Keys do nothing."""
        window = Window(self.row_lengths(split, items), start, stop)
        vectors, marks, target = (window.zeros(3) for _ in range(3))
        end = max(min(stop, self.tokens), start)
        for row, item in enumerate(items):
            if item is None:
                continue
            own = hash64(self.seed, split, item)
            noise = _directions(hash64("noise", own), start, end)
            vectors[row, :, : end - start] = self.noise * noise.T
            axes = rotations(hash64("keys", own), 0, 1)[0]
            words = np.concatenate([axes, -axes])[: self.keys]
            places, chosen, values = self._pairs(own, *self._reach(start, end))
            for mark, place, content in (
                (0, np.zeros(1, np.int64), words[:1]),
                (1, places, words[chosen]),
                (2, places + 1, values),
            ):
                here = (start <= place) & (place < end)
                marks[row, mark, place[here] - start] = 1
                vectors[row, :, place[here] - start] = content[here]
            # The last of these, values, answer if their key is asked for.
            target[row, :, place[here] - start] = (content * (chosen == 0)[:, None])[here]
        return window.sample(target, marks[:, 2], vectors=vectors[:, None], scalars=marks)

    def baselines(self, split: str) -> dict[str, float]:
        """Mean squared error per coordinate, over the unit, of answering zero and of the best
        answer that does not look at the question: every value's own share."""
        zero = share = weight = 0.0
        for item in range(min(self.size(split), self.held_out_size)):
            own = hash64(self.seed, split, item)
            _, chosen, values = self._pairs(own, 0, self.pairs)
            squares, asked = (values**2).sum(1), chosen == 0
            zero += float((squares * asked).sum())
            share += float((squares * (asked - 1 / self.keys) ** 2).sum())
            weight += 3 * len(squares) * self.unit
        return {"zero": zero / weight, "share of every value": share / weight}

    def _reach(self, start: int, end: int) -> tuple[int, int]:
        """The pairs [first, last) that may touch tokens [start, end)."""
        body = self.tokens - 1
        first, last = (max((token * self.pairs - 1) // body, 0) for token in (start, end))
        return first, min(last + 1, self.pairs) if end > start else first

    def _pairs(
        self, own: int, first: int, last: int
    ) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"], Float64[np.ndarray, "p 3"]]:
        """Of pairs [first, last) of a sequence: the place of the key, behind which the value
        stands; which of the sequence's keys, 0 is asked for; the value."""
        u = uniforms(hash64("pairs", own), first, last)
        bounds = 1 + np.arange(first, last + 1) * (self.tokens - 1) // self.pairs
        places = bounds[:-1] + (u[:, 0] * (np.diff(bounds) - 1)).astype(np.int64)
        values = (1 + u[:, 2:3]) * _directions(hash64("values", own), first, last)
        return places, (u[:, 1] * self.keys).astype(np.int64), values


def _directions(key: int, start: int, stop: int) -> Float64[np.ndarray, "n 3"]:
    """A random unit vector for each place in [start, stop)."""
    x = normals(key, start, stop)[:, :3]
    return x / np.linalg.norm(x, axis=1, keepdims=True)
