"""Protein backbone denoising: find the deposited coordinates under Gaussian noise.

Tokens are the chosen atoms of the residues in chain order. Bonds are local, so local models do
well here: the task shows that training works, not that long context is used. With packed_length a
sample is many chains, one behind the other, up to the whole store.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import GeometricBatch, Sample
from data_pipeline.chains import RESIDUES, SPLITS
from data_pipeline.counter_rng import evaluation_key, hash64, normals, rotations
from data_pipeline.errors import ConfigError
from data_pipeline.store.reader import StoreMixture, before
from data_pipeline.tasks.features import EDGES, edges
from data_pipeline.tasks.packed import PackedBodies, Pieces

UNKNOWN = len(RESIDUES)
"""Number of a residue that is none of the twenty."""
BUNDLED = "stores/bundled"
"""Where training looks for the data that come with the package."""
SIGMAS = (1e-3, 1e3)
"""Å: from the last digit of a PDB file's coordinates to beyond the size of any chain."""
SPREAD = 100.0
"""Å: standard deviation of the translations of packed chains."""
_AT_ONCE = 1 << 16
"""Tokens of which the baselines hold the samples at once."""


@dataclass
class Denoising:
    """Noised backbones with what a conformation shows locally.

    points: noised atoms, Å. vectors: differences of noised positions to the tokens i-k..i-1 and
    i+1..i+k, zero where either atom is missing, outside the chain or across a chain break; then
    the store's own `vectors`. scalars: residue type (20 and unknown), atom type, edge features;
    then the store's own `scalars`. index: place in the chain. segment: unbroken stretch of the
    chain. Missing atoms have mask False and weight 0. target: the atoms as deposited, Å.

    Packed samples: segment is the number of the chain in its sample, and each chain has a rigid
    motion of its own: a random rotation about the origin of its coordinates, then a normal
    translation. Tokens behind a row's end have segment -1.
    """

    store: str | Sequence[str] = BUNDLED
    """Folder that `prepare` built, or the URL of one; several make a mixture."""
    sigma: float = 1.0
    """Standard deviation of the noise in each coordinate, Å."""
    atoms: Sequence[str] = ("N", "CA", "C")
    """Atoms of each residue, in their order in the sequence."""
    neighbours: int = 8
    """k: differences to this many tokens on each side."""
    packed_length: int | None = None
    """Tokens that a sample of packed chains has at most; None: each chain is a sample."""
    packed_copies: int = 1
    """Times each chain comes in an epoch of packed samples, with noise and a motion of its own."""
    weights: Sequence[int] | None = None
    """Samples of each store in a round of training; None: one of each."""

    name = "denoising"

    def __post_init__(self) -> None:
        if not SIGMAS[0] <= self.sigma <= SIGMAS[1]:  # NaN is not
            raise ConfigError(
                f"task.sigma={self.sigma} must be a length from {SIGMAS[0]} to {SIGMAS[1]:.0f} Å"
            )
        if self.neighbours < 1:
            raise ConfigError(f"task.neighbours={self.neighbours} must be 1 or more")
        if self.packed_copies < 1 or (self.packed_copies > 1 and self.packed_length is None):
            raise ConfigError(
                f"task.packed_copies={self.packed_copies} must be 1 or more, and 1 without "
                "task.packed_length"
            )
        paths = [self.store] if isinstance(self.store, str) else list(self.store)
        weights = [1] * len(paths) if self.weights is None else list(self.weights)
        if len(weights) != len(paths) or min(weights, default=1) < 1:
            raise ConfigError(f"task.weights={weights} must be {len(paths)} numbers of 1 or more")
        self._stores = StoreMixture(paths)
        distinct, known = set(self.atoms), self._stores.atoms
        if not distinct or not distinct <= set(known) or len(distinct) < len(self.atoms):
            raise ConfigError(
                f"task.atoms={list(self.atoms)} must be some of {', '.join(known)}, each once"
            )
        self._layouts = {
            split: PackedBodies(
                self._stores, split, len(self.atoms), self.packed_length, self.packed_copies
            )
            for split in SPLITS
        }
        self._weights = weights
        self._columns = [known.index(atom) for atom in self.atoms]
        kinds = self._stores.kinds
        self._given = [(name, kinds[name][1]) for name in ("vectors", "scalars") if name in kinds]
        more = {name: shape[0] for name, shape in self._given}
        self.vectors = 2 * self.neighbours + more.get("vectors", 0)
        self.scalars = len(RESIDUES) + 1 + len(self.atoms) + EDGES + more.get("scalars", 0)
        self.unit = self.sigma**2
        options: list[Any] = [self.name, self._stores.digest, self.sigma, list(self.atoms)]
        options.append(self.neighbours)
        if self.packed_length is not None:
            options.append({"packed_length": self.packed_length})
        if self.packed_copies > 1:
            options.append({"packed_copies": self.packed_copies})
        if len(paths) > 1:
            options.append({"weights": weights})
        self.digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()

    def size(self, split: str) -> int:
        return len(self._layouts[split].lengths)

    def parts(self, split: str) -> list[tuple[int, int]]:
        return list(zip(self._layouts[split].sizes, self._weights, strict=True))

    def length(self, split: str, item: int) -> int:
        return int(self._layouts[split].lengths[item])

    def longest(self, split: str) -> int:
        return int(np.argmax(self._layouts[split].lengths))

    def describe(self, split: str, item: int) -> str:
        return self._layouts[split].describe(item)

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        # One window holds the slice and k tokens on each side of it.
        k, rows, width = self.neighbours, len(items), stop - start + 2 * self.neighbours
        clean = np.full((rows, 3, width), np.nan, np.float32)
        noise = np.zeros_like(clean)
        residue = np.full((rows, width), UNKNOWN, np.uint8)
        body, stretch = (np.full((rows, width), -1, np.int64) for _ in range(2))
        index = np.tile(np.arange(start - k, stop + k), (rows, 1))
        lengths = np.zeros((rows, width), np.int64)
        given = {name: np.zeros((rows, *shape, width), np.float32) for name, shape in self._given}
        for row, pieces, low, tokens in self._read(split, items, keys, start - k, stop + k):
            here = slice(low - start + k, low - start + k + len(tokens["xyz"]))
            clean[row, :, here] = tokens["xyz"].T
            noise[row, :, here] = _noise(keys[row], low, low + len(tokens["xyz"]))
            residue[row, here] = tokens["residue"]
            stretch[row, here] = tokens["segment"]
            body[row, here] = np.repeat(pieces.body, pieces.tokens)
            index[row, here] = pieces.places
            lengths[row, here] = np.repeat(pieces.lengths, pieces.tokens)
            for name, array in given.items():
                array[row, ..., here] = np.moveaxis(tokens[name], 0, -1)
        observed = np.all(np.isfinite(clean), axis=1)
        clean = np.where(observed[:, None], clean, 0)
        noised = clean + np.float32(self.sigma) * noise * observed[:, None]
        vectors = self._differences(noised, observed, (body << 32) + stretch)
        segment = stretch if self.packed_length is None else body
        inner = slice(k, width - k)
        index, mask = index[:, inner], observed[:, inner]
        scalars = self._features(index, lengths[:, inner], residue[:, inner])
        if "vectors" in given:
            vectors = np.concatenate([vectors, given["vectors"][..., inner]], 1)
        if "scalars" in given:
            scalars = np.concatenate([scalars, given["scalars"][..., inner]], 1)
        inputs = GeometricBatch(
            points=torch.from_numpy(noised[..., inner].copy()),
            vectors=torch.from_numpy(vectors),
            scalars=torch.from_numpy(scalars),
            index=torch.from_numpy(index.copy()),
            mask=torch.from_numpy(mask.copy()),
            segment=torch.from_numpy(segment[:, inner].copy()),
        )
        return Sample(
            inputs,
            target=torch.from_numpy(clean[..., inner].copy()),
            weight=torch.from_numpy(mask.astype(np.float32)),
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
        near, atoms = 2 * self.neighbours, len(self.atoms)
        total, count = np.zeros((near + 1, near + 1)), 0
        for item in range(self.size(split)):
            key, length = evaluation_key(split, item), self.length(split, item)
            for start in range(0, length, _AT_ONCE * atoms):
                stop = min(start + _AT_ONCE * atoms, length)
                sample = self.sample(split, [item], [key], start, stop)
                step = (sample.target - sample.inputs.points)[:, None]
                x = torch.cat([sample.inputs.vectors[:, :near], step], 1)[0, ..., kind::atoms]
                x = x.flatten(1).double().numpy()
                total += x @ x.T
                count += 3 * int(sample.weight[:, kind::atoms].sum())
        return total, count

    def _read(
        self,
        split: str,
        items: Sequence[int | None],
        keys: Sequence[int],
        start: int,
        stop: int,
    ) -> Iterator[tuple[int, Pieces, int, dict[str, np.ndarray]]]:
        """Of every row that has tokens in [start, stop): its number, what they are made of, the
        first of them, and the arrays' rows for each."""
        layout, atoms = self._layouts[split], len(self.atoms)
        spans = []
        for row, item in enumerate(items):
            low, high = max(start, 0), min(stop, 0 if item is None else self.length(split, item))
            if item is not None and low < high:
                spans.append((row, low, layout.pieces(item, keys[row], low, high)))
        if not spans:
            return
        chains, starts, stops = (
            np.concatenate([getattr(pieces, name) for *_, pieces in spans])
            for name in ("chains", "starts", "stops")
        )
        first, last = starts // atoms, -(-stops // atoms)
        # Residues that a slice cuts are read whole.
        places = np.arange(int((last - first).sum()) * atoms)
        offset = np.repeat(before(last - first) * atoms + starts - first * atoms, stops - starts)
        tokens = offset + places[: len(offset)] - np.repeat(before(stops - starts), stops - starts)
        found = {}
        for name in ("xyz", "residue", "segment", *(name for name, _ in self._given)):
            rows = self._stores.gather(name, chains, first, last)
            if name == "xyz":
                found[name] = rows[:, self._columns].reshape(-1, 3)[tokens]
            else:
                found[name] = rows[tokens // atoms]
        done = 0
        for row, low, pieces in spans:
            here = slice(done, done := done + int(pieces.tokens.sum()))
            mine = {name: rows[here] for name, rows in found.items()}
            if self.packed_length is not None:
                _move(mine, pieces, keys[row])
            yield row, pieces, low, mine

    def _differences(self, x: np.ndarray, observed: np.ndarray, run: np.ndarray) -> np.ndarray:
        """(b, 2k, 3, n) from windows of n + 2k tokens; `run` tells unbroken stretches apart."""
        k, n = self.neighbours, x.shape[-1] - 2 * self.neighbours
        out = np.empty((len(x), 2 * k, 3, n), np.float32)
        here = slice(k, k + n)
        for channel, offset in enumerate([*range(-k, 0), *range(1, k + 1)]):
            there = slice(k + offset, k + offset + n)
            near = observed[:, here] & observed[:, there]
            near &= run[:, here] == run[:, there]
            np.multiply(x[..., there] - x[..., here], near[:, None], out=out[:, channel])
        return out

    def _features(self, index: np.ndarray, lengths: np.ndarray, residue: np.ndarray) -> np.ndarray:
        exists = (index < lengths)[:, None]
        kinds = np.arange(len(self.atoms))[:, None]
        types = (residue[:, None] == np.arange(UNKNOWN + 1)[:, None]) & exists
        atoms = (index[:, None] % len(self.atoms) == kinds) & exists
        parts: list[Any] = [types, atoms, edges(index, lengths)]
        return np.concatenate(parts, axis=1, dtype=np.float32)


def _noise(key: int, start: int, stop: int) -> np.ndarray:
    return normals(hash64("noise", key), start, stop)[:, :3].T


def _move(tokens: dict[str, np.ndarray], pieces: Pieces, key: int) -> None:
    """Turns and shifts each chain by a motion that the key and its place in the sample give."""
    first, stop = int(pieces.body[0]), int(pieces.body[-1]) + 1
    turns = rotations(hash64("motion", key), first, stop)
    shifts = SPREAD * normals(hash64("shift", key), first, stop)[:, :3]
    for name in tokens.keys() & {"xyz", "vectors"}:
        x = tokens[name].astype(np.float64)
        columns = [np.repeat(turns[:, :, j], pieces.tokens, axis=0) for j in range(3)]
        if name == "vectors":
            columns = [column[:, None] for column in columns]
        # Term by term, so that no slicing changes how the sum is rounded.
        turned = columns[0] * x[..., :1] + columns[1] * x[..., 1:2] + columns[2] * x[..., 2:]
        if name == "xyz":
            turned = turned + np.repeat(shifts, pieces.tokens, axis=0)
        tokens[name] = turned.astype(np.float32)
