"""What the folders of runs and sweeps hold, checked for what a report can say of them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import RunError
from scaling.experiments.board import read_fits
from scaling.experiments.curves import Fit
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row, read_rows
from scaling.train.report import Summary, summarise

NEEDED = {"train": ("step", "loss", "tokens_per_s", "peak_bytes"), "validation": ("step", "loss")}
"""Without these a run's row says nothing."""


@dataclass
class Source:
    """A run, or a sweep."""

    folder: RunFolder
    rows: list[Row]
    remarks: list[str] = field(default_factory=list)
    """What a reader should know: what is missing or was left out."""
    name: str = field(init=False)
    """Under which it is shown: the folder's."""

    def __post_init__(self) -> None:
        self.name = self.folder.path.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.folder.config()

    @cached_property
    def environment(self) -> dict[str, Any]:
        return self.folder.environment()

    @cached_property
    def status(self) -> dict[str, Any]:
        return self.folder.status()

    @property
    def state(self) -> str:
        return self.status.get("state", "never started")

    @property
    def configuration(self) -> str:
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)

    @property
    def versions(self) -> str:
        versions: Mapping[str, Any] = self.environment.get("versions") or {}
        known = [f"{name} {version}" for name, version in versions.items() if version]
        return ", ".join([f"python {self.environment.get('python', '?')}", *known])

    @property
    def machine(self) -> str:
        said = self.environment
        cores = f"{said.get('cores', '?')} cores of {said.get('cpu', 'an unknown processor')}"
        return said.get("gpu") or cores

    @cached_property
    def plan(self) -> str | None:
        """What `plan output=` wrote into the folder."""
        path = self.folder.path / "plan.json"
        try:
            return json.loads(path.read_text())["text"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error!r}); python -m launch plan ... "
                           f"output={path} writes it again") from error  # fmt: skip


@dataclass
class Run(Source):
    """One that was trained."""

    evaluations: list[Row] = field(default_factory=list)

    @property
    def summary(self) -> Summary:
        """From the rows alone, whatever became of the run."""
        step = max((row["step"] for row in self.rows), default=0)
        return summarise(self.folder.path, self.rows, step, self.state)


@dataclass
class Sweep(Source):
    """One that was measured."""

    fits: list[Fit] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, str]:
        """Point -> why there is nothing."""
        wrong = (row for row in self.rows if row.get("status", "ok") != "ok")
        return {str(row.get("point", "?")): str(row["status"]) for row in wrong}


def read_source(path: Path) -> Run | Sweep:
    """A run or a sweep, by what its configuration says.

    Raises:
        RunError: it is neither, or a file of it is damaged.
    """
    folder = RunFolder(path)
    config = folder.config()
    rows = folder.rows()
    if "bench" in config:
        raise RunError(f"{path} is a bench: {path}/summary.md and figure.png show it; a report "
                       "takes runs and sweeps")  # fmt: skip
    if "task" in config and "train" in config:
        return _run(folder, rows)
    sweep = Sweep(folder, rows, fits=read_fits(folder.path))
    if not rows:
        sweep.remarks.append("No point has been measured yet.")
    if sweep.failed:
        said = "; ".join(f"{point}: {why}" for point, why in sweep.failed.items())
        sweep.remarks.append(f"Not measured: {said}.")
    return sweep


def _run(folder: RunFolder, rows: list[Row]) -> Run:
    good = [row for row in rows if _tells(row)]
    run = Run(folder, good, evaluations=read_rows(folder.path / "evaluations.jsonl"))
    if not good:
        run.remarks.append("No step has been recorded yet.")
    if len(good) < len(rows):
        left = f"{len(rows) - len(good)} of {len(rows)} rows were left out"
        run.remarks.append(f"{left}: they lack a column, or a value is not finite.")
    if run.state in ("failed", "interrupted", "running"):
        error = run.status.get("error")
        run.remarks.append(f"The run is {run.state}{f': {error}' if error else ''}.")
    return run


def _tells(row: Row) -> bool:
    values = [row.get(key) for key in NEEDED.get(row.get("split", ""), ("step",))]
    return "split" in row and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
