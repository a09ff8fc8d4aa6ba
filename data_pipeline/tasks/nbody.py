"""N-body: where will the particles be? Charged gas or chain of springs, from positions, velocities.

The charged gas is the data set of EGNN (Satorras et al., arXiv 2102.09844) as SE(3)-Hyena uses it:
N(0, 1) positions, speed 0.5, charges +-1, pair force q q' r / r^3 of at most 100 in each component.
With springs the particles are a chain in their order, and the order means something.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Float64

from data_pipeline.batch import Sample
from data_pipeline.counter_rng import hash64, normals, rotations, uniforms
from data_pipeline.errors import OptionError
from data_pipeline.tasks.protocol import ProceduralTask
from data_pipeline.tasks.window import EDGES, Window, edges

SPEED = 0.5
STRONGEST = 100.0
"""Largest component of the pair forces on a particle."""
REST = 1.0
"""Length of a spring at rest, and of the first steps of a chain."""
MOST_CHARGED, MOST = 1024, 1 << 20
"""Particles: with charges every pair is computed in every step."""
_CACHED = 1 << 22
"""Particles whose paths are kept: 170 MB."""


@dataclass
class NBody(ProceduralTask):
    """Systems that follow from their number alone; no data is needed.

    points: positions. vectors: one channel, velocities. scalars: the charge; with springs edge
    features too. target: positions `steps` later. Without springs the particles' order means
    nothing and is another in every training sample. No units; losses are mean squared errors.
    """

    particles: Annotated[int, Ge(2), Le(MOST)] = 5
    strength: float = 1.0
    """Of the force between charges; 0: none."""
    spring: Annotated[float, Ge(0)] = 0.0
    """Spring constant between neighbours in the sequence; 0: none."""
    steps: Annotated[int, Ge(1)] = 1000
    """From the input to the target."""
    start: Annotated[int, Ge(0)] = 0
    """Steps before the input. 3100 with 1000 steps is EGNN's task, frame 30 to 40."""
    dt: Annotated[float, Gt(0), Le(0.1)] = 1e-3
    train_size: Annotated[int, Ge(1)] = 3000
    """Systems of an epoch, as of EGNN."""
    held_out_size: Annotated[int, Ge(1)] = 2000
    """Systems of validation and of test."""
    seed: int = 0
    """Of the systems; not of the training."""
    turned: bool = False
    """Whether training turns every sample at random, for models that are not equivariant."""

    name = "nbody"
    vectors = 1
    unit = 1.0
    came_later: ClassVar = {"turned": False}

    def __post_init__(self) -> None:
        self._settle()
        if self.strength and self.particles > MOST_CHARGED:
            rule = f"must be {MOST_CHARGED} or less with charges (strength=0 has none)"
            raise OptionError("particles", self.particles, rule)
        if not (self.strength or self.spring):
            raise OptionError("spring", self.spring, "this and strength must not both be 0")
        self.tokens, self.scalars = self.particles, 1 + EDGES * bool(self.spring)
        self._paths: dict[tuple[str, int], np.ndarray] = {}
        self._lock = Lock()

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        """See Task. In training keys order the particles of a gas, and turn where asked for."""
        window = Window(self.row_lengths(split, items), start, stop)
        rows = window.zeros(10)
        there = {row: item for row, item in enumerate(items) if item is not None}
        systems = self._systems(split, list(there.values()))
        for row, system in zip(there, systems, strict=True):
            if split == "train" and not self.spring:
                shuffle = uniforms(hash64("order", keys[row]), 0, self.particles)[:, 0]
                system = system[:, np.argsort(shuffle, kind="stable")]
            if split == "train" and self.turned:
                (axes,) = rotations(hash64("turn", keys[row]), 0, 1)
                turned = axes @ system[:9].reshape(3, 3, -1)
                system = np.concatenate([turned.reshape(9, -1), system[9:]])
            rows[row, :, : max(self.particles - start, 0)] = system[:, start:stop]
        points, velocities, target, charge = np.split(rows, [3, 6, 9], axis=1)
        scalars = [charge, edges(window.index, window.ends)] if self.spring else [charge]
        return window.sample(
            target, points=points, vectors=velocities[:, None], scalars=np.concatenate(scalars, 1)
        )

    def baselines(self, split: str) -> dict[str, float]:
        """Mean squared error per coordinate if nothing moved, and of motion straight on; of
        training's systems as many as are held out."""
        items = list(range(min(self.size(split), self.held_out_size)))
        x, v, y = np.split(np.stack(self._systems(split, items)).astype(np.float64)[:, :9], 3, 1)
        straight = x + v * (self.steps * self.dt)
        return {
            "nothing moved": float(np.square(y - x).mean()),
            "straight on": float(np.square(y - straight).mean()),
        }

    def _systems(self, split: str, items: list[int]) -> list[np.ndarray]:
        """(10, particles) of each item: position, velocity, later position, charge."""
        with self._lock:
            if len(self._paths) * self.particles > _CACHED:
                self._paths.clear()
            missing = [item for item in items if (split, item) not in self._paths]
            together = max((1 << 17) // self.particles ** (2 if self.strength else 1), 1)
            for first in range(0, len(missing), together):
                some = missing[first : first + together]
                found = zip(some, self._simulate(split, some), strict=True)
                self._paths |= {(split, item): system for item, system in found}
            return [self._paths[split, item] for item in items]

    def _simulate(self, split: str, items: list[int]) -> np.ndarray:
        """(items, 10, particles) float32, by leapfrog in float64.

        Only sums, products, quotients and roots, in one order, so that machines agree; the random
        numbers are rounded, because logarithms may differ in their last bit and systems diverge.
        """
        own = [hash64("nbody", self.seed, split, item) for item in items]
        x = np.stack([self._gauss("position", key) for key in own], -1)  # (3, particles, items)
        v = np.stack([self._gauss("velocity", key) for key in own], -1)
        v = SPEED * v / _length(v)
        if self.spring:
            x = REST * np.cumsum(x / _length(x), axis=1)
        charge = np.zeros(x.shape[1:])
        if self.strength:
            draws = [uniforms(hash64("charge", key), 0, self.particles)[:, 0] for key in own]
            charge = np.sign(np.stack(draws, -1) - 0.5)
        out = []
        for steps in (self.start, self.steps):
            for _ in range(steps):
                v = v + self.dt * self._force(x, charge)
                x = x + self.dt * v
            out += [x, v]
        out = np.concatenate([*out[:3], charge[None]])
        return np.ascontiguousarray(out.transpose(2, 0, 1), np.float32)

    def _force(
        self, x: Float64[np.ndarray, "3 n items"], charge: Float64[np.ndarray, "n items"]
    ) -> Float64[np.ndarray, "3 n items"]:
        total = np.zeros_like(x)
        if self.strength:
            apart = x[:, None] - x[:, :, None]  # [:, j, i]: from j to i
            square = apart[0] * apart[0] + apart[1] * apart[1] + apart[2] * apart[2]
            square[np.arange(self.particles), np.arange(self.particles)] = 1.0
            pull = self.strength * charge[:, None] * charge / (square * np.sqrt(square))
            total = np.clip((pull * apart).sum(1), -STRONGEST, STRONGEST)
        if self.spring:
            bond = x[:, 1:] - x[:, :-1]
            pull = self.spring * (bond - REST * bond / _length(bond))
            total[:, :-1] += pull
            total[:, 1:] -= pull
        return total

    def _gauss(self, what: str, key: int) -> Float64[np.ndarray, "3 n"]:
        numbers = normals(hash64(what, key), 0, self.particles)[:, :3].T
        return np.round(numbers * 2.0**20) / 2.0**20


def _length(x: Float64[np.ndarray, "3 n items"]) -> Float64[np.ndarray, "n items"]:
    return np.sqrt(x[0] * x[0] + x[1] * x[1] + x[2] * x[2])
