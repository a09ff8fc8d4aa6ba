"""Protein backbone denoising: find the deposited coordinates under Gaussian noise.

Tokens are the chosen atoms of the residues in chain order. Bonds are local, so local models do
well here: the task shows that training works, not that long context is used.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import GeometricBatch, Sample
from data_pipeline.chains import ATOMS, RESIDUES
from data_pipeline.clusters import SPLITS
from data_pipeline.errors import ConfigError
from data_pipeline.features import EDGES, edges
from data_pipeline.keyed import evaluation_key, hash64, normals
from data_pipeline.store import Store

UNKNOWN = len(RESIDUES)
"""Number of a residue that is none of the twenty."""
SIGMAS = (1e-3, 1e3)
"""Å: from the last digit of a PDB file's coordinates to beyond the size of any chain."""


@dataclass
class Denoising:
    """Noised backbones with what a conformation shows locally.

    points: noised atoms, Å. vectors: differences of noised positions to the tokens i-k..i-1 and
    i+1..i+k, zero where either atom is missing, outside the chain or across a chain break.
    scalars: residue type (20 and unknown), atom type, edge features. segment: unbroken stretch of
    the chain. Missing atoms have mask False and weight 0. target: the atoms as deposited, Å.
    """

    store: str = "stores/bundled"
    """Folder that `prepare` built."""
    sigma: float = 1.0
    """Standard deviation of the noise in each coordinate, Å."""
    atoms: Sequence[str] = ("N", "CA", "C")
    """Atoms of each residue, in their order in the sequence."""
    neighbours: int = 8
    """k: differences to this many tokens on each side."""

    name = "denoising"

    def __post_init__(self) -> None:
        if not SIGMAS[0] <= self.sigma <= SIGMAS[1]:  # NaN is not
            raise ConfigError(
                f"task.sigma={self.sigma} must be a length from {SIGMAS[0]} to {SIGMAS[1]:.0f} Å"
            )
        if self.neighbours < 1:
            raise ConfigError(f"task.neighbours={self.neighbours} must be 1 or more")
        distinct = set(self.atoms)
        if not distinct or not distinct <= set(ATOMS) or len(distinct) < len(self.atoms):
            raise ConfigError(
                f"task.atoms={list(self.atoms)} must be some of {', '.join(ATOMS)}, each once"
            )
        self._store = Store(self.store)
        self._chains = {split: self._store.chains(split) for split in SPLITS}
        self._columns = [ATOMS.index(atom) for atom in self.atoms]
        self.vectors = 2 * self.neighbours
        self.scalars = len(RESIDUES) + 1 + len(self.atoms) + EDGES
        self.unit = self.sigma**2
        options = [self.name, self._store.digest, self.sigma, list(self.atoms), self.neighbours]
        self.digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()

    def size(self, split: str) -> int:
        return len(self._chains[split])

    def length(self, split: str, item: int) -> int:
        return int(self._store.lengths[self._chain(split, item)]) * len(self.atoms)

    def longest(self, split: str) -> int:
        return int(np.argmax(self._store.lengths[self._chains[split]]))

    def describe(self, split: str, item: int) -> str:
        return f"chain {self._store.name(self._chain(split, item))}"

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        k, n = self.neighbours, stop - start
        lengths = np.array([0 if item is None else self.length(split, item) for item in items])
        # One window holds the slice and k tokens on each side of it.
        clean = np.full((len(items), 3, n + 2 * k), np.nan, np.float32)
        noise = np.zeros_like(clean)
        residue = np.full((len(items), n + 2 * k), UNKNOWN, np.uint8)
        segment = np.zeros((len(items), n + 2 * k), np.int64)
        for row, (item, key) in enumerate(zip(items, keys, strict=True)):
            low, high = max(start - k, 0), min(stop + k, int(lengths[row]))
            if item is None or low >= high:
                continue
            here = slice(low - start + k, high - start + k)
            chain = self._chain(split, item)
            clean[row, :, here] = self._tokens("xyz", chain, low, high).T
            residue[row, here] = self._tokens("residue", chain, low, high)
            segment[row, here] = self._tokens("segment", chain, low, high)
            noise[row, :, here] = normals(hash64("noise", key), low, high)[:, :3].T
        observed = np.all(np.isfinite(clean), axis=1)
        clean = np.where(observed[:, None], clean, 0)
        noised = clean + np.float32(self.sigma) * noise * observed[:, None]
        index = np.arange(start, stop)
        inner = slice(k, k + n)
        inputs = GeometricBatch(
            points=torch.from_numpy(noised[..., inner].copy()),
            vectors=torch.from_numpy(self._differences(noised, observed, segment)),
            scalars=torch.from_numpy(self._features(index, lengths, residue[:, inner])),
            index=torch.from_numpy(np.tile(index, (len(items), 1))),
            mask=torch.from_numpy(observed[:, inner].copy()),
            segment=torch.from_numpy(segment[:, inner].copy()),
        )
        return Sample(
            inputs,
            target=torch.from_numpy(clean[..., inner].copy()),
            weight=torch.from_numpy(observed[:, inner].astype(np.float32)),
        )

    def baselines(self, split: str) -> dict[str, float]:
        """Mean squared error per coordinate, over σ²: of the noised input itself, and of the best
        linear combination of its differences to the nearest 1 and k tokens on either side, tuned
        for each kind of atom on the training split."""
        kinds = range(len(self.atoms))
        tuning = [self._moments("train", kind) for kind in kinds]
        asked = [self._moments(split, kind) for kind in kinds]
        observed = sum(count for _, count in asked)
        errors = {"identity": sum(float(m[-1, -1]) for m, _ in asked)}
        k = self.neighbours
        for reach in sorted({1, k}):
            near = [*range(k - reach, k + reach), -1]
            error = 0.0
            for (fit, _), (m, _) in zip(tuning, asked, strict=True):
                fit, m = fit[np.ix_(near, near)], m[np.ix_(near, near)]
                weights = np.append(-np.linalg.lstsq(fit[:-1, :-1], fit[:-1, -1])[0], 1.0)
                error += float(weights @ m @ weights)
            errors[f"tuned local average, k={reach}"] = error
        return {name: error / observed / self.unit for name, error in errors.items()}

    def _moments(self, split: str, kind: int) -> tuple[np.ndarray, int]:
        """Over the atoms of one kind: summed products of the differences and the step to the
        target, and the number of coordinates."""
        total, count = np.zeros((self.vectors + 1, self.vectors + 1)), 0
        for item in range(self.size(split)):
            key = evaluation_key(split, item)
            sample = self.sample(split, [item], [key], 0, self.length(split, item))
            step = (sample.target - sample.inputs.points)[:, None]
            x = torch.cat([sample.inputs.vectors, step], 1)[0, :, :, kind :: len(self.atoms)]
            x = x.flatten(1).double().numpy()
            total += x @ x.T
            count += 3 * int(sample.weight[:, kind :: len(self.atoms)].sum())
        return total, count

    def _chain(self, split: str, item: int) -> int:
        return int(self._chains[split][item])

    def _tokens(self, array: str, chain: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a chain, from an array that has rows of residues."""
        atoms = len(self.atoms)
        first, last = start // atoms, -(-stop // atoms)
        rows = self._store.read(array, chain, first, last)
        rows = rows[:, self._columns].reshape(-1, 3) if array == "xyz" else rows.repeat(atoms)
        return rows[start - first * atoms : stop - first * atoms]

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
        exists = index < lengths[:, None]
        types = (residue[:, None] == np.arange(UNKNOWN + 1)[:, None]) & exists[:, None]
        atoms = (index % len(self.atoms) == np.arange(len(self.atoms))[:, None]) & exists[:, None]
        parts: list[Any] = [types, atoms, edges(index, lengths)]
        return np.concatenate(parts, axis=1, dtype=np.float32)
