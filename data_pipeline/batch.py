"""The one data contract between files, models and losses. Tokens are the last axis.

Axes: b rows (samples), v vector channels, s scalar channels, n local tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

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

    def map(self, function: Callable[[Tensor], Tensor]) -> "GeometricBatch":
        """The batch with `function` applied to every tensor; tokens stay last, the host's values
        stay as they are."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: function(x) for name, x in values.items() if isinstance(x, Tensor)}
        return GeometricBatch(**(values | tensors))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "GeometricBatch":
        """Moved to `device`; floating-point fields also to `dtype`."""
        return self.map(lambda x: _move(x, device, dtype))

    def replace(self, **changes: Any) -> "GeometricBatch":
        return replace(self, **changes)


@dataclass
class Sample:
    """Inputs, targets and loss weights of one micro-batch.

    Per token (denoising): target (b, 3, n), weight (b, n). Per sequence (recall): target (b, 3),
    weight (b,), read out by a masked mean over all tokens. Weight 0 means "does not count".
    """

    inputs: GeometricBatch
    target: Float[Tensor, "b 3 n"] | Float[Tensor, "b 3"]
    weight: Float[Tensor, "b n"] | Float[Tensor, " b"]

    @property
    def per_token(self) -> bool:
        return self.target.ndim == 3

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Sample":
        """Moved to `device`; floating-point fields also to `dtype`."""
        return Sample(
            self.inputs.to(device, dtype),
            _move(self.target, device, dtype),
            _move(self.weight, device, dtype),
        )


def _move(x: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    return x.to(device, dtype if x.is_floating_point() else None)
