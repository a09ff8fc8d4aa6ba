"""Rows for reading: as CSV, as means beside their goals, as a figure."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from scaling.runs.rows import Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX"
LINESTYLES: tuple[Any, ...] = ("-", "--", "-.", ":")
CROWDED = 8
"""Lines in a panel; more of them are told apart by quantity first."""


def as_csv(rows: Sequence[Row]) -> str:
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(rows: Sequence[Row], goals: Mapping[str, tuple[str, float]]) -> str:
    """One line of Markdown a case and number of ranks: the ratios over N and their geometric mean,
    or, where nothing is compared, the values and their largest; beside its goal."""
    lengths = sorted({row["length"] for row in rows if row["length"]})
    heads = ["case", "sp", *map(_power_of_two, lengths), "mean or worst", "goal", "met"]
    lines = [heads, ["---"] * len(heads)]
    for case, sp in dict.fromkeys((row["case"], row["sp"]) for row in rows):
        some = [row for row in rows if (row["case"], row["sp"]) == (case, sp)]
        unit = "" if (compared := some[0]["ratio"] is not None) else some[0]["unit"]
        numbers = [row["ratio" if compared else "value"] for row in some]
        by_length = {row["length"]: _number(x) for row, x in zip(some, numbers, strict=True)}
        mean = geometric_mean(numbers) if compared else max(numbers)
        goal, met = "", ""
        if case in goals:
            sign, wanted = goals[case]
            goal = f"{sign} {wanted:g}"
            met = "yes" if (mean >= wanted if sign == ">=" else mean <= wanted) else "no"
        title = f"{case}, {unit}" if unit else case
        columns = [by_length.get(n, "") for n in lengths]
        lines.append([title, str(sp), *columns, _number(mean), goal, met])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(x: int | float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _power_of_two(n: int) -> str:
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)


def styles_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each name; no two of the first 42 share both."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(dict.fromkeys(names))
    }


def plot(rows: Sequence[Row], path: Path, title: str, note: str = "") -> None:
    """Values over N and ratios, a panel a unit, or a quantity where a unit has many lines; bars
    where nothing depends on N. As PNG, with a note below.

    Cases are called "<name>: <quantity>": colours and markers tell names apart, and with them the
    quantities of a panel; line styles tell ranks apart.
    """
    panels = _panels(rows)
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    styles = styles_of(name for points in panels.values() for name, _, _ in points)
    dashes = dict(zip(dict.fromkeys(row["sp"] for row in rows), cycle(LINESTYLES), strict=False))
    figure = Figure(figsize=(5.5 * across, 4.5 * down + 1), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(down, across, squeeze=False)
    lined = False
    for axes, (heading, points) in zip(grid.flat, panels.items(), strict=False):
        if over_length := [point for point in points if point[1]["length"]]:
            _lines(axes, over_length, heading, styles, dashes)
            lined = True
        else:
            names, _, values = zip(*points, strict=True)
            axes.barh(names, values, color=COLOURS[0])
            axes.set(xlabel=heading)
            axes.tick_params(axis="y", labelsize=7)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    if lined:
        shown = [Line2D([], [], label=name, **style) for name, style in styles.items()]
        if len(dashes) > 1:
            shown += [Line2D([], [], color="0.3", linestyle=dash, label=f"sp = {sp}")
                      for sp, dash in dashes.items()]  # fmt: skip
        figure.legend(handles=shown, loc="outside lower center", ncols=3 * across, fontsize=8)
    if note:
        figure.supxlabel(note, fontsize=9, color="#b00020")
    figure.savefig(path, dpi=150)


Panel = list[tuple[str, Row, float]]
"""Name of the line, row, and what is drawn of it."""


def _panels(rows: Sequence[Row]) -> dict[str, Panel]:
    """Heading -> what is drawn below it."""
    units: dict[str, list[tuple[Row, float]]] = {}
    compared = [(row, row["ratio"]) for row in rows if row["ratio"] is not None]
    for row in rows:
        if row["ratio"] is not None and " / " in row["case"]:
            continue  # the case is the ratio
        unit, scale = ("MB", 1e-6) if row["unit"] == "B" else (row["unit"] or "relative", 1.0)
        units.setdefault(unit, []).append((row, row["value"] * scale))
    units |= {"ratio": compared} if compared else {}
    panels: dict[str, Panel] = {}
    for unit, points in units.items():
        crowded = len({row["case"] for row, _ in points}) > CROWDED
        for row, y in points:
            name, _, quantity = row["case"].partition(": ")
            apart = crowded and bool(quantity)
            panel = panels.setdefault(f"{quantity}, {unit}" if apart else unit, [])
            panel.append((name if apart else row["case"], row, y))
    return panels


def _lines(
    axes: Axes,
    points: Panel,
    heading: str,
    styles: Mapping[str, Mapping[str, Any]],
    dashes: Mapping[int, Any],
) -> None:
    """Both axes logarithmic; what is zero is left out."""
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for name, row, y in points:
        lines.setdefault((name, row["sp"]), []).append((row["length"], y))
    for (name, sp), line in lines.items():
        axes.plot(*zip(*sorted(line), strict=True), linestyle=dashes[sp], **styles[name])
    axes.set(xlabel="sequence length N, tokens", ylabel=heading)
    axes.set_xscale("log", base=2)
    if any(y > 0 for _, _, y in points):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
