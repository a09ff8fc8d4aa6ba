"""The figures of a sweep, for its report and for TensorBoard."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator

from scaling.experiments.curves import Chart, Fit, Spot, charts
from scaling.experiments.views import LINESTYLES, styles_of
from scaling.runs.rows import Row

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
INK = "#404040"
"""Of what no colour tells apart: texts, axes, ideals."""


def sweep_figures(rows: Sequence[Row], fits: Sequence[Fit] = ()) -> dict[str, Figure]:
    """Name -> figure, of every chart to which the rows have something to say."""
    return {chart.name: draw(chart) for chart in charts(rows, fits)}


def draw(*charts: Chart) -> Figure:
    """Charts side by side. All axes logarithmic. Colours and markers tell models apart, line styles
    their settings; hollow points have more ranks than cores."""
    figure = Figure(figsize=(4.8 * len(charts), 4.4), layout="constrained")
    places = figure.subfigures(1, len(charts), squeeze=False).flat
    for chart, place in zip(charts, places, strict=True):
        _draw(chart, place)
    return figure


def _draw(chart: Chart, figure: SubFigure) -> None:
    axes = figure.subplots()
    styles = styles_of([line.model for line in chart.lines])
    legend: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for line in chart.lines:
        nth = seen[line.model] = seen.get(line.model, -1) + 1
        style = styles[line.model] | {"linestyle": LINESTYLES[nth % len(LINESTYLES)]}
        _draw_line(axes, chart, line.spots, style)
        legend[line.label] = Line2D([], [], **style)
    for line in chart.ideals:
        nth = seen["ideal"] = seen.get("ideal", -1) + 1
        style = {"color": INK, "linewidth": 1, "linestyle": (0, (1, 1 + nth))}
        axes.plot(*_across(chart, line.spots), **style)
        legend[line.label] = Line2D([], [], **style)
    legend |= _draw_fits(axes, chart, styles)
    if any(spot.oversubscribed for line in chart.lines for spot in line.spots):
        hollow = Line2D([], [], color=INK, marker="o", linestyle="", markerfacecolor="none")
        legend["more ranks than cores"] = hollow
    if any(math.isnan(spot.y) for line in chart.lines for spot in line.spots):
        legend["nothing measured"] = Line2D([], [], color=INK, marker="x", linestyle="")
    _label(axes, chart)
    columns = 1 if max(map(len, legend)) > 30 else 2
    figure.legend([*legend.values()], [*legend], loc="outside lower center", fontsize=8,
                  handlelength=3, ncols=columns, frameon=False)  # fmt: skip


def _across(chart: Chart, spots: Sequence[Spot]) -> tuple[list[float], list[float]]:
    """Coordinates on paper."""
    x, y = [spot.x for spot in spots], [spot.y for spot in spots]
    return (y, x) if chart.swapped else (x, y)


def _draw_line(axes: Axes, chart: Chart, spots: Sequence[Spot], style: dict[str, Any]) -> None:
    """The line, interrupted where a point has no value; its spread; its points."""
    axes.plot(*_across(chart, spots), color=style["color"], linestyle=style["linestyle"])
    bare: dict[str, Any] = style | {"linestyle": ""}
    for hollow in (False, True):
        some = [spot for spot in spots if spot.oversubscribed == hollow]
        axes.plot(*_across(chart, some), markerfacecolor="none" if hollow else None, **bare)
    missing = [spot.x for spot in spots if not math.isfinite(spot.y)]
    at_edge = (axes.get_yaxis_transform if chart.swapped else axes.get_xaxis_transform)()
    edge = [0.02] * len(missing)
    where = (edge, missing) if chart.swapped else (missing, edge)
    axes.plot(*where, "x", color=style["color"], transform=at_edge)
    known = [spot for spot in spots if math.isfinite(spot.low + spot.high)]
    spread = [[max(s.y - s.low, 0) for s in known], [max(s.high - s.y, 0) for s in known]]
    across, up = (spread, None) if chart.swapped else (None, spread)
    axes.errorbar(*_across(chart, known), up, across, "none", ecolor=style["color"], capsize=2)


def _draw_fits(axes: Axes, chart: Chart, styles: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Curves with their intervals; returns their entries in the legend."""
    legend: dict[str, Any] = {}
    for fit in chart.fits:
        colour = styles.get(fit.model, {"color": INK})["color"]
        low, high = [spot.low for spot in fit.spots], [spot.high for spot in fit.spots]
        fill = axes.fill_betweenx if chart.swapped else axes.fill_between
        fill([spot.x for spot in fit.spots], low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(*_across(chart, fit.spots), color=colour, linewidth=1)
        legend["fit, 95 % interval"] = Patch(color=INK, alpha=0.3)
        if held := fit.held_out:
            at = {"color": INK, "marker": "*", "markersize": 10, "markerfacecolor": "none"}
            axes.plot(*_across(chart, [held]), linestyle="", **at)
            legend["predicted without that scale"] = Line2D([], [], linestyle="", **at)
    return legend


def _label(axes: Axes, chart: Chart) -> None:
    axes.set_title(chart.name, fontsize=10)
    x, y = (chart.y, chart.x) if chart.swapped else (chart.x, chart.y)
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    for axis, label in ((axes.xaxis, x), (axes.yaxis, y)):
        binary = "N, tokens" in label or "ranks" in label
        low, high = axis.get_view_interval()
        subs = (1,) if high > 1e3 * low else (1, 2, 5)
        axis.set_major_locator(LogLocator(2) if binary else LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(_power_of_two if binary else _plain))
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def _power_of_two(value: float, _: int) -> str:
    power = round(math.log2(value))
    return f"{value:g}" if power < 10 else "2" + str(power).translate(SUPERSCRIPTS)


def _plain(value: float, _: int) -> str:
    """1e+13 as 10¹³."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    digits, _sign, power = f"{value:.0e}".partition("e")
    head = "" if digits == "1" else f"{digits}·"
    return f"{head}10{str(int(power)).translate(SUPERSCRIPTS)}"
