"""Rows for reading: as CSV, as means beside their goals, as a figure."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from scaling.runs.rows import Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"


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


def plot(rows: Sequence[Row], path: Path, title: str, note: str = "") -> None:
    """Values over N, one panel a unit and one for ratios, one line a case and number of ranks; bars
    where nothing depends on N. As PNG, with a note below."""
    panels = [
        (unit, [(row, row["value"] * scale) for row in rows if row["unit"] == of])
        for of in dict.fromkeys(row["unit"] for row in rows)
        for unit, scale in [("MB", 1e-6) if of == "B" else (of or "relative", 1.0)]
    ]
    if ratios := [(row, row["ratio"]) for row in rows if row["ratio"] is not None]:
        panels.append(("ratio", ratios))
    figure = Figure(figsize=(6.5 * len(panels), 5.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (unit, points) in zip(grid[0], panels, strict=True):
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
    markers = [marker for marker in MARKERS for _ in COLOURS]
    axes.set_prop_cycle(color=COLOURS * len(MARKERS), marker=markers)
    axes.set(xlabel="sequence length N, tokens", ylabel=unit)
    axes.set_xscale("log", base=2)
    if any(y > 0 for _, y in points):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    lines: dict[str, list[tuple[int, float]]] = {}
    for row, y in points:
        lines.setdefault(f"{row['case']}, sp = {row['sp']}", []).append((row["length"], y))
    for label, line in lines.items():
        axes.plot(*zip(*sorted(line), strict=True), label=label)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
