"""Finding the nearest neighbours of points: how time and distances computed grow with N."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count, Selection
from scaling.experiments.timing import now
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.neighbours import find_neighbours
from scaling.runs.rows import Row

BOND = 3.8
"""Å between the CA atoms of residues that follow each other."""
KINDS = ("chain", "uniform")


@dataclass(kw_only=True)
class NeighbourSearch(Experiment):
    """
    Args:
        lengths: N, points.
        neighbours: k, of each point.
        searches: the fastest counts, as all do the same.
        seed: of the points.
    """

    lengths: Selection
    neighbours: Count = 16
    searches: Count = 2
    seed: Count = 1

    goals: ClassVar = {
        **{f"{kind}: longest / shortest": ("<=", 12.0) for kind in KINDS},
        **{f"{kind}: distances / (N k)": ("<=", 50.0) for kind in KINDS},
    }

    def points(self) -> Iterator[Point]:
        for kind in KINDS:
            for n in sorted(self.lengths):
                yield Point(kind, length=n)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        points = made_points(point.part, point.length, self.seed).to(device)
        rows = MaskedRows(torch.ones(1, point.length, dtype=torch.bool, device=device))
        seconds = []
        for _ in range(self.searches):
            began = now(device)
            found = find_neighbours(points, rows, self.neighbours)
            seconds.append(now(device) - began)
        yield row(f"{point.part}: search", min(seconds))
        share = found.distances / (point.length * self.neighbours)
        yield row(f"{point.part}: distances / (N k)", found.distances, "", share)

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        """The longest N's time beside the shortest's."""
        more = []
        for kind in KINDS:
            some = [each for each in rows if each["case"] == f"{kind}: search"]
            first, last = (f(some, key=lambda each: each["length"]) for f in (min, max))
            if last["length"] > first["length"]:
                ratio = last["value"] / first["value"]
                more.append(last | {"case": f"{kind}: longest / shortest", "ratio": ratio})
        return rows + more, "The k nearest of every point, on one rank."


def made_points(kind: str, length: int, seed: int) -> Float[Tensor, "1 3 n"]:
    """A random walk in steps of a bond, or points all over a cube."""
    random = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return torch.rand(1, 3, length, generator=random)
    steps = torch.randn(1, 3, length, generator=random)
    return (BOND * steps / steps.norm(dim=1, keepdim=True)).cumsum(-1)
