"""Figures of measured rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

Row = Mapping[str, Any]
"""One measured point: length, sp, status, and the numbers of a StepCost where status is ok."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"


def plot_sweep(rows: Sequence[Row], path: Path, title: str) -> None:
    """Tokens/s, memory and exchanged bytes over the sequence length, one line per sp, as PNG.

    A point that failed is listed under the figure with its reason.
    """
    measured = [row for row in rows if row["status"] == "ok"]
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    figure.suptitle(title)
    speed, memory, traffic = figure.subplots(1, 3)
    for axes, what, unit, value in (
        (speed, "speed", "tokens/s, all ranks", lambda row: row["tokens_per_s"]),
        (memory, "peak memory per rank", "MB", lambda row: row["peak_bytes"] / 1e6),
        (traffic, "sent per rank and step", "MB", lambda row: row["comm_bytes"] / 1e6),
    ):
        _lines(axes, _by_ranks(measured, value), what, unit)
    if measured:
        # A flat line is flat: no magnified noise.
        bottom, top = speed.get_ylim()
        speed.set_ylim(bottom / 2, top * 1.5)
        base = max(row["base_bytes"] for row in measured) / 1e6
        memory.axhline(base, color="0.5", linestyle="--", linewidth=1)
        memory.annotate("before the first step", (0.98, base), xycoords=("axes fraction", "data"),
                        ha="right", va="bottom", fontsize=9, color="0.35")  # fmt: skip
        memory.set_ylim(bottom=base / 2)
    failed = [row for row in rows if row["status"] != "ok"]
    if failed:
        reasons = [f"N = {row['length']}, sp = {row['sp']}: {row['status']}" for row in failed]
        figure.supxlabel("not measured: " + "\n".join(reasons), fontsize=9, color="#b00020")
    figure.savefig(path, dpi=150)


def plot_rows(rows: Sequence[Row], path: Path, title: str) -> None:
    """Seconds and memory of a bench's rows over N, one line per case, as PNG.

    Cases are named "line: what it is", units are "s" and "B".
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    figure.suptitle(title)
    panels = {"s": ("time", "s", 1.0), "B": ("peak memory of the process", "MB", 1e-6)}
    for axes, (unit, (what, shown, scale)) in zip(
        figure.subplots(1, 2), panels.items(), strict=True
    ):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in sorted(rows, key=lambda row: row["length"]):
            if row["unit"] == unit:
                point = row["length"], row["value"] * scale
                lines.setdefault(row["case"].partition(":")[0], []).append(point)
        _lines(axes, lines, what, shown)
    figure.savefig(path, dpi=150)


def _by_ranks(
    rows: Sequence[Row], value: Callable[[Row], float]
) -> dict[str, list[tuple[int, float]]]:
    """One line per sp."""
    lines = {}
    for sp in sorted({row["sp"] for row in rows}):
        points = [(row["length"], value(row)) for row in rows if row["sp"] == sp]
        lines[f"sp = {sp}" if any(y > 0 for _, y in points) else f"sp = {sp}: nothing"] = points
    return lines


def _lines(
    axes: Axes, lines: Mapping[str, Sequence[tuple[int, float]]], title: str, unit: str
) -> None:
    """Points (N, y) of each label, both axes logarithmic; what is zero is left out."""
    axes.set(title=title, xlabel="sequence length N, tokens", ylabel=unit)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for number, (label, points) in enumerate(lines.items()):
        axes.plot(
            [x for x, _ in points],
            [y if y > 0 else math.nan for _, y in points],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=label,
        )
    lengths = sorted({float(x) for points in lines.values() for x, _ in points})
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_major_formatter(FuncFormatter(_power_of_two))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    if lengths:
        axes.legend()


def _power_of_two(x: float, _position: int | None = None) -> str:
    exponent = math.log2(x)
    return f"$2^{{{exponent:.0f}}}$" if exponent.is_integer() else f"{x:,.0f}"
