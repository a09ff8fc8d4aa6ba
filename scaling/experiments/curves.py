"""What the rows of a sweep say about scaling, as lines over ranks, length, memory and compute.

Figures (figures.py), TensorBoard (board.py) and the report are drawn from these. A point is the
median over repeats and seeds. Where a cell has nothing, or no finite number, its point is NaN: a
gap, so that no line leads through nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

from scaling.runs.rows import Row

GIB = 2**30
SETTING = ("model", "parameters", "sp", "dp", "length", "rows", "zero_stage", "threads", "hardware")
"""Columns that describe a cell, in the order in which labels name them."""
NAMES = {"length": "N", "zero_stage": "ZeRO"}
"""Of columns, in labels."""


Fit = dict[str, Any]
"""One of fits.json."""


class Spot(NamedTuple):
    """A point of a line; y is NaN where nothing was measured."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    oversubscribed: bool = False
    """More ranks than cores: says little about a machine that has enough."""


@dataclass
class Line:
    """Points that differ in x alone."""

    spots: list[Spot]
    rows: Sequence[Row] = ()
    """From which they were made; of an ideal none."""
    label: str = ""

    @property
    def model(self) -> str:
        return str(self.rows[0].get("model", "")) if self.rows else ""


@dataclass
class Fitted:
    """The curve of a fit with its 95 % interval, and what it said of the scale held out."""

    model: str
    spots: list[Spot]
    held_out: Spot | None = None


@dataclass
class Chart:
    """One question about scaling, answered by lines."""

    name: str
    x: str
    """With its unit, as `y`."""
    y: str
    lines: list[Line]
    ideals: list[Line] = field(default_factory=list)
    fits: list[Fitted] = field(default_factory=list)
    swapped: bool = False
    """Drawn with y across, as the x that a y allows."""


def charts(rows: Sequence[Row], fits: Sequence[Fit] = ()) -> list[Chart]:
    """All charts to which these rows have something to say.

    Args:
        rows: of a sweep, see columns.py.
        fits: of fits.json.
    """
    cells = [row for row in rows if "length" in row or row.get("kind") == "train"]
    steps = [row for row in cells if row.get("kind", "step") == "step"]
    trained = [row for row in cells if row.get("kind") == "train"]
    made = [
        _over_ranks("strong scaling", "speed-up over one rank", steps, strong=True),
        _over_ranks("weak scaling", "relative step time", steps, strong=False),
        Chart("step time over length", "sequence length N, tokens", "step time, s",
              _lines(steps, _number("length"), _number("step_s"), ("length",)),
              fits=_fitted(fits, "step_s", "length")),
        Chart("memory frontier", "longest sequence N, tokens", "memory of a rank, GiB",
              _lines(steps, _number("length"), _number("peak_bytes", float(GIB)), ("length",)),
              fits=_fitted(fits, "peak_bytes", "length"), swapped=True),
        Chart("loss against compute", "training compute, FLOP", "validation loss",
              _by_compute(trained), fits=_fitted(fits, "loss", "train_flops")),
    ]  # fmt: skip
    for least in (2, 1):  # a chart of points alone says little beside one of lines
        if shown := [each for each in made
                     if any(len(_measured(line)) >= least for line in each.lines)]:  # fmt: skip
            return shown
    return []


def _measured(line: Line) -> list[Spot]:
    return [spot for spot in line.spots if math.isfinite(spot.y)]


def telling(rows: Sequence[Row], columns: Iterable[str]) -> list[str]:
    """The fewest of these columns, first ones first, that tell the rows apart as well as all do."""
    kept: list[str] = []
    count = 1
    for column in columns:
        distinct = len({tuple(str(row.get(key)) for key in [*kept, column]) for row in rows})
        if distinct > count:
            kept, count = [*kept, column], distinct
    return kept


def settings_of(rows: Sequence[Row]) -> list[str]:
    """Columns that say what was measured: those known, then the grid's own keys."""
    return [*SETTING, *dict.fromkeys(key for row in rows for key in row if "." in key)]


def _number(column: str, unit: float = 1.0) -> Callable[[Row], float]:
    """Reads a column in some unit; NaN where there is no finite positive number."""

    def read(row: Row) -> float:
        value = row.get(column)
        number = value if isinstance(value, (int, float)) else math.nan
        return number / unit if math.isfinite(number) and number > 0 else math.nan

    return read


def _lines(
    rows: Sequence[Row],
    x: Callable[[Row], float],
    y: Callable[[Row], float],
    free: Sequence[str] = (),
    also: Mapping[str, Callable[[Row], Any]] = {},
) -> list[Line]:
    """One line for each setting but the `free` columns, which may differ along it.

    Args:
        also: name -> what else stays the same along a line.
    """
    columns = [*also, *(key for key in settings_of(rows) if key not in free)]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if math.isfinite(x(row)):
            row = row | {name: value(row) for name, value in also.items()}
            groups.setdefault(tuple(str(row.get(key)) for key in columns), []).append(row)
    return _named(
        [
            Line([_spot(at, some, x, y) for at in sorted({x(row) for row in some})], some)
            for some in groups.values()
        ],
        columns,
    )


def _named(lines: list[Line], columns: Sequence[str]) -> list[Line]:
    """The same, each with the columns that tell it from the others as its label."""
    shown = telling([line.rows[0] for line in lines], columns)
    for line in lines:
        said = ", ".join(_said(key, line.rows[0].get(key)) for key in shown)
        line.label = said or line.model or "measured"
    return lines


def _said(column: str, value: Any) -> str:
    number = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
    return str(value) if column == "model" else f"{NAMES.get(column, column)} {number}"


def _spot(
    at: float, rows: Iterable[Row], x: Callable[[Row], float], y: Callable[[Row], float]
) -> Spot:
    """Median over the rows at x; its spread is that of the rows, or of one row's steps."""
    ok = [row for row in rows if x(row) == at and row.get("status", "ok") == "ok"]
    ok = [row for row in ok if math.isfinite(y(row))]
    if not ok:
        return Spot(at, math.nan)
    values = [y(row) for row in ok]
    low, high = min(values), max(values)
    if len(ok) == 1 and values[0] == ok[0].get("step_s") and "step_low_s" in ok[0]:
        low, high = ok[0]["step_low_s"], ok[0].get("step_high_s", math.nan)
    return Spot(at, median(values), low, high, any(row.get("oversubscribed") for row in ok))


def _over_ranks(name: str, y: str, rows: Sequence[Row], strong: bool) -> Chart:
    """Lines over ranks whose tokens of a step (weak: of a rank) stay the same, along sp and dp.

    The fewest ranks of a line count as ideal. A speed-up of P is, and a weak step that takes as
    long; or, where N grows with sp, log(N P) / log(N) times as long: an FFT's work is N log N.
    """
    needed, ranks = ("length", "rows", "sp", "dp", "ranks"), _number("ranks")
    rows = [row for row in rows if all(row.get(key) for key in needed)]
    lines: list[Line] = []
    ideals: dict[str, Line] = {}
    for axis, grows in (("sp", "length"), ("dp", "rows")):
        free = () if strong else (grows,)
        same: dict[str, Callable[[Row], Any]] = {axis: lambda _: "P"}
        if not strong:
            same["tokens of a rank"] = lambda row: row["rows"] * row["length"] // row["ranks"]
        for line in _lines(rows, ranks, _number("step_s"), free, same):
            measured = _measured(line)
            if len(measured) < 2:
                continue
            first, last = measured[0], measured[-1]
            spots = [_relative(spot, first, strong) for spot in line.spots]
            lines.append(replace(line, spots=spots))
            n = min(row["length"] for row in line.rows if ranks(row) == first.x)
            fft = not strong and axis == "sp" and n > 1
            title = f"ideal of an FFT from N = {n:,}" if fft else "ideal"
            span = [first.x * (last.x / first.x) ** (i / 32) for i in range(33)]
            for p in span:
                grown = math.log(n * p / first.x) / math.log(n) if fft else 1.0
                at = Spot(p, p if strong else grown)
                ideals.setdefault(title, Line([], label=title)).spots.append(at)
    for line in ideals.values():
        line.spots.sort()
    grown = () if strong else ("length", "rows")
    columns = [*(key for key in settings_of(rows) if key not in grown), "tokens of a rank"]
    return Chart(name, "ranks P", y, _named(lines, columns), list(ideals.values()))


def _relative(spot: Spot, first: Spot, strong: bool) -> Spot:
    """Step times as speed-up over one rank, or as ratios."""
    if strong:
        work = first.x * first.y
        return spot._replace(y=work / spot.y, low=work / spot.high, high=work / spot.low)
    return spot._replace(y=spot.y / first.y, low=spot.low / first.y, high=spot.high / first.y)


def _by_compute(rows: Sequence[Row]) -> list[Line]:
    """A line a model and size over its budgets; a line a model where sizes have one budget each."""
    x, y = _number("train_flops"), _number("loss")
    grid = [key for row in rows for key in row if "." in key]
    of_sizes = _lines(rows, x, y, ("length", "rows", "dp", "sp", *grid))
    if any(len(line.spots) > 1 for line in of_sizes):
        return of_sizes
    return _lines(rows, x, y, ("length", "rows", "dp", "sp", "parameters", *grid))


def _fitted(fits: Sequence[Fit], target: str, x: str) -> list[Fitted]:
    """The curves over x of the fits of a column, where they have any."""
    unit = float(GIB) if target == "peak_bytes" else 1.0
    curves = []
    for fit in fits:
        points = [point for point in fit.get("curve") or () if x in point]
        if fit.get("target") != target or not points:
            continue
        spots = [_predicted(float(point[x]), point, "value", unit) for point in points]
        held, at = None, fit.get("held_out") or {}
        if x in at.get("at", {}):
            held = _predicted(float(at["at"][x]), at, "predicted", unit)
        curves.append(Fitted(str(fit.get("group", {}).get("model", "")), spots, held))
    return curves


def _predicted(x: float, said: Row, key: str, unit: float) -> Spot:
    """What is not finite is a gap."""
    value, low, high = (_number(name, unit)(said) for name in (key, "low", "high"))
    return Spot(x, value, low, high)
