"""What training costs over lengths, ranks and whatever a grid names; every cell has processes, and
memory, of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import log2
from statistics import median
from typing import Any

import torch
from pydantic import TypeAdapter

from data_pipeline.errors import LongfoldError
from scaling.cost.machine import THIS, measured_rates
from scaling.experiments.cases.train_step import step_cost
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.grid import axes, cells, with_values
from scaling.experiments.options import Running, SweepOptions
from scaling.experiments.timing import available_cores
from scaling.models import build
from scaling.observe.memory import hardware
from scaling.runs.environment import describe_environment
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row

STEP = (  # case, unit, column, units of the column in one
    ("all ranks together", "tokens/s", "tokens_per_s", 1),
    ("step", "s", "step_s", 1),
    ("computed", "GFLOP/s", "flops_per_s", 1e9),
    ("of that, transforms", "GFLOP/s", "fft_flops_per_s", 1e9),
    ("share of the measured peaks of matrix products", "", "peak_share", 1),
    ("waiting in exchanges", "s", "comm_s", 1),
    ("exchanges of a step", "all-to-alls", "all_to_alls", 1),
    ("sent per rank and step", "MB", "comm_bytes", 1e6),
    ("peak memory per rank", "MB", "peak_bytes", 1e6),
    ("of that, before the first step", "MB", "base_bytes", 1e6),
)
RUN = (
    ("last validation", "of the trivial answer", "loss", 1),
    ("training", "s", "seconds", 1),
    ("all ranks together", "tokens/s", "tokens_per_s", 1),
)


@dataclass(kw_only=True)
class Sweep(SweepOptions, Experiment):
    """Rows are whole steps or whole runs, and tell something alone; columns.py says what."""

    independent = True

    def points(self) -> Iterator[Point]:
        return cells(self)

    def of_cell(self, point: Point) -> "Sweep":
        """With the values of the grid in their places."""
        return TypeAdapter(Sweep).validate_python(with_values(asdict(self), point.values))

    def labels(self, point: Point, running: Running) -> Row:
        """What is known of a point, also of one that fails."""
        environment = describe_environment(**hardware())
        cores, gpu = available_cores(), environment["gpu"] if running.device != "cpu" else None
        versions = environment["versions"]
        return {
            "kind": self.kind,
            "hardware": gpu or f"{cores} cores of {environment['cpu']}",
            "versions": f"torch {versions['torch']}, longfold {versions['longfold']}",
            "threads": running.threads,
            "oversubscribed": gpu is None and point.ranks * running.threads > cores,
            "dp": point.dp,
            "ranks": point.ranks,
            "repeat": point.repeat,
        }

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        length = point.length
        model = build(**self.model, vectors=self.vectors, scalars=self.scalars)
        work = model.work(length, point.sp)
        tokens = self.rows * length
        yield {
            "model": self.model["name"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "engine": self.engine.name,
            "zero_stage": self.engine.zero_stage * (self.engine.name == "deepspeed"),
            "rows": self.rows,
            **step_cost(
                self,
                self.model,
                length,
                device,
                self.warmup_steps,
                self.steps,
                point.dp,
                self.engine,
            ),
            "formula_bytes": work.exchange_bytes * tokens / point.sp,
            "flops": work.flops * tokens * point.dp,
            "fft_flops": work.fft_flops * tokens * point.dp,
            "data_wait_s": 0.0,
        }

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        """Medians over repeats, and how well ranks are used."""
        keys = [*axes(self.grid)]
        groups: dict[tuple, list[Row]] = {}
        for each in sorted(rows, key=lambda each: (each["sp"], each.get("dp", 1), each["length"])):
            dp = each.get("dp", 1)
            words = [f"{key.rpartition('.')[2]}={each[key]}" for key in keys if key in each]
            label = ", ".join([*words, f"dp={dp}"] if dp > 1 else words)
            groups.setdefault((label, dp, each["sp"], round(each["length"])), []).append(each)
        peak = _measured_peak()
        medians = {group: _medians(some, peak) for group, some in groups.items()}
        found = [
            row(f"{label}: {case}" if label else case, x[column] / units, unit, sp=sp, length=n)
            for case, unit, column, units in (STEP if self.kind == "step" else RUN)
            for (label, _, sp, n), x in medians.items()
            if column in x
        ]
        more = list(_efficiencies(medians)) if self.kind == "step" else []
        what = f"One training step of {self.model['name']}, {self.rows} sequence(s)."
        if self.kind == "train":
            what = f"Runs of {' '.join(self.train)}."
        if crowded := sorted({each["ranks"] for each in rows if each.get("oversubscribed")}):
            counts = " and ".join(map(str, crowded))
            what += f" {counts} ranks were more than cores: they say nothing about a cluster."
        return found + more, what


def _measured_peak() -> float | None:
    """Matrix products of one thread, flop/s, where bench=machine has measured them here."""
    try:
        return max(measured_rates(RunFolder(THIS).rows(), THIS).products.values())
    except LongfoldError:
        return None


def _medians(repeats: Sequence[Row], peak: float | None) -> dict[str, int | float]:
    """Of the numbers that all have.

    Args:
        peak: of one thread, flop/s.
    """
    found = {}
    for name in repeats[0]:
        values = [x for each in repeats if isinstance(x := each.get(name), (int, float))]
        if len(values) == len(repeats):
            found[name] = median(values)
    for name in found.keys() & {"flops", "fft_flops"}:
        found[f"{name}_per_s"] = found[name] / found["step_s"]
    if peak and "flops_per_s" in found:
        found["peak_share"] = found["flops_per_s"] / (found["ranks"] * found["threads"] * peak)
    return found


def _efficiencies(medians: dict[tuple, dict[str, Any]]) -> Iterator[Row]:
    """Of more sequence ranks beside the fewest: for the same N (strong, ideally 1), and for the
    same N/P (weak; an FFT's share of the work grows with log N, so that its ideal is not 1)."""
    for (label, dp, sp, n), x in medians.items():
        least = min(p for (other, d, p, _) in medians if (other, d) == (label, dp))
        if sp == least or "step_s" not in x:
            continue
        for case, length in (("strong", n), ("weak", n * least // sp)):
            alone = medians.get((label, dp, least, length))
            if alone is None or (case == "weak" and n * least % sp):
                continue
            grown = least / sp if case == "strong" else 1.0
            title = f"{label}: {case} efficiency" if label else f"{case} efficiency"
            measured = alone["step_s"] * grown / x["step_s"]
            yield row(title, measured, "", measured, sp=sp, length=n)
            if case == "weak" and "fft_flops" in x:
                share = alone["fft_flops"] / alone["flops"]
                ideal = 1 / (1 - share + share * log2(n) / log2(length)) if length > 1 else 1.0
                yield row(f"{title}, ideal", ideal, "", ideal, sp=sp, length=n)
