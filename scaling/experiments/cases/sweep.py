"""What a training step costs over lengths and ranks; every point has processes, and memory, of its
own."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from scaling.experiments.cases.train_step import step_cost
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import SweepOptions
from scaling.observe.sinks import tensorboard_command
from scaling.runs.rows import Row

SCALARS = ("tokens_per_s", "step_s", "comm_s", "comm_bytes", "all_to_alls", "peak_bytes")
"""Shown by TensorBoard."""
COLUMNS = (  # case, unit, column, units of the column in one
    ("all ranks together", "tokens/s", "tokens_per_s", 1),
    ("step", "s", "step_s", 1),
    ("exchanges of a step", "all-to-alls", "all_to_alls", 1),
    ("sent per rank and step", "MB", "comm_bytes", 1e6),
    ("peak memory per rank", "MB", "peak_bytes", 1e6),
    ("of that, before the first step", "MB", "base_bytes", 1e6),
)


@dataclass(kw_only=True)
class Sweep(SweepOptions, Experiment):
    """Rows are whole steps, and tell something alone."""

    independent = True
    table = "results.csv"
    figure = "sweep.png"

    def points(self) -> Iterator[Point]:
        lengths, sp = sorted(set(self.lengths)), sorted(set(self.sp))
        return (Point(length=n, ranks=ranks) for n in lengths for ranks in sp)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        yield step_cost(self, self.model, point.length, device, self.warmup_steps, self.steps)

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        rows = sorted(rows, key=lambda each: (each["sp"], each["length"]))
        found = [
            row(case, each[column] / units, unit, sp=each["sp"], length=each["length"])
            for case, unit, column, units in COLUMNS
            for each in rows
        ]
        return found, f"One training step of {self.model['name']}, {self.rows} sequence(s)."

    def show(self, rows: list[Row], folder: Path) -> str:
        """TensorBoard: one run a number of ranks, the sequence length as its step."""
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        for sp in {each["sp"] for each in rows}:
            with SummaryWriter(str(folder / "tensorboard" / f"sp={sp}")) as writer:
                for each in (each for each in rows if each["sp"] == sp):
                    for name in SCALARS:
                        time = each.get("time")
                        writer.add_scalar(f"sweep/{name}", each[name], each["length"], time)
        return f"curves    {tensorboard_command(folder.parent)}"
