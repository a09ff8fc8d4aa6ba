"""What saving a checkpoint costs training that goes on meanwhile."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch

from data_pipeline.stream.stream import Stream
from scaling.checkpoint.checkpoint import Checkpoints
from scaling.experiments.cases.train_step import training_step
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count, Selection, StepOptions
from scaling.experiments.timing import now
from scaling.runs.rows import Row

STEPS = 5
"""That follow a save."""
HELD_UP = "held up by a save / written before going on"
SLOWER = f"{STEPS} steps while it is written / without"


@dataclass(kw_only=True)
class Checkpoint(StepOptions, Experiment):
    """
    Args:
        model: a section like `model`.
        lengths: N, tokens of the one sequence of a step.
        sp: ranks that share it.
        rounds: of both sides, in turn; medians count.
    """

    model: dict[str, Any]
    lengths: Selection
    sp: Selection
    rounds: Count = 5

    goals: ClassVar = {HELD_UP: ("<=", 0.1), SLOWER: ("<=", 1.1)}

    def points(self) -> Iterator[Point]:
        return (Point(length=n, ranks=sp) for sp in sorted(self.sp) for n in sorted(self.lengths))

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """Steps alone, a save that is waited for, and one that is not, in turn."""
        step = training_step(self, self.model, point.length, device)
        step()
        times: dict[str, list[float]] = {}

        def timed(name: str, began: float) -> float:
            ended = now(device)
            times.setdefault(name, []).append(ended - began)
            return ended

        with TemporaryDirectory(prefix="longfold-") as folder:
            checkpoints, place = Checkpoints(Path(folder), keep_last=1), _Place()
            for number in range(self.rounds + 1):  # the first does not count
                began = now(device)
                for _ in range(STEPS):
                    step()
                began = timed("alone", began)
                checkpoints.save(2 * number, step.engine, place, {})
                checkpoints.wait()
                began = timed("waited", began)
                checkpoints.save(2 * number + 1, step.engine, place, {})
                began = timed("held up", began)
                for _ in range(STEPS):
                    step()
                timed("meanwhile", began)
                checkpoints.wait()
        found = {name: median(some[1:]) for name, some in times.items()}
        size = sum(p.numel() for p in step.engine.parameters.values())
        yield row("parameters", size, "")
        yield row(HELD_UP, found["held up"], "s", found["held up"] / found["waited"])
        yield row(SLOWER, found["meanwhile"], "s", found["meanwhile"] / found["alone"])


class _Place(Stream):
    """No data's, which is nowhere."""

    def __init__(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}
