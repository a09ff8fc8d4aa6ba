"""Rows: what training and experiments leave, one JSON object a line of metrics.jsonl."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError

NOT_FINITE = "not_finite"
"""Split of the row of a step that could not be taken (train/not_finite.py)."""
Row = dict[str, Any]
"""`time` (unix seconds; rows of early versions have none) and what its writer measured. Training
rows: step, split, loss, ... (observe/metrics.py). Rows of experiments: point, case, sp (ranks),
length (N, tokens; 0: all), channels, value, unit, and ratio where two sides were compared; the last
row of a point has its `status`, ok or why there is nothing. Of sweeps: experiments/columns.py."""


def read_rows(path: Path) -> list[Row]:
    """All whole rows; a last line that a killed process left half-written is not one.

    Raises:
        RunError: another line is damaged.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            row = json.loads(line or "{}")
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise RunError(f"{path}, line {number} is no row: {line[:40]!r}; remove that line")
        rows += [row] if row else []
    return rows


def as_lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def of_split(rows: Iterable[Row], split: str) -> list[Row]:
    return [row for row in rows if row["split"] == split]
