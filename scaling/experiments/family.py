"""What every bench is made of: rows, the processes they come from, goals, and their summary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from data_pipeline.errors import ConfigError
from scaling.experiments.timing import geometric_mean
from scaling.parallel.collectives import Group

Row = dict[str, Any]
"""`case`, `sp` (ranks), `length` (N, tokens; 0: all), `channels`, `value`, `unit` and, where two
sides were compared, `ratio`, as the name of the case says; else None."""


def row(
    case: str,
    sp: int,
    length: int,
    value: int | float,
    unit: str = "s",
    ratio: float | None = None,
    channels: int | None = None,
) -> Row:
    return {"case": case, "sp": sp, "length": length, "channels": channels, "value": value,
            "unit": unit, "ratio": ratio}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one set of fresh processes measures."""

    title: str
    """Names its folder."""
    ranks: int
    case: Any
    """The bench's case, narrowed to this part."""


def _as_they_are(_case: Any, rows: list[Row]) -> tuple[list[Row], str]:
    return rows, ""


@dataclass(frozen=True)
class Bench:
    """One bench of `python -m launch bench bench=<name>`."""

    case: Callable[..., Any]
    """A dataclass; its fields are the options, its values those of configs/bench/<name>.yaml."""
    parts: Callable[[Any], list[Part]]
    """In the order in which they run."""
    rows: Callable[[Any, Group, torch.device], list[Row]]
    """Measures a part's case; every rank calls it and gets the same."""
    goals: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Case -> how its mean should compare (">=" or "<=", number); see `summarise`."""
    conclude: Callable[[Any, list[Row]], tuple[list[Row], str]] = _as_they_are
    """The rows of the table, from the case and the rows of all parts; remarks under it."""
    figure: str = ""
    """Title of a figure of all rows, values over N; empty: none."""


def summarise(rows: list[Row], goals: Mapping[str, tuple[str, float]]) -> list[Row]:
    """One row a case and number of ranks: geometric mean of the ratios over N, or the largest
    value, beside its goal."""
    found = []
    for case, sp in dict.fromkeys((row["case"], row["sp"]) for row in rows):
        some = [row for row in rows if (row["case"], row["sp"]) == (case, sp)]
        ratios = [row["ratio"] for row in some if row["ratio"] is not None]
        value = geometric_mean(ratios) if ratios else max(row["value"] for row in some)
        row = {"case": case, "sp": sp, "value": value, "goal": "", "met": ""}
        row["unit"] = "" if ratios else some[0]["unit"]
        if case in goals:
            sign, goal = goals[case]
            met = value >= goal if sign == ">=" else value <= goal
            row |= {"goal": f"{sign} {goal:g}", "met": "yes" if met else "no"}
        row["by_length"] = {
            r["length"]: r["value"] if r["ratio"] is None else r["ratio"] for r in some
        }
        found.append(row)
    return found


def table(summary: list[Row]) -> str:
    """The summary as a Markdown table; ratios, or values and their unit where nothing is
    compared."""
    lengths = sorted({n for row in summary for n in row["by_length"] if n})
    heads = ["case", "sp", *map(_power_of_two, lengths), "mean or worst", "goal", "met"]
    lines = [heads, ["---"] * len(heads)]
    for row in summary:
        case = f"{row['case']}, {row['unit']}" if row["unit"] else row["case"]
        by = row["by_length"]
        numbers = [f"{by[n]:.3g}" if n in by else "" for n in lengths]
        ends = [f"{row['value']:.3g}", row["goal"], row["met"]]
        lines.append([case, str(row["sp"]), *numbers, *ends])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _power_of_two(n: int) -> str:
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)


def check_positive(**options: int | float | list[int]) -> None:
    """Raises ConfigError unless every option is positive, or a list of positive numbers."""
    for key, value in options.items():
        if isinstance(value, list):
            if not value or min(value) < 1:
                raise ConfigError(f"bench.{key}={value}: must be a list of positive numbers")
        elif not value > 0:
            raise ConfigError(f"bench.{key}={value}: must be positive")
