"""What a training step costs over lengths and ranks; every point has processes, and memory, of its
own."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from scaling.experiments.cases.train_step import StepCase, measure_step
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import SweepOptions
from scaling.observe.sinks import tensorboard_command
from scaling.parallel.collectives import Group
from scaling.runs.rows import Row

SCALARS = ("tokens_per_s", "step_s", "comm_s", "comm_bytes", "all_to_alls", "peak_bytes")
"""Shown by TensorBoard."""
COLUMNS = (  # case, unit, value
    ("all ranks together", "tokens/s", lambda row: row["tokens_per_s"]),
    ("step", "s", lambda row: row["step_s"]),
    ("exchanges of a step", "all-to-alls", lambda row: row["all_to_alls"]),
    ("sent per rank and step", "MB", lambda row: row["comm_bytes"] / 1e6),
    ("peak memory per rank", "MB", lambda row: row["peak_bytes"] / 1e6),
    ("of that, before the first step", "MB", lambda row: row["base_bytes"] / 1e6),
)


def _points(options: SweepOptions) -> list[Point]:
    return [
        Point(f"N{n}_sp{sp}", sp, replace(options, lengths=[n], sp=[sp]), {"length": n, "sp": sp})
        for n in sorted(set(options.lengths))
        for sp in sorted(set(options.sp))
    ]


def _measure(options: SweepOptions, group: Group, device: torch.device) -> list[Row]:
    values = asdict(options) | {"execution": options.execution, "length": options.lengths[0]}
    del values["lengths"], values["sp"]
    return [asdict(measure_step(StepCase(**values), group, device))]


def _conclude(options: SweepOptions, rows: list[Row]) -> tuple[list[Row], str]:
    found = [
        row(case, each["sp"], each["length"], value(each), unit)
        for case, unit, value in COLUMNS
        for each in sorted(rows, key=lambda each: (each["sp"], each["length"]))
    ]
    return found, f"One training step of {options.model['name']}, {options.rows} sequence(s)."


def _show(rows: list[Row], folder: Path) -> str:
    """TensorBoard: one run a number of ranks, the sequence length as its step."""
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    for sp in sorted({each["sp"] for each in rows}):
        with SummaryWriter(str(folder / "tensorboard" / f"sp={sp}")) as writer:
            for each in rows:
                for name in SCALARS if each["sp"] == sp else ():
                    value, time = each[name], each.get("time")
                    writer.add_scalar(f"sweep/{name}", value, each["length"], walltime=time)
    return f"curves    {tensorboard_command(folder.parent)}"


SWEEP = Experiment(
    SweepOptions,
    _points,
    _measure,
    conclude=_conclude,
    independent=True,
    show=_show,
    table="results.csv",
    figure="sweep.png",
)
