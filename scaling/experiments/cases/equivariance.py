"""How exactly each model turns and moves with its input, in every precision, sharded or not."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from data_pipeline.batch import GeometricBatch
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count, Selection
from scaling.models import MODELS, build, equivariance_error
from scaling.parallel.shard import SequenceShard
from scaling.runs.rows import Row

PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.float32}
"""bf16: under autocast."""
VECTORS, SCALARS = 2, 4


@dataclass(kw_only=True)
class Equivariance(Experiment):
    """
    Args:
        names: of the models, each with its usual options.
        lengths: N, tokens of the one sequence.
        sp: ranks that share it.
        seed: of model and sequence.
    """

    names: list[str]
    lengths: Selection
    sp: Selection
    seed: Count = 1

    def points(self) -> Iterator[Point]:
        for name in self.names:
            for n in sorted(self.lengths):
                for ranks in sorted(self.sp):
                    yield Point(name, length=n, ranks=ranks)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """Rotated and moved, and mirrored too, each as a share of what the model changes."""
        torch.manual_seed(self.seed)
        shard = SequenceShard(point.length, layout=MODELS[point.part].layout)
        model = build(point.part, VECTORS, SCALARS)
        shapes = ((3,), (VECTORS, 3), (SCALARS,))
        fields = [torch.randn(1, *shape, point.length, dtype=torch.float64) for shape in shapes]
        whole = GeometricBatch(3 * fields[0], *fields[1:], lengths=(point.length,))
        batch = whole.map(shard.scatter)
        for precision, dtype in PRECISIONS.items():
            bf16 = torch.autocast(device.type, torch.bfloat16)
            with bf16 if precision == "bf16" else nullcontext():
                for case, mirrored in (("turned", False), ("mirrored", True)):
                    own = batch.to(device, dtype)
                    error = equivariance_error(
                        model.to(device, dtype), own, shard, mirrored=mirrored
                    )
                    yield row(f"{point.part}: {case}, {precision}", error, "")

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        return rows, (
            "rms of f(R x + t) - (R f(x) + t) over that of f(x) - x, for a random rotation (and"
            " reflection) R and a translation t by 100; models with their usual options."
        )
