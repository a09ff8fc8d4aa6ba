"""Protein backbone denoising: find the deposited coordinates under Gaussian noise.

Tokens are the chosen atoms of the residues in chain order. Bonds are local, so local models do
well here: the task shows that training works, not that long context is used. With packed_length a
sample is many chains, one behind the other, up to the whole store.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Le

from data_pipeline.batch import Sample
from data_pipeline.chains import RESIDUES, SPLITS
from data_pipeline.counter_rng import evaluation_key, hash64, normals, rotations
from data_pipeline.errors import OptionError
from data_pipeline.options import check_options
from data_pipeline.store.reader import StoreMixture, before
from data_pipeline.tasks.features import EDGES, edges
from data_pipeline.tasks.packed import PackedBodies, Pieces, join
from data_pipeline.tasks.window import Window

UNKNOWN = len(RESIDUES)
"""Number of a residue that is none of the twenty."""
BUNDLED = "stores/bundled"
"""Where training looks for the data that come with the package."""
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

    Packed samples: each chain is a body with a rigid motion of its own, a random rotation about the
    origin of its coordinates, then a normal translation; segments of different chains differ, and
    tokens behind a row's end have segment -1.
    """

    store: str | Sequence[str] = BUNDLED
    """Folder that `prepare` built, or the URL of one; several make a mixture."""
    sigma: Annotated[float, Ge(1e-3), Le(1e3)] = 1.0
    """Standard deviation of the noise in each coordinate, Å: from the last digit of a PDB file's
    coordinates to beyond the size of any chain."""
    atoms: Sequence[str] = ("N", "CA", "C")
    """Atoms of each residue, in their order in the sequence."""
    neighbours: Annotated[int, Ge(1)] = 8
    """k: differences to this many tokens on each side."""
    packed_length: int | None = None
    """Tokens that a sample of packed chains has at most; None: each chain is a sample."""
    packed_copies: Annotated[int, Ge(1)] = 1
    """Times each chain comes in an epoch of packed samples, with noise and a motion of its own."""
    bodies: Literal["apart", "together"] = "apart"
    """Whether packed chains are bodies that do not see each other, or one body."""
    weights: Sequence[Annotated[int, Ge(1)]] | None = None
    """Samples of each store in a round of training; None: one of each."""

    name = "denoising"

    def __post_init__(self) -> None:
        check_options(self)
        packed = self.packed_length is not None
        if self.packed_copies > 1 and not packed:
            raise OptionError(
                "packed_copies", self.packed_copies, "must be 1 without packed_length"
            )
        paths = [self.store] if isinstance(self.store, str) else list(self.store)
        self._weights = [1] * len(paths) if self.weights is None else list(self.weights)
        if len(self._weights) != len(paths):
            rule = f"must be {len(paths)} numbers of 1 or more, one for each store"
            raise OptionError("weights", self._weights, rule)
        self._stores = StoreMixture(paths)
        distinct, known = set(self.atoms), self._stores.atoms
        if not distinct or not distinct <= set(known) or len(distinct) < len(self.atoms):
            rule = f"must be some of {', '.join(known)}, each once"
            raise OptionError("atoms", list(self.atoms), rule)
        self._items = {
            split: PackedBodies(
                self._stores, split, len(self.atoms), self.packed_length, self.packed_copies
            )
            for split in SPLITS
        }
        self._columns = [known.index(atom) for atom in self.atoms]
        kinds = self._stores.kinds
        self._extra = {name: kinds[name][1] for name in ("vectors", "scalars") if name in kinds}
        extra = {name: shape[0] for name, shape in self._extra.items()}
        self.vectors = 2 * self.neighbours + extra.get("vectors", 0)
        self.scalars = len(RESIDUES) + 1 + len(self.atoms) + EDGES + extra.get("scalars", 0)
        self.unit = self.sigma**2
        options: list[Any] = [self.name, self._stores.digest, self.sigma, list(self.atoms)]
        options.append(self.neighbours)
        if packed:
            options.append({"packed_length": self.packed_length})
        if self.packed_copies > 1:
            options.append({"packed_copies": self.packed_copies})
        if packed and self.bodies == "apart":
            options.append({"bodies": self.bodies})
        if len(paths) > 1:
            options.append({"weights": self._weights})
        self.digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()

    def size(self, split: str) -> int:
        return len(self._items[split].lengths)

    def parts(self, split: str) -> list[tuple[int, int]]:
        return list(zip(self._items[split].sizes, self._weights, strict=True))

    def length(self, split: str, item: int) -> int:
        return int(self._items[split].lengths[item])

    def longest(self, split: str) -> int:
        return int(np.argmax(self._items[split].lengths))

    def describe(self, split: str, item: int) -> str:
        return self._items[split].describe(item)

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        k, items_of = self.neighbours, self._items[split]
        window = Window(self, split, items, start, stop)
        wide = Window(self, split, items, start - k, stop + k)  # k tokens more on each side
        clean = np.full_like(wide.zeros(3), np.nan)
        residue = np.full(wide.index.shape, UNKNOWN, np.uint8)
        segment = np.full(wide.index.shape, -1, np.int64)
        index, ends = wide.index, np.zeros_like(wide.index)  # each in its own chain
        extra = {name: wide.zeros(*shape) for name, shape in self._extra.items()}
        spans = [
            (key, low, high, items_of.pieces(item, key, low, high))
            for item, key, length in zip(items, keys, window.lengths, strict=True)
            if item is not None and (low := max(start - k, 0)) < (high := min(stop + k, length))
        ]
        pieces = join([own for *_, own in spans])
        tokens = self._read(pieces)
        if self.packed_length is not None:
            _move(tokens, pieces, [(key, own) for key, *_, own in spans])
        # Rows' tokens come one after another, as True values of the mask do.
        _tokens_first(clean)[wide.mask] = tokens["xyz"]
        noise = wide.zeros(3)
        _tokens_first(noise)[wide.mask] = np.concatenate(
            [np.zeros((0, 3))]
            + [normals(hash64("noise", key), low, high)[:, :3] for key, low, high, _ in spans]
        )
        residue[wide.mask] = tokens["residue"]
        segment[wide.mask] = (pieces.per_token(pieces.body) << 32) + tokens["segment"]
        index[wide.mask] = pieces.places
        ends[wide.mask] = pieces.per_token(pieces.lengths)
        for name, array in extra.items():
            _tokens_first(array)[wide.mask] = tokens[name]
        observed = np.all(np.isfinite(clean), axis=1)
        clean = np.where(observed[:, None], clean, 0)
        noised = clean + np.float32(self.sigma) * noise * observed[:, None]
        differences = self._differences(noised, observed, segment)
        inner = slice(k, k + stop - start)
        index, mask = index[:, inner], observed[:, inner]
        given = {
            "vectors": [differences],
            "scalars": [self._features(index, ends[:, inner], residue[:, inner])],
        }
        for name, array in extra.items():
            given[name].append(array[..., inner])
        bodies = None
        if self.packed_length is not None and self.bodies == "apart":
            bodies = tuple(
                () if item is None else items_of.bodies(item, key)
                for item, key in zip(items, keys, strict=True)
            )
        return window.sample(
            clean[..., inner],
            mask,
            bodies=bodies,
            points=noised[..., inner],
            index=index,
            mask=mask,
            segment=segment[:, inner],
            **{name: np.concatenate(arrays, 1) for name, arrays in given.items()},
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

    def _read(self, pieces: Pieces) -> dict[str, np.ndarray]:
        """The arrays' rows for each token."""
        atoms = len(self.atoms)
        first, last = pieces.starts // atoms, -(-pieces.stops // atoms)
        # Residues that a slice cuts are read whole: of every token, its place among what is read.
        skipped = before(last - first) * atoms + pieces.starts - first * atoms
        place = np.arange(pieces.tokens.sum()) + pieces.per_token(skipped - before(pieces.tokens))
        rows = {
            name: self._stores.gather(name, pieces.chains, first, last)
            for name in ("xyz", "residue", "segment", *self._extra)
        }
        xyz = rows.pop("xyz")[:, self._columns].reshape(-1, 3)
        return {name: x[place // atoms] for name, x in rows.items()} | {"xyz": xyz[place]}

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
        exists = (index < lengths)[:, None]
        kinds = np.arange(len(self.atoms))[:, None]
        types = (residue[:, None] == np.arange(UNKNOWN + 1)[:, None]) & exists
        atoms = (index[:, None] % len(self.atoms) == kinds) & exists
        parts: list[Any] = [types, atoms, edges(index, lengths)]
        return np.concatenate(parts, axis=1, dtype=np.float32)


def _move(
    tokens: dict[str, np.ndarray], pieces: Pieces, rows: Sequence[tuple[int, Pieces]]
) -> None:
    """Turns and shifts each chain by a motion that its row's key and its place there give."""
    ranges = [(key, int(own.body[0]), int(own.body[-1]) + 1) for key, own in rows]
    turns = [np.zeros((0, 3, 3))] + [rotations(hash64("motion", key), *r) for key, *r in ranges]
    shifts = [np.zeros((0, 3))] + [normals(hash64("shift", key), *r)[:, :3] for key, *r in ranges]
    turn = pieces.per_token(np.concatenate(turns))
    for name in tokens.keys() & {"xyz", "vectors"}:
        x = tokens[name].astype(np.float64)
        columns = turn.transpose(2, 0, 1) if name == "xyz" else turn.transpose(2, 0, 1)[:, :, None]
        # Term by term, so that no slicing changes how the sum is rounded.
        turned = columns[0] * x[..., :1] + columns[1] * x[..., 1:2] + columns[2] * x[..., 2:]
        if name == "xyz":
            turned = turned + SPREAD * pieces.per_token(np.concatenate(shifts))
        tokens[name] = turned.astype(np.float32)


def _tokens_first(x: np.ndarray) -> np.ndarray:
    """(rows, ..., tokens) as a view (rows, tokens, ...)."""
    return np.moveaxis(x, -1, 1)
