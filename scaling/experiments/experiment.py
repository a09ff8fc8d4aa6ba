"""What every experiment is: options, the points they ask for, how one is measured, what follows."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from scaling.experiments.curves import Chart
from scaling.experiments.options import Checked
from scaling.runs.rows import Row


@dataclass(frozen=True)
class Point:
    """What one set of fresh processes measures; measured once, it is not measured again."""

    part: str = ""
    """Which of the experiment's measurements, or of which model."""
    side: str = ""
    """Which of the sides that are measured alone."""
    length: int = 0
    """N, tokens; 0: none or several."""
    ranks: int = 1
    dp: int = 1
    """Of the ranks, those that are data-parallel; the others share a sequence."""
    repeat: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    """Of further keys of a grid."""

    @property
    def name(self) -> str:
        """Names its folder, and it in all rows."""
        length = f"N{self.length}" if self.length else ""
        dp, again = (f"{name}{n}" * (n > least) for name, n, least in
                     (("dp", self.dp, 1), ("repeat", self.repeat, 0)))  # fmt: skip
        grid = (f"{key}={value}" for key, value in self.values.items())
        words = filter(None, [self.part, self.side, length, f"sp{self.sp}", dp, *grid, again])
        return re.sub(r"[^\w.=+-]+", "_", "_".join(words))

    @property
    def sp(self) -> int:
        """Ranks that share a sequence."""
        return self.ranks // self.dp

    @property
    def labels(self) -> Row:
        """Go into its rows, also where it fails."""
        return {"point": self.name, "sp": self.sp, "length": self.length, **self.values}


class Experiment(Checked, ABC):
    """A dataclass: its fields are options and say what belongs to the results' identity."""

    goals: ClassVar[Mapping[str, tuple[str, float]]] = {}
    """Case -> how its mean should compare (">=" or "<=", number); see `views.table`."""
    independent: ClassVar[bool] = False
    """Each point tells something alone: earlier points of the folder count too, and it concludes
    without those that failed."""

    @abstractmethod
    def points(self) -> Iterable[Point]:
        """In the order in which they are measured."""

    @abstractmethod
    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """What a point's ranks find; every one of them calls it and gets the same."""

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        """The rows of table and figure, from those of all points; and remarks."""
        return rows, ""

    def chart(self, concluded: Sequence[Row]) -> Chart | None:
        """The figure of what was concluded; None: its values over N."""
        return None


def row(
    case: str, value: int | float, unit: str = "s", ratio: float | None = None, **labels: Any
) -> Row:
    """A measured number, and its ratio to another side's, as the name of the case says.

    Args:
        labels: what the point does not say, such as channels.
    """
    return {"case": case, "value": value, "unit": unit, "ratio": ratio} | labels
