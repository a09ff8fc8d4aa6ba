"""What every experiment is made of: named points, how one is measured, and what all conclude."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scaling.parallel.collectives import Group
from scaling.runs.rows import Row


def row(
    case: str,
    sp: int,
    length: int,
    value: int | float,
    unit: str = "s",
    ratio: float | None = None,
    channels: int | None = None,
) -> Row:
    """A measured number, and its ratio to another side's, as the name of the case says."""
    return {"case": case, "sp": sp, "length": length, "channels": channels, "value": value,
            "unit": unit, "ratio": ratio}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What one set of processes measures; measured once, it is not measured again."""

    name: str
    """Names its rows and its folder."""
    ranks: int
    """Fresh processes that measure it together; 0: the process that runs the experiment."""
    options: Any
    """The experiment's options, narrowed to this point."""
    labels: Row = field(default_factory=dict)
    """Go into its rows, also where it fails."""


def _as_they_are(_options: Any, rows: list[Row]) -> tuple[list[Row], str]:
    return rows, ""


def _nothing(_rows: list[Row], _folder: Path) -> str:
    return ""


@dataclass(frozen=True)
class Experiment:
    """Points, how they are measured, and what they conclude."""

    options: type[Any]
    """A dataclass; what belongs to the identity of the results is said at its fields."""
    points: Callable[[Any], list[Point]]
    """In the order in which they are measured."""
    measure: Callable[[Any, Group, torch.device], list[Row]]
    """Rows of a point's options; every rank calls it and gets the same."""
    goals: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Case -> how its mean should compare (">=" or "<=", number); see `summarise`."""
    conclude: Callable[[Any, list[Row]], tuple[list[Row], str]] = _as_they_are
    """The rows of table and figure, from the options and the rows of all points; and remarks."""
    independent: bool = False
    """Each point tells something alone: earlier points of the folder count too, and it concludes
    without those that failed."""
    show: Callable[[list[Row], Path], str] = _nothing
    """Further views of all points' rows, written into the folder; a line that says where."""
    table: str = "rows.csv"
    figure: str = "figure.png"


def joined(lengths: Iterable[int]) -> str:
    """Lengths for the name of a point that measures them all."""
    return "N" + "-".join(map(str, sorted(lengths)))
