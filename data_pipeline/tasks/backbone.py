"""What a token of a backbone shows a model, from given coordinates: one rule for training, whose
coordinates are noised, and for prediction, whose coordinates are a user's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from jaxtyping import Float32, Integer

from data_pipeline.batch import GeometricBatch
from data_pipeline.chains import ATOMS, RESIDUES, Chain, encode
from data_pipeline.errors import OptionError
from data_pipeline.options import check_options
from data_pipeline.tasks.window import EDGES, Window, edges

UNKNOWN = len(RESIDUES)
"""Number of a residue that is none of the twenty."""


@dataclass(frozen=True)
class BackboneInputs:
    """A model's inputs from the chosen atoms of residues, tokens in chain order.

    points: the atoms, Å, zero where one is missing. vectors: differences to the tokens i-k..i-1 and
    i+1..i+k, zero where either atom is missing, outside the chain or across a chain break.
    scalars: residue type (20 and unknown), atom type, edge features. index: place in the chain.
    segment: unbroken stretch of the chain. Missing atoms have mask False.
    """

    atoms: Sequence[str] = ("N", "CA", "C")
    """Atoms of each residue, in their order in the sequence."""
    neighbours: Annotated[int, Ge(1)] = 8
    """k: differences to this many tokens on each side."""

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def vectors(self) -> int:
        return 2 * self.neighbours

    @property
    def scalars(self) -> int:
        return UNKNOWN + 1 + len(self.atoms) + EDGES

    def wide(self, window: Window, start: int, stop: int) -> tuple[Window, dict[str, Any]]:
        """The window with k tokens more on each side, as far as differences reach, and what
        `fields` takes, for tokens of no chain."""
        wide = Window(window.lengths, start - self.neighbours, stop + self.neighbours)
        return wide, {
            "xyz": np.full_like(wide.zeros(3), np.nan),
            "residue": np.full(wide.index.shape, UNKNOWN, np.uint8),
            "segment": np.full_like(wide.index, -1),
            "place": wide.index.copy(),
            "end": np.zeros_like(wide.index),
        }

    def fields(
        self,
        xyz: Float32[np.ndarray, "b 3 w"],
        residue: Integer[np.ndarray, "b w"],
        segment: Integer[np.ndarray, "b w"],
        place: Integer[np.ndarray, "b w"],
        end: Integer[np.ndarray, "b w"],
    ) -> dict[str, np.ndarray]:
        """The fields of a batch for the inner tokens of windows k wider on each side.

        Args:
            xyz: NaN where an atom is missing.
            place, end: in its chain, and the chain's tokens.
        """
        k = self.neighbours
        inner = slice(k, xyz.shape[-1] - k)
        observed = np.all(np.isfinite(xyz), axis=1)
        points = np.where(observed[:, None], xyz, np.float32(0))
        return {
            "points": points[..., inner],
            "vectors": self._differences(points, observed, segment),
            "scalars": self._features(place[:, inner], end[:, inner], residue[:, inner]),
            "index": place[:, inner],
            "mask": observed[:, inner],
            "segment": segment[:, inner],
        }

    def batch(self, chain: Chain, start: int = 0, stop: int | None = None) -> GeometricBatch:
        """Tokens [start, stop) of a chain of N, CA, C and O, as it is; None: to its end.

        Raises:
            OptionError: atoms are others than these.
        """
        if not self.atoms or not set(self.atoms) <= set(ATOMS):
            rule = f"must be some of {', '.join(ATOMS)}, which a backbone has"
            raise OptionError("atoms", list(self.atoms), rule)
        columns = [ATOMS.index(atom) for atom in self.atoms]
        count = len(columns)
        length = len(chain.sequence) * count
        stop = length if stop is None else stop
        window = Window((length,), start, stop)
        wide, tokens = self.wide(window, start, stop)
        places = wide.index[0][wide.mask[0]]
        known: Mapping[str, np.ndarray] = {
            "xyz": chain.xyz[:, columns].reshape(-1, 3)[places].T,
            "residue": encode(chain.sequence)[places // count],
            "segment": np.cumsum(chain.breaks)[places // count],
            "place": places,
            "end": np.full_like(places, length),
        }
        for name, x in known.items():
            tokens[name][0][..., wide.mask[0]] = x
        return window.batch(None, **self.fields(**tokens))

    def _differences(self, x: np.ndarray, observed: np.ndarray, segment: np.ndarray) -> np.ndarray:
        """(b, 2k, 3, n) from windows of n + 2k tokens."""
        k, n = self.neighbours, x.shape[-1] - 2 * self.neighbours
        out = np.empty((len(x), 2 * k, 3, n), np.float32)
        here = slice(k, k + n)
        for channel, offset in enumerate([*range(-k, 0), *range(1, k + 1)]):
            there = slice(k + offset, k + offset + n)
            near = observed[:, here] & observed[:, there]
            near &= segment[:, here] == segment[:, there]
            np.multiply(x[..., there] - x[..., here], near[:, None], out=out[:, channel])
        return out

    def _features(self, index: np.ndarray, lengths: np.ndarray, residue: np.ndarray) -> np.ndarray:
        exists, kinds = (index < lengths)[:, None], np.arange(len(self.atoms))[:, None]
        types = (residue[:, None] == np.arange(UNKNOWN + 1)[:, None]) & exists
        atoms = (index[:, None] % len(self.atoms) == kinds) & exists
        parts: list[Any] = [types, atoms, edges(index, lengths)]
        return np.concatenate(parts, axis=1, dtype=np.float32)
