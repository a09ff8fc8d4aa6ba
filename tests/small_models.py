"""Small models and batches that several tests share."""

import torch
from torch import nn

from data_pipeline.batch import GeometricBatch
from scaling.models import build

SMALL = {
    "se3_hyena": {"channels": 4, "hidden": 4, "gate_hidden": 4, "operators": 2},
    "se3_hyena_paper": {"hidden": 6, "gate_hidden": 4, "operators": 2},
}
VECTORS, SCALARS = 2, 4


def small_model(name: str, dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    torch.manual_seed(1)
    return build(name, VECTORS, SCALARS, **(SMALL[name] | options)).to(dtype)


def small_batch(lengths: list[int], dtype: torch.dtype = torch.float64) -> GeometricBatch:
    """Rows of the given lengths, with a missing token inside the first and NaN in the padding."""
    n, rows = max(lengths), len(lengths)
    generator = torch.Generator().manual_seed(n)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, n, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    if n > 2:
        mask[0, 1] = False
    points = (3 * random(3)).masked_fill(~mask[:, None], torch.nan)
    return GeometricBatch(points, random(VECTORS, 3), random(SCALARS), mask=mask)
