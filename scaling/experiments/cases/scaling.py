"""How a training step scales: strong (one length on more ranks) and weak (tokens a rank fixed)."""

import math
import os
import statistics
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge

from scaling.execution import Execution
from scaling.experiments.cases.train_step import StepCase, measure_step
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Checked, Count, Counts
from scaling.parallel.collectives import Group, group_size
from scaling.runs.identity import NotIdentity
from scaling.runs.rows import Row

CROWDED = ", oversubscribed"
"""Marks what was measured with more threads than cores."""
GOALS = {"strong: 2 ranks, speed-up over one": (">=", 1.7)}


@dataclass
class ScalingOptions(Checked):
    """
    Args:
        model: section like `model`.
        strong_lengths: N, tokens of one sequence.
        strong_sp: ranks, beside one.
        weak_tokens: tokens of each rank.
        weak_sp: ranks, beside one.
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        rounds: of fresh processes, every point once in each; medians over rounds count.
        steps: timed steps of a process; their median counts.
        execution: how the model runs.
        length: of the point that a process measures; its points choose it.
    """

    model: dict[str, Any]
    strong_lengths: Annotated[Counts, NotIdentity()]
    strong_sp: Annotated[Counts, NotIdentity()]
    weak_tokens: Annotated[int, Ge(2), NotIdentity()]  # an FFT of 1 is no work
    weak_sp: Annotated[Counts, NotIdentity()]
    vectors: int = 1
    scalars: int = 4
    rounds: Annotated[Count, NotIdentity()] = 3
    steps: Count = 3
    execution: Execution = field(default_factory=Execution)
    length: int = 0

    def strong(self) -> list[tuple[int, int]]:
        """(N, sp)."""
        return [(n, sp) for n in sorted(self.strong_lengths) for sp in sorted({1, *self.strong_sp})]

    def weak(self) -> list[tuple[int, int]]:
        return [(self.weak_tokens * sp, sp) for sp in sorted({1, *self.weak_sp})]


def scaling_rows(case: ScalingOptions, group: Group, device: torch.device) -> list[Row]:
    """Step and exposed communication of one point."""
    cost = measure_step(
        StepCase(
            model=case.model,
            length=case.length,
            execution=case.execution,
            vectors=case.vectors,
            scalars=case.scalars,
            steps=case.steps,
        ),
        group,
        device,
    )
    ranks = group_size(group)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    crowded = device.type == "cpu" and ranks * torch.get_num_threads() > cores
    mark = CROWDED if crowded else ""
    return [
        row(f"step{mark}", ranks, case.length, cost.step_s),
        row(f"exposed communication{mark}", ranks, case.length, cost.comm_s),
    ]


def _points(case: ScalingOptions) -> list[Point]:
    """Rounds of all points, so that whatever else the machine does meets all alike."""
    points = dict.fromkeys([*case.strong(), *case.weak()])
    return [
        Point(f"round{number}_N{length}_sp{sp}", sp, replace(case, length=length))
        for number in range(1, case.rounds + 1)
        for length, sp in points
    ]


def _conclude(case: ScalingOptions, rows: list[Row]) -> tuple[list[Row], str]:
    def median(what: str, length: int, sp: int) -> float:
        return statistics.median(
            r["value"]
            for r in rows
            if r["case"].startswith(what) and (r["length"], r["sp"]) == (length, sp)
        )

    crowded = {r["sp"] for r in rows if r["case"].endswith(CROWDED)}
    found = []

    def add(title: str, length: int, sp: int, ratio: float, value: float | None = None) -> None:
        mark = CROWDED if sp in crowded else ""
        seconds = median("step", length, sp)
        found.append(row(title + mark, sp, length, seconds if value is None else value, "s", ratio))

    for length, sp in case.strong():
        if sp > 1:
            speed_up = median("step", length, 1) / median("step", length, sp)
            add(f"strong: {sp} ranks, speed-up over one", length, sp, speed_up)
    for length, sp in case.weak():
        if sp > 1:
            efficiency = median("step", case.weak_tokens, 1) / median("step", length, sp)
            ideal = math.log2(case.weak_tokens) / math.log2(length)
            add("weak: efficiency", length, sp, efficiency)
            add("weak: efficiency, log-corrected", length, sp, efficiency / ideal)
    for length, sp in dict.fromkeys([*case.strong(), *case.weak()]):
        if sp > 1:
            waiting = median("exposed communication", length, sp)
            share = waiting / median("step", length, sp)
            add("exposed communication / step", length, sp, share, waiting)
    return found, (
        "Strong: T(1, N) / T(P, N). Weak: T(1, N) / T(P, P N) at the same tokens a rank; corrected:"
        " over log2(N) / log2(P N), the ideal, as an FFT's work grows. Times are medians over"
        f" {case.rounds} rounds of fresh processes."
    )


BENCH = Experiment(ScalingOptions, _points, scaling_rows, GOALS, _conclude)
