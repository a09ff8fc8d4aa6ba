"""How a training step scales: strong (one length on more ranks) and weak (tokens a rank fixed)."""

import math
import os
import statistics
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data_pipeline.errors import ConfigError
from scaling.experiments.cases.train_step import StepCase, measure_step
from scaling.experiments.family import Bench, Part, Row, check_positive, row
from scaling.parallel.collectives import Group, group_size

CROWDED = ", oversubscribed"
"""Marks what was measured with more threads than cores."""
GOALS = {"strong: 2 ranks, speed-up over one": (">=", 1.7)}


@dataclass
class ScalingCase:
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
        execution: how the model runs: fields of `Execution`.
        length: of the point that a process measures; the bench's parts choose it.
    """

    model: dict[str, Any]
    strong_lengths: list[int]
    strong_sp: list[int]
    weak_tokens: int
    weak_sp: list[int]
    vectors: int = 1
    scalars: int = 4
    rounds: int = 3
    steps: int = 3
    execution: dict[str, Any] = field(default_factory=dict)
    length: int = 0

    def __post_init__(self) -> None:
        check_positive(
            strong_lengths=self.strong_lengths,
            strong_sp=self.strong_sp,
            weak_tokens=self.weak_tokens,
            weak_sp=self.weak_sp,
            rounds=self.rounds,
            steps=self.steps,
        )
        if self.weak_tokens == 1:
            raise ConfigError("bench.weak_tokens=1: must be at least 2, an FFT of 1 is no work")

    def strong(self) -> list[tuple[int, int]]:
        """(N, sp)."""
        return [(n, sp) for n in sorted(self.strong_lengths) for sp in sorted({1, *self.strong_sp})]

    def weak(self) -> list[tuple[int, int]]:
        return [(self.weak_tokens * sp, sp) for sp in sorted({1, *self.weak_sp})]


def scaling_rows(case: ScalingCase, group: Group, device: torch.device) -> list[Row]:
    """Step and exposed communication of one point."""
    cost = measure_step(
        StepCase(
            case.model,
            case.length,
            case.execution,
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


def _parts(case: ScalingCase) -> list[Part]:
    """Rounds of all points, so that whatever else the machine does meets all alike."""
    points = dict.fromkeys([*case.strong(), *case.weak()])
    return [
        Part(f"round{number}_N{length}_sp{sp}", sp, replace(case, length=length))
        for number in range(1, case.rounds + 1)
        for length, sp in points
    ]


def _conclude(case: ScalingCase, rows: list[Row]) -> tuple[list[Row], str]:
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


BENCH = Bench(ScalingCase, _parts, scaling_rows, GOALS, _conclude)
