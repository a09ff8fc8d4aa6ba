"""Small models and batches that several tests share."""

from typing import Any

import torch

from data_pipeline.batch import GeometricBatch
from scaling.models import MODELS, Model, build
from scaling.parallel.shard import Layout

VECTORS, SCALARS = 2, 4
NEAR = {"egnn", "equiformer", "geometric_hyena"}
"""Models of neighbours: what travels depends on the points."""


class PlainModel(Model):
    """For tests that need a model of a few lines: they define `forward` alone."""

    def __init__(self, layout: Layout = "cyclic") -> None:
        super().__init__(0, 0)
        self.layout = layout

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        return {}

    def move(self, batch: Any, shard: Any) -> Any:
        return self.forward(batch, shard)


def small_model(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Model:
    torch.manual_seed(1)
    return build(name, VECTORS, SCALARS, **(MODELS[name].tiny() | options)).to(dtype)


def small_batch(
    lengths: list[int],
    dtype: torch.dtype = torch.float64,
    bodies: tuple[tuple[int, ...], ...] | None = None,
) -> GeometricBatch:
    """Rows of the given lengths, with a missing token inside the first and NaN in the padding."""
    n, rows = max(lengths), len(lengths)
    generator = torch.Generator().manual_seed(n)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, n, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    if n > 2:
        mask[0, 1] = False
    points = (3 * random(3)).masked_fill(~mask[:, None], torch.nan)
    return GeometricBatch(points, random(VECTORS, 3), random(SCALARS), mask=mask, bodies=bodies)
