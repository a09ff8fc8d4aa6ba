"""Measure training over lengths, ranks and more: python -m launch sweep [sweep=first_light] ...

A cell is a combination of lengths, sp, dp and the values of the grid's keys, such as
grid.model.hidden=[8,16]. Every repeat of a cell runs in fresh processes, so that memory is its own;
a rerun measures only what is missing or failed, and results of other cells stay. count=true says
how many there are, point=3 measures one; several processes may share a sweep's folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from math import inf
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from data_pipeline.errors import OptionError
from launch.config.check import FolderName, build, check_choices
from launch.config.compose import command_line, compose
from launch.config.settings import Config, Model
from launch.measure import ENTRY
from launch.train import task_and_model
from scaling.experiments.options import Positive, Running, SweepOptions
from scaling.runs.folder import RunFolder
from scaling.runs.identity import Identity, NotIdentity
from scaling.runs.rows import Row, of_split

if TYPE_CHECKING:
    from scaling.experiments.cases.sweep import Sweep
    from scaling.experiments.experiment import Point


@dataclass(kw_only=True)
class SweepConfig(SweepOptions, Running):
    """Results live in <sweeps>/<name>."""

    name: Annotated[FolderName, NotIdentity()]
    model: Model
    sweeps: Annotated[str, NotIdentity()] = "sweeps"
    timeout_s: Annotated[Positive, NotIdentity()] = 300.0
    point: Annotated[Annotated[int, Ge(0)] | None, NotIdentity()] = None
    """Measure this one alone, counted from 0: a job of an array."""
    count: Annotated[bool, NotIdentity()] = False
    """Print how many points there are, and measure none."""


def main(arguments: list[str]) -> None:
    """Measure what is missing, then draw."""
    config, overrides = command_line(arguments, "sweep", SweepConfig)
    from scaling.experiments import ranks
    from scaling.experiments.harness import run_experiment

    sweep = sweep_of(config)
    points = list(sweep.points())
    if config.point is not None and config.point >= len(points):
        raise OptionError("point", config.point, f"must be below {len(points)}: so many there are")
    if config.count:
        print(len(points))
        return
    if sweep.kind == "step":
        for values in {repr(point.values): point.values for point in points}.values():
            check_cell(config, asdict(sweep), values)

        def measure(point: "Point", place: Path) -> tuple[str, list[Row]]:
            return ranks.measure(
                "sweep", asdict(sweep.of_cell(point)), point, place, running=config, entry=ENTRY
            )

    else:
        runs = {point.name: Run(config.train, point) for point in points}
        measure = partial(measure_run, runs, config)

    def labelled(point: "Point", place: Path) -> tuple[str, list[Row]]:
        status, rows = measure(point, place)
        return status, [sweep.labels(point, config) | row for row in rows or [{}]]

    identity = Identity({"": (SweepConfig, asdict(config))})
    command = ["python", "-m", "launch", "sweep", *overrides]
    run_experiment(sweep, labelled, config, identity, "sweeps", command, config.point)


def sweep_of(config: SweepConfig) -> "Sweep":
    """The experiment that a configuration describes."""
    from scaling.experiments.cases.sweep import Sweep

    return Sweep(**{each.name: getattr(config, each.name) for each in fields(Sweep)})


def check_cell(config: SweepConfig, options: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuses what a step of these values cannot be, before anything is measured."""
    from scaling.experiments.grid import with_values

    check_choices(build(SweepConfig, asdict(config) | with_values(options, values)), {})


class Run:
    """A cell of kind=train: what `train` is told, what is known before and what is read after."""

    def __init__(self, train: Sequence[str], point: "Point") -> None:
        from scaling.experiments.grid import BUDGETS

        values = dict(point.values)
        self._budgets = {key: values.pop(key) for key in BUDGETS if key in values}
        model = [f"model={values.pop('model.name')}"] if "model.name" in values else []
        grid = [f"{key}={value}" for key, value in values.items()]
        parallel = [f"parallel.dp={point.dp}", f"parallel.sp={point.sp}"]
        self.overrides = [*train, *model, *grid, *parallel]
        self._config = compose("train", self.overrides, Config)

    @cached_property
    def labels(self) -> Row:
        """The columns that are known before; flops are of a step."""
        config = self._config
        task, model = task_and_model(config)
        length = float(task.lengths("train").mean())
        work = model.work(round(length))
        batch = config.train.batch_size * length
        return {
            "model": config.model["name"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "engine": config.engine.name,
            "zero_stage": config.engine.zero_stage * (config.engine.name == "deepspeed"),
            "length": length,
            "rows": config.train.micro_batch_size,
            "flops": work.flops * batch,
            "fft_flops": work.fft_flops * batch,
        }

    @property
    def steps(self) -> int:
        """As told, or of the budget."""
        if not self._budgets:
            return self._config.train.steps
        tokens = self._config.train.batch_size * self.labels["length"]
        wanted = [
            self._budgets.get("budget.tokens", inf) / tokens,
            self._budgets.get("budget.flops", inf) / self.labels["flops"],
        ]
        return max(round(min(wanted)), 1)

    def row(self, run: RunFolder) -> Row:
        """What a finished run tells."""
        summary = run.status().get("summary") or {}
        rows = of_split(run.rows(), "train")
        warm = rows[1:] or rows

        def mean(name: str) -> float:
            return fmean(row[name] for row in warm)

        tokens = fmean(row["tokens"] for row in rows) * summary["steps"]
        transfer, ranks = mean("transfer_s"), run.environment()["world"]
        return self.labels | {
            "step_s": mean("step_s"),
            "tokens_per_s": summary["tokens_per_s"],
            "tokens_per_s_rank": summary["tokens_per_s"] / ranks,
            "comm_s": mean("comm_s"),
            "comm_hidden": max(1 - mean("comm_s") / transfer, 0.0) if transfer else None,
            "comm_bytes": mean("comm_bytes"),
            "peak_bytes": summary["peak_bytes"],
            "data_wait_s": mean("data_wait_s"),
            "loss": summary["validation_loss"],
            "steps": summary["steps"],
            "tokens": tokens,
            "train_flops": self.labels["flops"] * summary["steps"],
            "seconds": mean("step_s") * summary["steps"],
        }


def measure_run(
    runs: Mapping[str, Run], config: SweepConfig, point: "Point", place: Path
) -> tuple[str, list[Row]]:
    """Trains a cell, or goes on with it; "ok" and its row, or why there is none."""
    from scaling.experiments.ranks import run_ranks

    run = runs[point.name]
    steps = f"train.steps={run.steps}"
    told = [*run.overrides, steps, f"device={config.device}", f"runs={place}", "name=run"]
    command = ["-m", "launch.train", *told]
    status = run_ranks(point.ranks, command, place / "log.txt", config)
    return status, [run.row(RunFolder(place / "run"))] if status == "ok" else []
