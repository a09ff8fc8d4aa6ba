"""What Clifford layers cost, beside the dense 8x8x8 table of their authors' code.

Eager and compiled. The dense side is that of the straightforward training step: multivectors last,
all 8 components throughout, weights expanded to the table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scaling.algebra.clifford import PATHS, CliffordMLP, embed, geometric_product
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.naive import clifford_mlp, dense_product
from scaling.experiments.options import Count, Counts, Positive, Selection
from scaling.experiments.timing import both_ways, medians
from scaling.runs.rows import Row

IN, OUT = 17, 51
"""Channels of a Clifford MLP: those of phi in the paper's recall model."""
SPEED = "speed-up over the dense table"
ERROR = "error against the dense table"


@dataclass
class Clifford(Experiment):
    """One rank; forward and backward in float32."""

    lengths: Selection
    """N, tokens of one row."""
    channels: Count = 128
    """Of the product."""
    hidden: Counts = field(default_factory=lambda: [128, 16])
    """Channels inside Clifford MLPs."""
    compiled: bool = True
    """Compile ours too, with torch.compile."""
    seconds: Positive = 5.0
    """Of every comparison; at least three rounds."""

    goals: ClassVar = {
        f"product, eager: {SPEED}": (">=", 5.0),
        f"product, compiled: {SPEED}": (">=", 12.0),
        f"product, eager: {ERROR}": ("<=", 1e-6),
        f"product, compiled: {ERROR}": ("<=", 1e-6),
    }

    def points(self) -> Iterator[Point]:
        return (Point(length=n) for n in sorted(self.lengths))

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """The product's error, and speed-ups over the dense side."""
        torch.manual_seed(0)
        n = point.length
        x, y, grad = torch.randn(3, 1, 8, self.channels, n, device=device)
        weights = torch.randn(PATHS, self.channels, device=device)
        ours = self._ours(geometric_product, [x, y, weights], [grad])
        last = [_components_last(each) for each in (x, y, grad)]
        dense = both_ways(dense_product, [*last[:2], weights], last[2:])
        for name, side in ours.items():
            error = _error(side(), dense())
            yield row(f"product, {name}: {ERROR}", error, "", channels=self.channels)
        yield from self._compare("product", self.channels, ours, dense, device)
        for hidden in self.hidden:
            mlp = CliffordMLP(IN, hidden, OUT, grades=2).to(device)
            x = embed(torch.randn(1, IN, n, device=device), torch.randn(1, IN, 3, n, device=device))
            grad = torch.randn(1, 4, OUT, n, device=device)
            ours = self._ours(mlp, [x], [grad], mlp)
            all_grades = nn.functional.pad(grad, (0, 0, 0, 0, 0, 4))
            dense = both_ways(partial(clifford_mlp, mlp), [x], [all_grades], mlp)
            yield from self._compare(f"Clifford MLP of {hidden}", hidden, ours, dense, device)

    def _ours(self, function: Callable[..., Tensor], *given: Any) -> dict[str, Callable]:
        sides = {"eager": both_ways(function, *given)}
        if self.compiled:
            torch._dynamo.reset()  # programs of other shapes would count against a limit
            fused = torch.compile(function, fullgraph=True, dynamic=False)
            sides["compiled"] = both_ways(fused, *given)
        return sides

    def _compare(
        self,
        what: str,
        channels: int,
        ours: dict[str, Callable],
        dense: Callable,
        device: torch.device,
    ) -> Iterator[Row]:
        times = medians({"dense": dense} | ours, self.seconds, device)
        base = times.pop("dense")
        for side, time in times.items():
            yield row(f"{what}, {side}: {SPEED}", time, "s", base / time, channels=channels)


def _error(ours: list[Tensor], dense: list[Tensor]) -> float:
    """Largest error of the value and the gradients, relative to their norms."""
    pairs = zip(ours, dense, strict=True)
    pairs = [(_components_last(x) if x.dim() == 4 else x, y) for x, y in pairs]
    return max((torch.linalg.norm(x - y) / torch.linalg.norm(y)).item() for x, y in pairs)


def _components_last(x: Tensor) -> Tensor:
    """(b, d, c, n) -> (tokens, c, d)."""
    return x.permute(0, 3, 2, 1).flatten(0, 1).contiguous()
