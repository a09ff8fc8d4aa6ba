"""Hyena made equivariant by frames: the cheap control that every equivariant model has to beat.

    C = mean over a body's tokens of y y^T, summed over y: the centred points and the vectors
    change(x) = mean over the frames R of C of R Hyena(R^T x)

(Puny et al., arXiv 2110.03336). Frames are the principal axes of C in all directions: 4 that are
rotations, or with `reflections` 8, and Hyena runs once in each. The mean is exactly equivariant
where the axes differ in length. Where two are equally long the frame jumps: the model is not
continuous there, and a symmetric body turned in space gives another answer. Frames are constants
to gradients.
"""

from itertools import product
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scaling.algebra.vectors import principal_axes
from scaling.models.coordinates import Features, Vectors
from scaling.models.hyena import Hyena
from scaling.models.protocol import Channels
from scaling.ops.masked_rows import MaskedRows


class FrameAveragedHyena(Hyena):
    """
    Args:
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        reflections: average over mirrored frames too; E(3) instead of SE(3), at twice the cost.
        options: those of `Hyena`, as there.
    """

    def __init__(
        self, vectors: Channels, scalars: Channels, reflections: bool = False, **options: Any
    ) -> None:
        super().__init__(vectors, scalars, **options)
        self.symmetry = "E(3)" if reflections else "SE(3)"
        every = list(product((1.0, -1.0), repeat=3))
        self.signs = every if reflections else [signs for signs in every if prod(signs) > 0]

    def change(self, inputs: Vectors, scalars: Features, rows: MaskedRows) -> tuple[Tensor, Tensor]:
        frames, many = self.frames(inputs, rows), len(self.signs)
        seen = torch.einsum("fbcan,bvcn->fbvan", frames, inputs).flatten(0, 1)
        step, change = super().change(seen, scalars.repeat(many, 1, 1), rows.repeated(many))
        step = step.unflatten(0, (many, -1))
        return (
            torch.einsum("fbcan,fbvan->bvcn", frames, step) / many,
            change.unflatten(0, (many, -1)).mean(0),
        )

    @torch.no_grad()
    def frames(self, inputs: Vectors, rows: MaskedRows) -> Float[Tensor, "f b 3 3 #n"]:
        """Axes are columns; found in float64."""
        y = inputs.double()
        axes = principal_axes(rows.body_mean(torch.einsum("bvcn,bvan->bcan", y, y)))
        signs = torch.tensor(self.signs, dtype=axes.dtype, device=axes.device)
        return (signs[:, None, None, :, None] * axes).to(inputs.dtype)
