"""Figures of rows."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from scaling.runs.rows import Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"


def plot(rows: Sequence[Row], path: Path, title: str, note: str = "") -> None:
    """Values over N, one panel a unit and one for ratios, one line a case and number of ranks; bars
    where nothing depends on N. As PNG, with a note below."""
    panels = [
        (unit, [(row, row["value"] * scale) for row in rows if row["unit"] == of])
        for of in dict.fromkeys(row["unit"] for row in rows)
        for unit, scale in [("MB", 1e-6) if of == "B" else (of or "relative", 1.0)]
    ]
    panels.append(("ratio", [(row, row["ratio"]) for row in rows if row["ratio"] is not None]))
    panels = [(unit, points) for unit, points in panels if points]
    figure = Figure(figsize=(6.5 * max(len(panels), 1), 5.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(1, max(len(panels), 1), squeeze=False)
    for axes, (unit, points) in zip(grid[0], panels, strict=False):
        if any(row["length"] for row, _ in points):
            _lines(axes, [(row, y) for row, y in points if row["length"]], unit)
        else:
            axes.barh([row["case"] for row, _ in points], [y for _, y in points], color=COLOURS[0])
            axes.set(xlabel=unit)
            axes.tick_params(axis="y", labelsize=7)
    if note:
        figure.supxlabel(note, fontsize=9, color="#b00020")
    figure.savefig(path, dpi=150)


def _lines(axes: Axes, points: Sequence[tuple[Row, float]], unit: str) -> None:
    """Both axes logarithmic; what is zero is left out."""
    axes.set(xlabel="sequence length N, tokens", ylabel=unit)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = {row["sp"] for row, _ in points}
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row, y in points:
        lines.setdefault((row["case"], row["sp"]), []).append((row["length"], y))
    for number, ((case, sp), line) in enumerate(lines.items()):
        line.sort()
        axes.plot(
            [x for x, _ in line],
            [y if y > 0 else math.nan for _, y in line],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number // len(COLOURS) % len(MARKERS)],
            label=f"{case}, sp = {sp}" if len(sizes) > 1 else case,
        )
    axes.xaxis.set_major_locator(FixedLocator(sorted({float(row["length"]) for row, _ in points})))
    axes.xaxis.set_major_formatter(FuncFormatter(_power_of_two))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _power_of_two(x: float, _position: int | None = None) -> str:
    exponent = math.log2(x)
    return f"$2^{{{exponent:.0f}}}$" if exponent.is_integer() else f"{x:,.0f}"
