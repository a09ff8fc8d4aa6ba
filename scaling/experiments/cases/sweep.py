"""What a training step costs over lengths and ranks; every point has processes, and memory, of its
own."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from scaling.experiments.cases.train_step import step_cost
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import SweepOptions
from scaling.runs.rows import Row

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
