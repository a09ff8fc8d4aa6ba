"""What the SE(3)-Hyenas share: project, convolve, mix; on any number of ranks, in tiles.

A model's file says what its three parts compute. Here is how they are run: pointwise parts in tiles
of tokens, the convolution over whole rows or each of their bodies, and all of it once more in the
backward pass where `execution.recompute_operators` asks for it.
"""

from abc import ABC, abstractmethod

from jaxtyping import Bool, Float
from torch import Tensor

from scaling.algebra.clifford import CliffordMLP
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.tiles import Tiled

Scalars = Float[Tensor, "b c n"]
Vectors = Float[Tensor, "b v 3 n"]
Mask = Bool[Tensor, "b n"]
OfBody = Float[Tensor, "b 1 #n"]
"""A number of each token's body."""


class HyenaBlock(Tiled, ABC):
    """One operator of scalars and vectors, by three Clifford MLPs."""

    phi: CliffordMLP
    """Makes queries, keys and values."""
    gamma: CliffordMLP
    """Makes the gates."""
    xi: CliffordMLP
    """Makes the result."""
    power: float
    """Convolutions are scaled by z = N^power, N the length of the token's body."""

    @abstractmethod
    def project(self, f: Scalars, x: Vectors, *features: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values qs, ks, vs and q, k, v; the last of the features is the mask."""

    @abstractmethod
    def convolve(
        self, qs: Scalars, ks: Scalars, q: Vectors, k: Vectors, rows: MaskedRows
    ) -> tuple[Tensor, ...]:
        """Long convolutions of queries with keys."""

    @abstractmethod
    def mix(
        self, f: Scalars, x: Vectors, vs: Scalars, v: Vectors, z: OfBody, *convolved: Tensor
    ) -> tuple[Scalars, Vectors]:
        """Gates the convolutions, multiplies by values, and what xi makes of it."""

    def forward(
        self, f: Scalars, x: Vectors, rows: MaskedRows, *features: Float[Tensor, "b s n"]
    ) -> tuple[Scalars, Vectors]:
        def block(f: Scalars, x: Vectors, *features: Tensor) -> tuple[Scalars, Vectors]:
            projected = self.in_tiles(self.project, f, x, *features, rows.mask)
            qs, ks, vs, q, k, v = projected
            convolved = self.convolve(qs, ks, q, k, rows)
            return self.in_tiles(self.mix, f, x, vs, v, rows.length_to(self.power, f), *convolved)

        if self.execution.recompute_operators:
            return self.recompute(block, f, x, *features)
        return block(f, x, *features)
