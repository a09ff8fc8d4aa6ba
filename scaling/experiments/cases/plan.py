"""What `plan` foresees beside what is measured, on points that did not calibrate it."""

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter

from scaling.cost.machine import measured_machine
from scaling.cost.planner import Job, memory_by_part, process_bytes
from scaling.cost.time import step_seconds
from scaling.cost.trace import random_batch
from scaling.experiments.cases.machine import Machine
from scaling.experiments.cases.train_step import training_step
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Positive, Selection, StepOptions
from scaling.experiments.timing import now
from scaling.models import build
from scaling.observe.memory import peak_bytes, reset_peak
from scaling.observe.metrics import WARMUP_STEPS
from scaling.parallel.collectives import global_maxima
from scaling.runs.rows import Row

LEAST_STEPS = 4
LIBRARIES_TOKENS = 64
"""Of the step that loads what a rank loads."""
FORESEEN, MEASURED = "foreseen", "measured"


@dataclass(kw_only=True)
class Plan(StepOptions, Experiment):
    """
    Args:
        machine: the bench of the machine that calibrates it, measured in the same run.
        models: sections like `model`, under names for the table.
        lengths: N, tokens of the one sequence of a step.
        longest: of some models, by name: no longer N.
        sp: ranks that share it.
        spread: a point is measured until half of its steps lie this close to their median, or
        seconds: for so long.
    """

    machine: dict[str, Any]
    models: dict[str, dict[str, Any]]
    lengths: Selection
    longest: dict[str, int]
    sp: Selection
    spread: Positive = 0.05
    seconds: Positive = 120.0

    goals: ClassVar = {
        "memory, worst error": ("<=", 0.05),
        "memory, most too low": ("<=", 0.03),
        "step, median error": ("<=", 0.10),
        "step, worst error": ("<=", 0.20),
    }

    def _calibration(self) -> Machine:
        options = {key: x for key, x in self.machine.items() if key != "name"}
        return TypeAdapter(Machine).validate_python(options)

    def points(self) -> Iterator[Point]:
        """Each prediction before its measurements."""
        yield from self._calibration().points()
        for name in self.models:
            for n in sorted(self.lengths):
                if n <= self.longest.get(name, n):
                    yield Point(FORESEEN, name, n)
                    for ranks in sorted(self.sp):
                        yield Point(MEASURED, name, n, ranks)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        if point.part == FORESEEN:
            return self._foresee(point.side, point.length, device)
        if point.part == MEASURED:
            return self._measure(point.side, point.length, device)
        return self._calibration().measure(point, device)

    def _job(self, name: str, length: int, ranks: int, device: str) -> Job:
        model = build(**self.models[name], vectors=self.vectors, scalars=self.scalars)
        token = sum(x.nbytes for x in random_batch(model, self.rows, 1).tensors.values())
        data = 2 * token * -(-length // ranks)  # as it came, and in the model's layout
        return Job(model, self.execution, length, self.rows, 1, ranks, ranks, 0, data, device)

    def _foresee(self, name: str, length: int, device: torch.device) -> Iterator[Row]:
        """Memory; time follows when the machine is known."""
        process = (0, 0)
        if device.type == "cpu":
            training_step(self, self.models[name], LIBRARIES_TOKENS, device)()
            process = process_bytes(self._job(name, length, 1, "cpu"))
        for ranks in sorted(self.sp):
            job = self._job(name, length, ranks, device.type)
            parts = memory_by_part(job, job.trace(), process)
            yield row(f"{name}: memory, {FORESEEN}", sum(parts.values()), "B", sp=ranks)

    def _measure(self, name: str, length: int, device: torch.device) -> Iterator[Row]:
        step = training_step(self, self.models[name], length, device)
        gc.collect()
        reset_peak(device)
        for _ in range(WARMUP_STEPS):
            step()
        times, wide = [], True
        while (wide and sum(times) < self.seconds) or len(times) < LEAST_STEPS:
            start = now(device)
            step()
            times.append(*global_maxima(now(device) - start, device=device))
            if len(times) >= LEAST_STEPS:
                low, middle, high = quantiles(times, n=4)
                wide = high - low > self.spread * middle
        peak = int(*global_maxima(peak_bytes(device), device=device))
        low, _, high = quantiles(times, n=4)
        yield row(f"{name}: step, {MEASURED}", median(times))
        yield row(f"{name}: spread", (high - low) / median(times), "relative")
        yield row(f"{name}: memory, {MEASURED}", peak, "B")

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        """Foreseen over measured, point by point, and the errors."""
        machine = measured_machine(rows, asdict(self._calibration()), "this machine")
        value = {(each["case"], each["length"], each["sp"]): each["value"] for each in rows}
        found: dict[str, list[tuple[float, Row]]] = {"memory": [], "step": []}
        wide = []
        for case, n, sp in value:
            name, _, what = case.partition(": ")
            if name not in self.models or what != "spread":
                continue
            if value[case, n, sp] > self.spread:
                wide.append(f"{name} at {n:,} on {sp} ({value[case, n, sp]:.0%})")
            job = self._job(name, n, sp, machine.device)
            foreseen = {
                "memory": value[f"{name}: memory, {FORESEEN}", n, sp],
                "step": sum(step_seconds(job, job.trace(), machine).values()),
            }
            for kind, unit in (("memory", "B"), ("step", "s")):
                ratio = foreseen[kind] / value[f"{name}: {kind}, {MEASURED}", n, sp]
                title = f"{name}: {kind}, {FORESEEN} / {MEASURED}"
                labels = {"sp": sp, "length": n}
                found[kind].append((ratio - 1, row(title, foreseen[kind], unit, ratio, **labels)))
        said = [_worst(kind, some) for kind, some in found.items()]
        said += [f"Spread above {self.spread:.0%}: {', '.join(wide)}."] * bool(wide)
        memory, step = ([error for error, _ in some] for some in found.values())
        errors = {
            "memory, worst error": max(map(abs, memory)),
            "memory, most too low": max(0.0, -min(memory)),
            "step, median error": median(map(abs, step)),
            "step, worst error": max(map(abs, step)),
        }
        concluded = [each for some in found.values() for _, each in some]
        # Of all points together, so without a length.
        concluded += [row(case, x, "relative", sp=0, length=0) for case, x in errors.items()]
        return concluded, "\n".join(f"- {line}" for line in said)


def _worst(kind: str, some: list[tuple[float, Row]]) -> str:
    error, worst = max(some, key=lambda each: abs(each[0]))
    name = worst["case"].partition(":")[0]
    return f"Worst {kind}: {name}, N = {worst['length']:,}, sp = {worst['sp']}: {error:+.1%}."
