"""The one data contract between files, models and losses. Tokens are the last axis.

Axes: b rows (samples), v vector channels, s scalar channels, n local tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.errors import ShapeError


@dataclass
class GeometricBatch:
    """Rows of 3D geometric sequences, whole or one rank's tokens of them.

    Rotations act on points and vectors, translations on points alone. Fields left out become
    empty channels, consecutive places, no padding and one unbroken body a row.

    Raises:
        ShapeError: lengths or bodies are not of as many rows, or bodies do not fill their row.
    """

    points: Float[Tensor, "b 3 n"]
    """Positions; Å for molecules. Where the mask is False the value means nothing."""
    vectors: Float[Tensor, "b v 3 n"] = None  # pyright: ignore[reportAssignmentType]
    """Free vectors: velocities, differences of positions, keys and values."""
    scalars: Float[Tensor, "b s n"] = None  # pyright: ignore[reportAssignmentType]
    """Invariant features."""
    index: Int[Tensor, "b n"] = None  # pyright: ignore[reportAssignmentType]
    """Place of the token in its sequence."""
    mask: Bool[Tensor, "b n"] = None  # pyright: ignore[reportAssignmentType]
    """True where the token exists and was observed."""
    segment: Int[Tensor, "b n"] = None  # pyright: ignore[reportAssignmentType]
    """Unbroken stretch that the token belongs to: a break inside a chain begins another."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each whole row, not of the shard, kept on the host. None: the mask tells."""
    bodies: tuple[tuple[int, ...], ...] | None = None
    """For each whole row the lengths of its bodies, in order, kept on the host; bodies do not see
    each other. None: one body a row."""

    def __post_init__(self) -> None:
        rows, _, tokens = self.points.shape
        if self.vectors is None:
            self.vectors = self.points.new_zeros(rows, 0, 3, tokens)
        if self.scalars is None:
            self.scalars = self.points.new_zeros(rows, 0, tokens)
        if self.index is None:
            places = torch.arange(tokens, device=self.points.device)
            self.index = places.expand(rows, tokens)
        if self.mask is None:
            self.mask = torch.ones(rows, tokens, dtype=torch.bool, device=self.points.device)
        if self.segment is None:
            self.segment = torch.zeros_like(self.index)
        if self.bodies is not None and self.lengths is None:
            self.lengths = tuple(map(sum, self.bodies))
        if self.lengths is not None and len(self.lengths) != rows:
            raise ShapeError(f"lengths={self.lengths} of {rows} rows: give one for each row")
        if self.bodies is not None and self.lengths != tuple(map(sum, self.bodies)):
            raise ShapeError(
                f"bodies={self.bodies} must add up to lengths={self.lengths}, row by row"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that hold a value for each token."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> "GeometricBatch":
        """The batch with `function` applied to every tensor; tokens stay last, the host's values
        stay as they are."""
        return self.replace(**{name: function(x) for name, x in self.tensors.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "GeometricBatch":
        """Moved to `device`; floating-point fields also to `dtype`."""
        return self.map(lambda x: _move(x, device, dtype))

    def replace(self, **changes: Any) -> "GeometricBatch":
        return replace(self, **changes)


@dataclass
class Sample:
    """Inputs, targets and loss weights of one micro-batch.

    Per token (denoising): target (b, 3, n), weight (b, n). Per sequence (recall): target (b, 3),
    weight (b,), read out by the mean over a row's valid tokens, or over those that are marked.
    Weight 0 means "does not count".
    """

    inputs: GeometricBatch
    target: Float[Tensor, "b 3 n"] | Float[Tensor, "b 3"]
    weight: Float[Tensor, "b n"] | Float[Tensor, " b"]
    answer: Literal["points", "vectors"] = "points"
    """What targets are compared with: the moved points, or the first channel of the vectors."""
    marked: Bool[Tensor, "b n"] | None = None
    """Tokens at which a target per sequence is read out; None: all valid ones."""

    @property
    def per_token(self) -> bool:
        return self.target.ndim == 3

    @property
    def token_tensors(self) -> dict[str, Tensor]:
        """What the sample says of each token, besides the inputs."""
        own = {"target": self.target, "weight": self.weight} if self.per_token else {}
        return own if self.marked is None else own | {"marked": self.marked}

    @property
    def length(self) -> int:
        """Tokens that whole rows are padded to: those of the longest, and at least one."""
        return max(*self._lengths, 1)

    @property
    def tokens(self) -> int:
        """Tokens of all whole rows together, without padding."""
        return sum(self._lengths)

    @property
    def _lengths(self) -> tuple[int, ...]:
        if self.inputs.lengths is None:
            raise ShapeError("nothing says how long the sample's rows are: give inputs lengths=")
        return self.inputs.lengths

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Sample":
        """Moved to `device`; floating-point fields also to `dtype`."""
        own = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        moved = {name: _move(x, device, dtype) for name, x in own.items()}
        return replace(self, inputs=self.inputs.to(device, dtype), **moved)


def _move(x: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    return x.to(device, dtype if x.is_floating_point() else None)
