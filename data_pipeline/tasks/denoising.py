"""Protein backbone denoising: find the deposited coordinates under Gaussian noise.

Tokens are the chosen atoms of the residues in chain order. Bonds are local, so local models do
well here: the task shows that training works, not that long context is used. With packed_length a
sample is many chains, one behind the other, up to the whole store.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from jaxtyping import Float64

from data_pipeline.batch import Sample
from data_pipeline.chains import SPLITS
from data_pipeline.counter_rng import evaluation_key, hash64, normals, rotations
from data_pipeline.errors import OptionError
from data_pipeline.options import check_options
from data_pipeline.store.reader import Store, open_alike
from data_pipeline.tasks.backbone import BackboneInputs
from data_pipeline.tasks.packed import PackedBodies, Pieces
from data_pipeline.tasks.protocol import Task
from data_pipeline.tasks.window import Window

BUNDLED = "stores/bundled"
"""Where training looks for the data that come with the package."""
SPREAD = 100.0
"""Å: standard deviation of the translations of packed chains."""
_AT_ONCE = 1 << 16
"""Tokens of which the baselines hold the samples at once."""


@dataclass
class Denoising(Task):
    """Noised backbones with what a conformation shows locally.

    inputs: those of `BackboneInputs` from the noised atoms; then the store's own `vectors` and
    `scalars`. Missing atoms have mask False and weight 0. target: the atoms as deposited, Å.

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
            rule = "must be 1 without packed_length"
            raise OptionError("packed_copies", self.packed_copies, rule)
        paths = [self.store] if isinstance(self.store, str) else list(self.store)
        self._weights = [1] * len(paths) if self.weights is None else list(self.weights)
        if len(self._weights) != len(paths):
            rule = f"must be {len(paths)} numbers of 1 or more, one for each store"
            raise OptionError("weights", self._weights, rule)
        stores = open_alike(paths)
        known, kinds = stores[0].atoms, stores[0].kinds
        distinct = set(self.atoms)
        if not distinct or not distinct <= set(known) or len(distinct) < len(self.atoms):
            rule = f"must be some of {', '.join(known)}, each once"
            raise OptionError("atoms", list(self.atoms), rule)
        packing = len(self.atoms), self.packed_length, self.packed_copies
        self._packed = {s: [PackedBodies(one, s, *packing) for one in stores] for s in SPLITS}
        self._lengths = {s: np.concatenate([p.lengths for p in self._packed[s]]) for s in SPLITS}
        self._columns = [known.index(atom) for atom in self.atoms]
        self._arrays = ["xyz", "residue", "segment", *({"vectors", "scalars"} & kinds.keys())]
        channels = {name: kinds[name][1][0] for name in self._arrays if name in kinds}
        self._stored_scalars = channels.get("scalars", 0)
        self._inputs = BackboneInputs(self.atoms, self.neighbours)
        self.vectors = self._inputs.vectors + channels.get("vectors", 0)
        self.scalars = self._inputs.scalars + self._stored_scalars
        self.unit = self.sigma**2
        later = {  # options that came one by one: each changes the digest where it does something
            "packed_length": (self.packed_length, packed),
            "packed_copies": (self.packed_copies, self.packed_copies > 1),
            "bodies": (self.bodies, packed and self.bodies == "apart"),
            "weights": (self._weights, len(paths) > 1),
        }
        digest, *others = digests = [store.digest for store in stores]
        if others:
            digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        options = [digest, self.sigma, list(self.atoms), self.neighbours]
        options += [{name: value} for name, (value, counts) in later.items() if counts]
        self.digest = self.hash(*options)

    def lengths(self, split: str) -> np.ndarray:
        return self._lengths[split]

    def parts(self, split: str) -> Sequence[tuple[int, int]]:
        sizes = [len(packed.lengths) for packed in self._packed[split]]
        return list(zip(sizes, self._weights, strict=True))

    def describe(self, split: str, item: int) -> str:
        packed, own = self._find(split, item)
        return packed.describe(own)

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        k, apart = self.neighbours, self.packed_length is not None and self.bodies == "apart"
        window = Window(self.row_lengths(split, items), start, stop)
        wide, arrays = self._inputs.wide(window, start, stop)
        arrays |= {
            "noise": wide.zeros(3),
            "vectors": wide.zeros(self.vectors - 2 * k, 3),
            "scalars": wide.zeros(self._stored_scalars),
        }
        bodies: list[tuple[int, ...]] = [()] * len(items)
        for row, (item, key, length) in enumerate(zip(items, keys, window.lengths, strict=True)):
            if item is None:
                continue
            packed, own = self._find(split, item)
            bodies[row] = packed.bodies(own, key)
            low, high = max(start - k, 0), min(stop + k, length)
            if low < high:
                pieces = packed.pieces(own, key, low, high)
                there = slice(low - start + k, high - start + k)
                for name, x in self._tokens(packed.store, pieces, key, low, high).items():
                    arrays[name][row, ..., there] = np.moveaxis(x, 0, -1)
        xyz, noise = arrays["xyz"], arrays.pop("noise")
        inner = slice(k, k + stop - start)
        own = {name: arrays.pop(name)[..., inner] for name in ("vectors", "scalars")}
        arrays["xyz"] = xyz + np.float32(self.sigma) * noise
        fields = self._inputs.fields(**arrays)
        fields |= {name: np.concatenate([fields[name], x], 1) for name, x in own.items()}
        target = np.where(fields["mask"][:, None], xyz[..., inner], 0)
        return window.sample(
            target, fields["mask"], bodies=tuple(bodies) if apart else None, **fields
        )

    def baselines(self, split: str) -> dict[str, float]:
        """Mean squared error per coordinate, over σ²: of the noised input itself, and of the best
        linear combination of its differences to the nearest 1 and k tokens on either side, tuned
        for each kind of atom on the training split."""
        (tuning, _), (asked, observed) = self._moments("train"), self._moments(split)
        errors, k = {"identity": float(asked[:, -1, -1].sum())}, self.neighbours
        for reach in sorted({1, k}):
            near = [*range(k - reach, k + reach), -1]
            error = 0.0
            for fit, m in zip(tuning, asked, strict=True):
                fit, m = fit[np.ix_(near, near)], m[np.ix_(near, near)]
                weights = np.append(-np.linalg.lstsq(fit[:-1, :-1], fit[:-1, -1])[0], 1.0)
                error += float(weights @ m @ weights)
            errors[f"tuned local average, k={reach}"] = error
        return {name: error / observed / self.unit for name, error in errors.items()}

    def _moments(self, split: str) -> tuple[Float64[np.ndarray, "atoms near near"], int]:
        """Over the atoms of each kind: summed products of the differences and the step to the
        target; and the number of coordinates."""
        near, atoms = 2 * self.neighbours, len(self.atoms)
        total, count = np.zeros((atoms, near + 1, near + 1)), 0
        for item in range(self.size(split)):
            key, length = evaluation_key(split, item), self.length(split, item)
            for start in range(0, length, _AT_ONCE * atoms):
                stop = min(start + _AT_ONCE * atoms, length)
                sample = self.sample(split, [item], [key], start, stop)
                step = (sample.target - sample.inputs.points)[:, None]
                x = torch.cat([sample.inputs.vectors[:, :near], step], 1)[0].double().numpy()
                x = np.stack([x[..., kind::atoms].reshape(near + 1, -1) for kind in range(atoms)])
                total += x @ x.swapaxes(1, 2)
                count += 3 * int(sample.weight.sum())
        return total, count

    def _find(self, split: str, item: int) -> tuple[PackedBodies, int]:
        """The store's items among which this one is, and its number there."""
        for packed in self._packed[split]:
            if item < len(packed.lengths):
                return packed, item
            item -= len(packed.lengths)
        raise IndexError(item)

    def _tokens(
        self, store: Store, pieces: Pieces, key: int, low: int, high: int
    ) -> dict[str, np.ndarray]:
        """What the store and the key say of tokens [low, high) of an item; tokens first."""
        atoms = len(self.atoms)
        first, last = pieces.starts // atoms, -(-pieces.stops // atoms)
        rows = {n: store.gather(n, pieces.chains, first, last) for n in self._arrays}
        # A residue that the slice cuts is read whole.
        cut = int(pieces.starts[0]) % atoms
        here = slice(cut, cut + high - low)
        xyz = rows.pop("xyz")[:, self._columns].reshape(-1, 3)[here]
        tokens = {name: np.repeat(x, atoms, axis=0)[here] for name, x in rows.items()}
        tokens |= {"xyz": xyz, "noise": normals(hash64("noise", key), low, high)[:, :3]}
        if self.packed_length is not None:
            _move(tokens, pieces, key)
        tokens["segment"] = tokens["segment"] + (pieces.per_token(pieces.body) << 32)
        return tokens | {"place": pieces.places, "end": pieces.per_token(pieces.lengths)}


def _move(tokens: dict[str, np.ndarray], pieces: Pieces, key: int) -> None:
    """Turns and shifts each chain by a motion that the row's key and its place there give."""
    bodies = int(pieces.body[0]), int(pieces.body[-1]) + 1
    turn = pieces.per_token(rotations(hash64("motion", key), *bodies))
    shift = pieces.per_token(normals(hash64("shift", key), *bodies)[:, :3])

    def turned(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
        # Term by term, so that no slicing changes how the sum is rounded.
        return turn[..., 0] * x[..., :1] + turn[..., 1] * x[..., 1:2] + turn[..., 2] * x[..., 2:]

    tokens["xyz"] = turned(tokens["xyz"], turn) + SPREAD * shift
    if "vectors" in tokens:
        tokens["vectors"] = turned(tokens["vectors"], turn[:, None])
