"""Tables of a report: heads with units, and cells as text."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scaling.experiments.curves import Fit, settings_of, telling
from scaling.report.sources import Run
from scaling.runs.rows import Row

MIB = 2**20
NOTHING = "-"
MEASURED: dict[str, tuple[str, int]] = {
    "step_s": ("step, s", 1),
    "tokens_per_s": ("tokens/s", 1),
    "comm_s": ("exposed communication, s", 1),
    "comm_hidden": ("hidden communication, share", 1),
    "comm_bytes": ("sent by a rank, MiB", MIB),
    "data_wait_s": ("waiting for data, s", 1),
    "peak_bytes": ("peak memory of a rank, MiB", MIB),
    "base_bytes": ("of that before the first step, MiB", MIB),
    "loss": ("validation loss", 1),
    "train_flops": ("training compute, FLOP", 1),
    "seconds": ("training, s", 1),
}
"""Column of a sweep's rows -> head, and how much one of its units is."""
TARGETS = {"step_s": "step, s", "peak_bytes": "peak memory, bytes", "loss": "validation loss"}
"""What is fitted, in words."""
SHARES: dict[str, tuple[str, str]] = {
    "exposed communication": ("comm_s", "step_s"),
    "waiting for data": ("data_wait_s", "step_s"),
    "FFTs, of the FLOP": ("fft_flops", "flops"),
    "memory held before the first step": ("base_bytes", "peak_bytes"),
}
"""Where time and memory go: part and whole."""


@dataclass
class Table:
    """Rows are as long as the heads."""

    heads: Sequence[str]
    rows: list[list[str]]

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it has numbers alone."""
        columns = zip(*self.rows, strict=True)
        return [all(map(_is_number, column)) for column in columns] or [False] * len(self.heads)


def number(value: Any, form: str = "") -> str:
    """For people: 12,345 or 0.0123; a dash where there is nothing, as there is where a value is
    not finite."""
    if not isinstance(value, (int, float)):
        return NOTHING if value is None else str(value)
    if not math.isfinite(value):
        return NOTHING
    if form or isinstance(value, bool):
        return format(value, form)
    if value == 0 or 1e3 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def of_runs(runs: Sequence[Run]) -> Table:
    heads = ["run", "model", "task", "state", "steps", "training loss", "validation loss",
             "equivariance error", "tokens/s", "peak memory of a rank, MiB"]  # fmt: skip
    rows = []
    for run in runs:
        said = run.summary
        memory = said.peak_bytes and said.peak_bytes / MIB
        texts = [run.name, *(str(run.config[key].get("name")) for key in ("model", "task"))]
        values = [said.train_loss, said.validation_loss, said.equivariance_error,
                  said.tokens_per_s, memory]  # fmt: skip
        rows.append([*texts, run.state, number(said.steps), *map(number, values)])
    return Table(heads, rows)


def of_evaluations(runs: Sequence[Run]) -> Table:
    """Those after training."""
    heads = ["run", "split", "data", "step", "loss", "standard error", "samples"]
    keys = ("step", "loss", "standard_error", "samples")
    rows = [
        [run.name, str(row.get("split")), str(row.get("store") or "the run's")]
        + [number(row.get(key)) for key in keys]
        for run in runs
        for row in run.evaluations
    ]
    return Table(heads, rows)


def of_cells(rows: Sequence[Row]) -> Table:
    """One row a cell of a sweep: medians over its repeats and seeds, or why there are none."""
    settings = telling(rows, settings_of(rows))
    measured = [key for key in MEASURED if any(row.get(key) is not None for row in rows)]
    heads = [
        *(name.replace("_", " ") for name in settings),
        *(MEASURED[key][0] for key in measured),
    ]
    lines = []
    for values, cell in _cells(rows, settings):
        ok = [row for row in cell if row.get("status", "ok") == "ok"]
        remark = "" if ok else f"not measured: {cell[0].get('status')}"
        mark = " (more ranks than cores)" if any(row.get("oversubscribed") for row in ok) else ""
        medians = [_median(ok, key, MEASURED[key][1]) for key in measured]
        lines.append([*map(number, values), *map(number, medians), remark + mark])
    return Table([*heads, "remark"], lines)


def of_shares(rows: Sequence[Row]) -> Table:
    """Parts of time and memory at the longest N of every other setting."""
    ok = [row for row in rows if row.get("status") == "ok" and row.get("length")]
    steps = [row for row in ok if row.get("kind", "step") == "step"]
    settings = telling(steps, [key for key in settings_of(steps) if key != "length"])
    lines = []
    for values, cell in _cells(steps, settings):
        longest = max(row["length"] for row in cell)
        at_longest = [row for row in cell if row["length"] == longest]
        shares = []
        for part, whole in SHARES.values():
            of, parts = _median(at_longest, whole), _median(at_longest, part)
            shares.append(f"{parts / of:.0%}" if of and parts is not None else NOTHING)
        lines.append([*map(number, values), number(longest), *shares])
    return Table([*settings, "longest N", *SHARES], lines)


def of_fits(fits: Iterable[Fit]) -> Table:
    """Exponents with intervals, and how the largest scale was predicted without it."""
    heads = ["what", "of", "form", "parameters, 95 % interval", "points",
             "largest scale: measured", "predicted without it, 95 % interval", "error", "covered",
             "remark"]  # fmt: skip
    rows = []
    for fit in fits:
        group = ", ".join(f"{key} {value}" for key, value in fit.get("group", {}).items())
        target = str(fit.get("target"))
        start = [TARGETS.get(target, target), group or "all", str(fit.get("form"))]
        if why := fit.get("refused"):
            rows.append([*start, *[NOTHING] * 6, f"refused: {why}"])
            continue
        said = fit.get("parameters", {}).items()
        held = fit.get("held_out") or {}
        rows.append([
            *start,
            "; ".join(f"{name} = {_interval(each, 'value')}" for name, each in said),
            number(fit.get("points")),
            number(held.get("measured")),
            _interval(held, "predicted") if held else NOTHING,
            number(held.get("error"), "+.1%"),
            {"True": "yes", "False": "no"}.get(str(held.get("covered")), NOTHING),
            (fit.get("residuals") or {}).get("remark") or "",
        ])  # fmt: skip
    return Table(heads, rows)


def of_rows(rows: Sequence[Row]) -> Table:
    """All rows and columns as they were measured."""
    heads = [*dict.fromkeys(key for row in rows for key in row)]
    return Table(heads, [[number(row.get(key)) for key in heads] for row in rows])


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-|[-+]?[\d.,]+(e[-+]\d+)?%?", cell))


def _interval(said: Row, key: str) -> str:
    return f"{number(said.get(key))} ({number(said.get('low'))} to {number(said.get('high'))})"


def _cells(rows: Sequence[Row], settings: Sequence[str]) -> list[tuple[list[Any], list[Row]]]:
    """Values of the settings, and the rows that have these."""
    cells: dict[tuple, list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(str(row.get(key)) for key in settings), []).append(row)
    return [([cell[0].get(key) for key in settings], cell) for cell in cells.values()]


def _median(rows: Sequence[Row], key: str, unit: int = 1) -> float | None:
    said = [row.get(key) for row in rows]
    values = [v for v in said if isinstance(v, (int, float)) and math.isfinite(v)]
    return float(median(values)) / unit if values else None
