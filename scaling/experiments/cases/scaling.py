"""How a training step scales: strong (one length on more ranks) and weak (tokens a rank fixed)."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from statistics import median
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge

from scaling.experiments.cases.train_step import step_cost
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count, Selection, StepOptions
from scaling.experiments.timing import available_cores
from scaling.runs.identity import NotIdentity
from scaling.runs.rows import Row

CROWDED = ", oversubscribed"
"""Marks what was measured with more threads than cores."""


@dataclass(kw_only=True)
class Scaling(StepOptions, Experiment):
    """
    Args:
        model: section like `model`.
        strong_lengths: N, tokens of one sequence.
        strong_sp: ranks, beside one.
        weak_tokens: tokens of each rank.
        weak_sp: ranks, beside one.
        rounds: of fresh processes, every point once in each; medians over rounds count.
        steps: timed steps of a process; their median counts.
    """

    model: dict[str, Any]
    strong_lengths: Selection
    strong_sp: Selection
    weak_tokens: Annotated[int, Ge(2), NotIdentity()]  # an FFT of 1 is no work
    weak_sp: Selection
    rounds: Annotated[Count, NotIdentity()] = 3
    steps: Count = 3

    goals: ClassVar = {"strong: 2 ranks, speed-up over one": (">=", 1.7)}

    def points(self) -> Iterator[Point]:
        """Rounds of all points, so that whatever else the machine does meets all alike."""
        alone = [(n, 1) for n in (*sorted(self.strong_lengths), self.weak_tokens)]
        for number in range(1, self.rounds + 1):
            for length, sp in dict.fromkeys([*alone, *self._strong(), *self._weak()]):
                yield Point(f"round{number}", length=length, ranks=sp)

    def _strong(self) -> list[tuple[int, int]]:
        """N and ranks, beside one."""
        return [(n, sp) for n in sorted(self.strong_lengths) for sp in _several(self.strong_sp)]

    def _weak(self) -> list[tuple[int, int]]:
        return [(self.weak_tokens * sp, sp) for sp in _several(self.weak_sp)]

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """Step and exposed communication."""
        cost = step_cost(self, self.model, point.length, device, warmup_steps=1, steps=self.steps)
        threads = point.ranks * torch.get_num_threads()
        crowded = device.type == "cpu" and threads > available_cores()
        mark = CROWDED if crowded else ""
        yield row(f"step{mark}", cost["step_s"])
        yield row(f"exposed communication{mark}", cost["comm_s"])

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        seconds = defaultdict(list)
        for each in rows:
            what = each["case"].removesuffix(CROWDED)
            seconds[what, each["length"], each["sp"]].append(each["value"])
        times = {key: median(values) for key, values in seconds.items()}
        crowded = {each["sp"] for each in rows if each["case"].endswith(CROWDED)}
        found = []

        def add(case: str, length: int, sp: int, ratio: float, value: float) -> None:
            mark = CROWDED if sp in crowded else ""
            found.append(row(case + mark, value, "s", ratio, sp=sp, length=length))

        for length, sp in self._strong():
            step = times["step", length, sp]
            speed_up = times["step", length, 1] / step
            add(f"strong: {sp} ranks, speed-up over one", length, sp, speed_up, step)
        for length, sp in self._weak():
            step = times["step", length, sp]
            efficiency = times["step", self.weak_tokens, 1] / step
            ideal = log2(self.weak_tokens) / log2(length)
            add("weak: efficiency", length, sp, efficiency, step)
            add("weak: efficiency, log-corrected", length, sp, efficiency / ideal, step)
        for length, sp in dict.fromkeys([*self._strong(), *self._weak()]):
            waiting = times["exposed communication", length, sp]
            share = waiting / times["step", length, sp]
            add("exposed communication / step", length, sp, share, waiting)
        return found, (
            "Strong: T(1, N) / T(P, N). Weak: T(1, N) / T(P, P N) at the same tokens a rank;"
            " corrected: over log2(N) / log2(P N), the ideal, as an FFT's work grows. Times are"
            f" medians over {self.rounds} rounds of fresh processes."
        )


def _several(sp: list[int]) -> list[int]:
    return sorted(set(sp) - {1})
