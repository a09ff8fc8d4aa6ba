"""Which rows of sweeps belong to one fit, which belong to none, and why."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import fmean
from typing import Any

import numpy as np

from scaling.experiments.fits.checks import near
from scaling.experiments.fits.entries import Refused, entry
from scaling.experiments.fits.power_law import Data, Form
from scaling.runs.rows import Row

SETTINGS = ("model", "parameters", "length", "rows", "vectors", "scalars", "engine", "zero_stage",
            "dp", "sp", "threads")  # fmt: skip
"""Columns whose values tell rows of different fits apart, besides those of the sweep's grid."""
MEMORIES = tuple(gib * 2.0**30 for gib in (16, 40, 80))
"""Of common processors, for which the longest sequence is asked."""
CIRCUMSTANCES = ("hardware", "versions")
"""Must not differ within a fit."""


@dataclass(frozen=True)
class Law:
    """A form, and the columns of a sweep's table that it is about."""

    target: str
    kind: str
    """Of the rows: step or train."""
    form: Form
    columns: tuple[str, ...]
    """Of the form's variables."""
    free: tuple[str, ...] = ()
    """Settings that may differ beside them."""
    frontier: bool = False
    """Only the best run of every budget of compute counts."""
    levels: tuple[float, ...] = ()
    """Of the target, whose variable is asked for."""


def _laws() -> Iterator[Law]:
    for target in ("step_s", "peak_bytes"):
        levels = MEMORIES if target == "peak_bytes" else ()
        yield Law(target, "step", Form("c + a N^b"), ("length",), levels=levels)
        yield Law(target, "step", Form("c + a P^-g"), ("ranks",), ("sp",))
        yield Law(target, "step", Form("c + a N^b P^-g"), ("length", "ranks"), ("sp",))
    yield Law("loss", "train", Form("c + a N^b"), ("length",))
    yield Law("loss", "train", Form("E + A N^-a + B D^-b"), ("parameters", "tokens"))
    free = ("parameters", "tokens")
    yield Law("loss", "train", Form("E + A C^-a"), ("train_flops",), free, frontier=True)


LAWS = tuple(_laws())
TARGETS = tuple(dict.fromkeys(law.target for law in LAWS))


def fits_of(
    rows: Sequence[Row], targets: Sequence[str], draws: int, seed: int
) -> list[dict[str, Any]]:
    """The entries of fits.json: of every law whose variables take several values in the rows, one a
    group of equal settings."""
    entries = []
    for target in targets:
        laws = {law: [row for row in rows if row.get("kind") == law.kind]
                for law in LAWS if law.target == target}  # fmt: skip
        laws = {law: some for law, some in laws.items() if some}
        asked = [law for law, some in laws.items() if all(_varies(some, c) for c in law.columns)]
        for law in asked or list(laws)[:1]:
            entries += _entries(law, laws[law], draws, seed)
    return entries


def _varies(rows: Iterable[Row], column: str) -> bool:
    return len({row.get(column) for row in rows} - {None}) > 1


def _entries(law: Law, rows: list[Row], draws: int, seed: int) -> Iterator[dict[str, Any]]:
    head = {"target": law.target, "form": law.form.text}
    needed = (*law.columns, law.target, "oversubscribed", *CIRCUMSTANCES)
    done = [row for row in rows if row.get("status") == "ok"]
    if done and (lacks := [column for column in needed if all(column not in row for row in done)]):
        yield head | {"group": {}, "refused": f"the rows have no column {' or '.join(lacks)}"}
        return
    for group, some in _groups(law, rows):
        faults = Counter(fault for row in some if (fault := _fault(row, law)))
        usable = [row for row in some if not _fault(row, law)]
        try:
            for column in CIRCUMSTANCES:
                if len(mixed := sorted({str(row[column]) for row in usable})) > 1:
                    raise Refused(f"{column} is mixed ({'; '.join(mixed)}): fit them apart")
            data, beaten = _data(law, usable)
            faults += Counter({"beaten at equal compute": beaten} if beaten else {})
            found = entry(law.form, data, law.columns, draws, seed, law.levels)
        except Refused as refusal:
            found = {"refused": f"{refusal}{_left_out(faults)}"}
        yield head | {"group": group} | found | {"left_out": dict(faults)}


def _groups(law: Law, rows: list[Row]) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """Rows of equal settings, with these. A key of the grid that only names what the variables say,
    such as model.hidden beside parameters, is no setting."""
    variables = (*law.columns, *law.free)
    settings = [column for column in SETTINGS if column not in variables]
    keys = dict.fromkeys(c for row in rows for c in row if "." in c or c == "steps")
    keys = [key for key in keys if not key.endswith("seed")]
    for _, some in _split(rows, settings):
        cells = [cell for _, cell in _split(some, variables)]
        own = [key for key in keys if any(_split(cell, [key])[1:] for cell in cells)]
        for values, group in _split(some, [*settings, *own]):
            yield {key: x for key, x in values.items() if x is not None}, group


def _split(rows: Iterable[Row], columns: Iterable[str]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Rows of equal values in some columns, with the values; in the order of the rows."""
    found: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    for row in rows:
        values = {column: row.get(column) for column in columns}
        found.setdefault(json.dumps(values), (values, []))[1].append(row)
    return list(found.values())


def _fault(row: Row, law: Law) -> str | None:
    """Why a row cannot enter a fit."""
    if row.get("status") != "ok":
        return "failed or unfinished"
    for column in (*law.columns, law.target):
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"without {column}"
        if not isfinite(value) or value <= 0:
            return f"with {column} not positive and finite"
    if any(row.get(column) is None for column in ("oversubscribed", *CIRCUMSTANCES)):
        return "of unknown circumstances"
    return f"oversubscribed on {row.get('ranks')} ranks" if row["oversubscribed"] else None


def _left_out(faults: Mapping[str, int]) -> str:
    said = ", ".join(f"{count} {fault}" for fault, count in faults.items())
    return f"; left out: {said}" if said else ""


def _data(law: Law, rows: list[Row]) -> tuple[Data, int]:
    """The points of a fit, and how many runs were beaten by others that took no more compute."""
    if law.kind == "train":  # repeats of one seed are one run
        seeds = dict.fromkeys(column for row in rows for column in row if column.endswith("seed"))
        runs = _split(rows, [*law.columns, *law.free, *seeds])
        rows = [some[0] | {law.target: fmean(row[law.target] for row in some)} for _, some in runs]
    kept = list(_frontier(law, rows)) if law.frontier else rows
    x = np.array([[row[column] for column in law.columns] for row in kept], dtype=float)
    y = np.array([row[law.target] for row in kept], dtype=float)
    return Data(x.reshape(len(kept), len(law.columns)), y), len(rows) - len(kept)


def _frontier(law: Law, rows: list[Row]) -> Iterator[Row]:
    """Of every budget the best cell, where no smaller budget has a better one."""
    budgets, lowest = near(np.array([row[law.columns[0]] for row in rows])), inf
    for budget in sorted(set(budgets)):
        cells = _split((row for row, b in zip(rows, budgets, strict=True) if b == budget), law.free)
        means = [fmean(row[law.target] for row in cell) for _, cell in cells]
        if min(means) < lowest:
            lowest = min(means)
            yield from cells[means.index(lowest)][1]
