"""Fit power laws to measured sweeps: python -m launch fit sweeps/a [sweeps/b ...] [key=value] ...

Rows of several sweeps count together. The laws, their intervals and what was refused go into
fits.json in the first sweep's folder; method, meaning and limits: docs/fits.md.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from data_pipeline.disk import write_atomically
from data_pipeline.errors import RunError
from launch.config.compose import command_line
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row


@dataclass
class FitConfig:
    paths: list[str]
    """Folders of sweeps."""
    target: Literal["step_s", "peak_bytes", "loss"] | None = None
    """What is fitted; null: whatever the rows have."""
    draws: Annotated[int, Ge(1000)] = 2000
    """Of the bootstrap."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the draws."""


def main(arguments: list[str]) -> None:
    """Fit, print and write."""
    config, _ = command_line(arguments, "fit", FitConfig)
    paths = {Path(path).resolve(): path for path in config.paths}.values()  # each once
    rows = [row for path in paths for row in rows_of_sweep(path)]
    from scaling.experiments.board import FITS, write_board
    from scaling.experiments.fits.select import TARGETS, fits_of

    targets = [config.target] if config.target else TARGETS
    entries = fits_of(rows, targets, config.draws, config.seed)
    if not entries:
        raise RunError(f"no row of {', '.join(paths)} has kind=step or kind=train as "
                       f"{' or '.join(targets)} needs it; measure some with: python -m launch "
                       "sweep")  # fmt: skip
    path = Path(config.paths[0]) / FITS
    try:
        write_atomically(path, json.dumps(entries, indent=1, allow_nan=False) + "\n")
        if path.with_name("config.yaml").exists():  # more than a copy of rows
            write_board(RunFolder(path.parent))
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); make room, or change its "
                       "permissions") from error  # fmt: skip
    print(*as_text(entries), f"written to {path}", sep="\n")
    if all("refused" in entry for entry in entries):
        raise RunError(f"nothing could be fitted: {entries[0]['refused']}")


def rows_of_sweep(path: str) -> list[Row]:
    """All rows that a sweep has left so far.

    Raises:
        RunError: there are none, or they cannot be read.
    """
    way_out = "name the folder of a sweep; python -m launch sweep makes one"
    try:
        rows = RunFolder(path).rows()
    except RunError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path}/metrics.jsonl cannot be read ({reason}); {way_out}") from error
    if not rows:
        lack = "has no rows" if Path(path).is_dir() else "is no folder"
        raise RunError(f"{path} {lack}: {way_out}")
    return rows


def as_text(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """All entries for reading: first what was fitted, then what was refused."""
    groups = [entry["group"] for entry in entries if entry["group"]]
    shared = {key: x for key, x in groups[0].items() if all(g.get(key) == x for g in groups)}
    yield f"for {_named(shared)}:"
    refusals: dict[str, list[str]] = {}
    for entry in entries:
        own = {key: x for key, x in entry["group"].items() if key not in shared}
        if "refused" in entry:
            title = f"{entry['target']} = {entry['form']} refused: {entry['refused']}"
            refusals.setdefault(title, []).append(_named(own))
        else:
            yield f"\n{entry['target']} = {entry['form']}    {_named(own)}".rstrip()
            yield from _fitted(entry)
    yield ""
    for title, where in refusals.items():
        yield f"{title}\n    at {'; '.join(where)}" if any(where) else title
        yield ""


def _fitted(entry: Mapping[str, Any]) -> Iterator[str]:
    for name, each in entry["parameters"].items():
        yield f"    {name:<5}{_interval(each)}"
    first, *_, last = map(_number, entry["scales"])
    yield f"    from {entry['points']} points, {entry['variables'][0]} {first} to {last}"
    yield f"    residuals {entry['residuals']['rms']:.2%} rms"
    if held := entry["held_out"]:
        where = "inside" if held["covered"] else "OUTSIDE"
        yield f"    held out, {held['beyond']:.3g} times the largest fitted: {_named(held['at'])}"
        yield f"        predicted {_interval(held | {'value': held['predicted']})}"
        yield f"        measured {_number(held['measured'])}, {where}; error {held['error']:+.1%}"
    for each in entry["reaches"]:
        if each["value"]:
            yield (f"    longest in {each['level'] / 2**30:g} GiB: {_interval(each)}, "
                   f"{each['beyond']:.3g} times the largest measured")  # fmt: skip
    for exponent in [name for name in entry["dropped"][0] if name != "at"]:
        values = [each[exponent] for each in entry["dropped"]]
        yield f"    {exponent} with any one scale dropped: {min(values):.4g} to {max(values):.4g}"
    if check := entry.get("isoflop"):
        yield (f"    best size grows with compute to the power {check['of_fit']:.3g}; by parabolas "
               f"over {check['budgets']} budgets {check['exponent']:.3g}")  # fmt: skip
    if remark := entry["residuals"]["remark"]:
        yield f"    note: {remark}"
    if left_out := entry["left_out"]:
        yield f"    left out: {', '.join(f'{count} {why}' for why, count in left_out.items())}"


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_number(x)}" for key, x in values.items())


def _interval(each: Mapping[str, float | None]) -> str:
    return f"{_number(each['value'])}  (95 %: {_number(each['low'])} to {_number(each['high'])})"


def _number(x: Any) -> str:
    if x is None:
        return "without bound"
    if isinstance(x, int | float) and not isinstance(x, bool):
        return f"{x:,.0f}" if x == int(x) and 1000 <= x < 1e9 else f"{x:.4g}"
    return str(x)
