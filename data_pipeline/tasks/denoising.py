"""Protein backbone denoising: find the deposited coordinates under Gaussian noise.

Tokens are the chosen atoms of the residues in chain order. Bonds are local, so local models do
well here: the task shows that training works, not that long context is used. With packed_length a
sample is many chains, one behind the other, up to the whole store.
"""

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
from data_pipeline.tasks.protocol import Task
from data_pipeline.tasks.window import Window

UNKNOWN = len(RESIDUES)
"""Number of a residue that is none of the twenty."""
BUNDLED = "stores/bundled"
"""Where training looks for the data that come with the package."""
SPREAD = 100.0
"""Å: standard deviation of the translations of packed chains."""
Span = tuple[int, int, int, Pieces]
"""Of a row: its key, its first token in a slice and the one behind its last, what they are of."""
_AT_ONCE = 1 << 16
"""Tokens of which the baselines hold the samples at once."""


@dataclass
class Denoising(Task):
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
        channels = {name: kinds[name][1][0] for name in ("vectors", "scalars") if name in kinds}
        self._stored_scalars = channels.get("scalars", 0)
        self.vectors = 2 * self.neighbours + channels.get("vectors", 0)
        self.scalars = len(RESIDUES) + 1 + len(self.atoms) + EDGES + self._stored_scalars
        self.unit = self.sigma**2
        later = {  # options that came one by one: each changes the digest where it does something
            "packed_length": (self.packed_length, packed),
            "packed_copies": (self.packed_copies, self.packed_copies > 1),
            "bodies": (self.bodies, packed and self.bodies == "apart"),
            "weights": (self._weights, len(paths) > 1),
        }
        options = [self._stores.digest, self.sigma, list(self.atoms), self.neighbours]
        options += [{name: value} for name, (value, counts) in later.items() if counts]
        self.digest = self.hash(*options)

    def lengths(self, split: str) -> np.ndarray:
        return self._items[split].lengths

    def parts(self, split: str) -> Sequence[tuple[int, int]]:
        return list(zip(self._items[split].sizes, self._weights, strict=True))

    def describe(self, split: str, item: int) -> str:
        return self._items[split].describe(item)

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        k, packed = self.neighbours, self._items[split]
        window = Window(self.row_lengths(split, items), start, stop)
        wide = Window(window.lengths, start - k, stop + k)  # differences reach so far
        spans = [
            (key, low, high, packed.pieces(item, key, low, high))
            for item, key, length in zip(items, keys, window.lengths, strict=True)
            if item is not None and (low := max(start - k, 0)) < (high := min(stop + k, length))
        ]
        arrays = {
            "xyz": np.full_like(wide.zeros(3), np.nan),
            "noise": wide.zeros(3),
            "residue": np.full(wide.index.shape, UNKNOWN, np.uint8),
            "segment": np.full_like(wide.index, -1),
            "place": wide.index.copy(),
            "end": np.zeros_like(wide.index),
            "vectors": wide.zeros(self.vectors - 2 * k, 3),
            "scalars": wide.zeros(self._stored_scalars),
        }
        row, column = wide.mask.nonzero()
        for name, x in self._tokens(spans).items() if spans else ():
            np.moveaxis(arrays[name], -1, 1)[row, column] = x
        xyz, noise, residue, segment, place, end, vectors, scalars = arrays.values()
        observed = np.all(np.isfinite(xyz), axis=1)
        xyz = np.where(observed[:, None], xyz, 0)
        noised = xyz + np.float32(self.sigma) * noise * observed[:, None]
        differences = self._differences(noised, observed, segment)
        inner = slice(k, k + stop - start)
        place, mask = place[:, inner], observed[:, inner]
        features = self._features(place, end[:, inner], residue[:, inner])
        bodies = None
        if self.packed_length is not None and self.bodies == "apart":
            rows = zip(items, keys, strict=True)
            bodies = tuple(() if i is None else packed.bodies(i, key) for i, key in rows)
        return window.sample(
            xyz[..., inner],
            mask,
            bodies=bodies,
            points=noised[..., inner],
            vectors=np.concatenate([differences, vectors[..., inner]], 1),
            scalars=np.concatenate([features, scalars[..., inner]], 1),
            index=place,
            mask=mask,
            segment=segment[:, inner],
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

    def _tokens(self, spans: Sequence[Span]) -> dict[str, np.ndarray]:
        """What the stores and the keys say of every token of the spans."""
        pieces, atoms = join([own for *_, own in spans]), len(self.atoms)
        first, last = pieces.starts // atoms, -(-pieces.stops // atoms)
        # Residues that a slice cuts are read whole: of every token, its place among what is read.
        skipped = before(last - first) * atoms + pieces.starts - first * atoms
        place = np.arange(pieces.tokens.sum()) + pieces.per_token(skipped - before(pieces.tokens))
        names = ["xyz", "residue", "segment", *({"vectors", "scalars"} & self._stores.kinds.keys())]
        rows = {n: self._stores.gather(n, pieces.chains, first, last) for n in names}
        xyz = rows.pop("xyz")[:, self._columns].reshape(-1, 3)[place]
        tokens = {name: x[place // atoms] for name, x in rows.items()} | {"xyz": xyz}
        if self.packed_length is not None:
            _move(tokens, pieces, spans)
        tokens["segment"] = tokens["segment"] + (pieces.per_token(pieces.body) << 32)
        noise = [normals(hash64("noise", key), low, high)[:, :3] for key, low, high, _ in spans]
        tokens["noise"] = np.concatenate(noise)
        return tokens | {"place": pieces.places, "end": pieces.per_token(pieces.lengths)}

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


def _move(tokens: dict[str, np.ndarray], pieces: Pieces, spans: Sequence[Span]) -> None:
    """Turns and shifts each chain by a motion that its row's key and its place there give."""
    ranges = [(key, int(own.body[0]), int(own.body[-1]) + 1) for key, *_, own in spans]
    turns = [rotations(hash64("motion", key), *bodies) for key, *bodies in ranges]
    shifts = [normals(hash64("shift", key), *bodies)[:, :3] for key, *bodies in ranges]
    turn = pieces.per_token(np.concatenate(turns)).transpose(2, 0, 1)
    for name, columns in {"xyz": turn, "vectors": turn[:, :, None]}.items():
        if name in tokens:
            x = tokens[name].astype(np.float64)
            # Term by term, so that no slicing changes how the sum is rounded.
            x = columns[0] * x[..., :1] + columns[1] * x[..., 1:2] + columns[2] * x[..., 2:]
            if name == "xyz":
                x = x + SPREAD * pieces.per_token(np.concatenate(shifts))
            tokens[name] = x.astype(np.float32)
