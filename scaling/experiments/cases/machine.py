"""What this machine can do, and how much of it a training step uses.

Peaks are measured by torch on sizes that the models have, with one thread and with all cores; each
part of a step is then set against the least time that its work needs at these peaks.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from scaling.experiments.cases.train_step import training_step
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count, Counts, Positive, Selection, StepOptions
from scaling.experiments.timing import available_cores, medians, now
from scaling.models import build
from scaling.observe.metrics import WARMUP_STEPS
from scaling.parallel.telemetry import measuring
from scaling.runs.rows import Row

IN_CACHE = 1 << 14
"""Numbers that the element-wise peak works on: those of a tile of the geometric product."""
IN_MEMORY = 1 << 26
"""Numbers of each array that bandwidth is measured with; no cache holds them."""
COLUMNS = 4096
"""Tokens of the channel-mixing products."""
SQUARE = 1024
"""Rows and columns of the square product."""
MESSAGE = 1 << 24
"""Numbers that the exchange's bandwidth is measured with."""
GPU_CALLS = 50
"""One after the other, so that starting the first and waiting for the last do not count."""
LEAST_STEPS = 3
PARTS: dict[str, str | None] = {
    "projection": "projection",
    "transforms": "transforms",
    "pairs": "pairs",
    "other": None,
}
"""Of a step on one rank; a model lacks some."""
ONE, ALL = "1 thread", "all cores"
ELEMENT_WISE = "a + b c in cache"
TRANSFORM = "real transform"
CALL, CALLS = "an operator of one number", 1000
BOUNDS = (  # part, work, peak
    ("projection", "matrix_flops", "matrix products"),
    ("projection", "product_flops", "a + b c"),
    ("projection", "projection_bytes", "memory"),
    ("pairs", "pair_flops", "matrix products"),
    ("transforms", "transform_flops", "transforms"),
    ("transforms", "frequency_flops", "a + b c"),
    ("transforms", "transforms_bytes", "memory"),
)
REMARK = (
    "The last rows, of one thread: what share of a step a part takes, and what share of the part "
    "its work would take at the measured peak (float32). The work is scaling/work.py's: "
    "the least, nothing twice, and no element-wise operation besides the products."
)


@dataclass(kw_only=True)
class Machine(StepOptions, Experiment):
    """
    Args:
        models: sections like `model`, under names for the table.
        lengths: N, tokens of the one sequence of a step.
        transforms: lengths of the real Fourier transforms.
        exchange: ranks of the all-to-all, each with a GPU of its own; 1: none is measured.
        seconds: of each group of peaks, and of the steps of one model and length.
    """

    models: dict[str, dict[str, Any]]
    lengths: Selection
    transforms: Counts
    exchange: Count = 2
    seconds: Positive = 4.0

    def points(self) -> Iterator[Point]:
        yield Point("peaks", ONE)
        yield Point("peaks", ALL)
        if self.exchange > 1:
            yield Point("exchange", ranks=self.exchange)
        for name in self.models:
            for n in sorted(self.lengths):
                yield Point("step", name, n)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """The peaks with some number of threads, of an exchange, or the parts of steps."""
        if point.part == "exchange":
            return self._exchange(point.ranks, device)
        if point.part == "step":
            return self._step(point.side, point.length, device)
        if point.side == ALL:
            torch.set_num_threads(available_cores())
        return self._peaks(point.side, device)

    def _peaks(self, threads: str, device: torch.device) -> Iterator[Row]:
        normal = partial(torch.randn, device=device)

        def rates(
            unit: str, *sides: tuple[str, int | float, Callable[[], object]], length: int = 0
        ) -> Iterator[Row]:
            """sides: name, flops or bytes of a call, and the call."""
            calls = 1 if device.type == "cpu" else GPU_CALLS
            repeated = {name: partial(_repeat, call, calls) for name, _, call in sides}
            seconds = medians(repeated, self.seconds, device)
            for name, work, _ in sides:
                rate = calls * work / 1e9 / seconds[name]
                yield row(f"{threads}: {name}", rate, unit, length=length, device=device.type)

        products = []
        for dtype in (torch.float32, torch.bfloat16):
            for m, n in ((SQUARE, SQUARE), (128, COLUMNS), (16, COLUMNS)):
                a, b = normal(m, m).to(dtype), normal(m, n).to(dtype)
                name = f"({m} x {m}) @ ({m} x {n}), {str(dtype).removeprefix('torch.')}"
                products.append((name, 2 * m * m * n, partial(torch.matmul, a, b)))
        yield from rates("GFLOP/s", *products)
        x, y, z = normal(3, IN_CACHE).unbind()
        yield from rates("GFLOP/s", (ELEMENT_WISE, 2 * IN_CACHE, partial(z.addcmul_, x, y)))
        a, b = normal(1), normal(1).requires_grad_()
        seconds = medians({CALL: lambda: [a * b for _ in range(CALLS)]}, self.seconds, device)
        yield row(f"{threads}: {CALL}", 1e6 * seconds[CALL] / CALLS, "us")
        x, y, z = normal(3, IN_MEMORY).unbind()
        yield from rates(
            "GB/s",
            ("copy", 2 * x.nbytes, partial(y.copy_, x)),
            ("triad", 3 * x.nbytes, partial(torch.add, x, y, alpha=3.0, out=z)),
        )
        for n in self.transforms:
            flops = 8 * 2.5 * n * (n.bit_length() - 1)
            transform = partial(torch.fft.rfft, normal(8, n))
            yield from rates("GFLOP/s", (TRANSFORM, flops, transform), length=n)

    def _exchange(self, ranks: int, device: torch.device) -> Iterator[Row]:
        """An all-to-all: of nearly nothing, and of much."""
        nothing, much = (torch.randn(n, device=device) for n in (2 * ranks, MESSAGE))
        sides = {
            name: partial(dist.all_to_all_single, torch.empty_like(x), x)
            for name, x in (("latency", nothing), ("bandwidth", much))
        }
        seconds = medians(sides, self.seconds, device)
        sent = much.nbytes * (ranks - 1) / ranks / 1e9
        yield row("all-to-all: latency", seconds["latency"] * 1e6, "us")
        yield row("all-to-all: sent by a rank", sent / seconds["bandwidth"], "GB/s")

    def _step(self, name: str, length: int, device: torch.device) -> Iterator[Row]:
        """Times of the parts of a step, means over steps, and the work that they do."""
        model = self.models[name]
        step = training_step(self, model, length, device)
        for _ in range(WARMUP_STEPS):
            step()
        splits, began = [], now(device)
        while len(splits) < LEAST_STEPS or now(device) - began < self.seconds:
            with measuring(device) as measured:
                step()
            splits.append(measured.innermost())
        for title, part in PARTS.items():
            if seconds := fmean(split.get(part, 0.0) for split in splits):
                yield row(f"{name}: {title}", seconds)
        work = build(**model, vectors=self.vectors, scalars=self.scalars).work(length)
        for key, value in asdict(work).items():
            if value:  # one rank sends nothing
                unit = "GB" if key.endswith("bytes") else "GFLOP"
                yield row(f"{name}: {key}", value * length / 1e9, unit)

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        """What share of a step its parts take, and of a part the least time of its work."""
        found = {(each["case"], each["length"]): each["value"] for each in rows}
        more = []
        for name in self.models:
            for n in sorted(self.lengths):
                keys = {part: (f"{name}: {part}", n) for part in PARTS}
                times = {part: found[key] for part, key in keys.items() if key in found}
                for part, seconds in times.items():
                    share = seconds / sum(times.values())
                    more.append(row(f"{name}: {part} / step", seconds, "s", share, sp=1, length=n))
                peaks = _peaks_of_one_thread(rows, n)
                for part, work, peak in BOUNDS:
                    if part not in times or (f"{name}: {work}", n) not in found:
                        continue
                    least = found[f"{name}: {work}", n] / peaks[peak]
                    case = f"{name}: {work} at the peak of {peak} / {part}"
                    more.append(row(case, least, "s", least / times[part], sp=1, length=n))
        return rows + more, REMARK


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _peaks_of_one_thread(rows: list[Row], length: int) -> dict[str, float]:
    """Matrix products, element-wise and memory the best, transforms of the nearest length."""
    one = [each for each in rows if each["case"].startswith(ONE)]
    transforms = [each for each in one if each["case"].endswith(TRANSFORM)]
    nearest = min(transforms, key=lambda each: abs(each["length"] - length))
    return {
        "matrix products": max(each["value"] for each in one if each["case"].endswith("float32")),
        "a + b c": max(each["value"] for each in one if each["case"].endswith(ELEMENT_WISE)),
        "transforms": nearest["value"],
        "memory": max(each["value"] for each in one if each["unit"] == "GB/s"),
    }
