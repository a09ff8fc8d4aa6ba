"""What this machine can do, and how much of it a training step uses.

Peaks are measured by torch on sizes that the models have, with one thread and with all cores; each
part of a step is then set against the least time that its work needs at these peaks.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist

from scaling.experiments.cases.train_step import StepCase, training_step
from scaling.experiments.experiment import Experiment, Point, joined, row
from scaling.experiments.options import Checked, Counts, Positive
from scaling.experiments.timing import medians, now
from scaling.models import build
from scaling.models.work import Work
from scaling.observe.metrics import WARMUP_STEPS
from scaling.parallel.collectives import Group, group_size
from scaling.parallel.telemetry import measuring
from scaling.runs.identity import NotIdentity
from scaling.runs.rows import Row

Measured = Literal["peaks", "exchange", "step"]
Call = Callable[[], object]

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
LEAST_STEPS = 3
PARTS: dict[str, str | None] = {
    "projection": "projection",
    "transforms": "transforms",
    "other": None,
}
"""Of a step on one rank."""
ELEMENT_WISE = "a + b c in cache"
TRANSFORM = "real transform"


@dataclass
class MachineOptions(Checked):
    """
    Args:
        models: sections like `model`, under names for the table.
        lengths: N, tokens of the one sequence of a step.
        transforms: lengths of the real Fourier transforms.
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        seconds: of each group of peaks, and of the steps of one model and length.
        threads: 0 is all cores; its points choose it, and what to measure.
    """

    models: dict[str, dict[str, Any]]
    lengths: Annotated[Counts, NotIdentity()]
    transforms: Counts
    vectors: int = 0
    scalars: int = 16
    seconds: Positive = 4.0
    threads: int = 1
    measured: Measured = "peaks"


def machine_rows(case: MachineOptions, group: Group, device: torch.device) -> list[Row]:
    """The peaks with some number of threads, of an exchange, or the parts of training steps."""
    if case.measured == "exchange":
        return _exchange(case, group, device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or cores or 1)
    try:
        return (_peaks if case.measured == "peaks" else _steps)(case, group, device)
    finally:
        torch.set_num_threads(before)


def _peaks(case: MachineOptions, group: Group, device: torch.device) -> list[Row]:
    normal = partial(torch.randn, device=device)
    who = f"{case.threads} thread" if case.threads else "all cores"
    rows: list[Row] = []

    def add(sides: dict[str, tuple[float, Call]], unit: str, length: int = 0) -> None:
        """sides: name -> work of one call, in units of 1e9, and the call."""
        calls = {name: call for name, (_, call) in sides.items()}
        for name, seconds in medians(calls, group, device, case.seconds).items():
            rows.append(row(f"{who}: {name}", 1, length, sides[name][0] / seconds, unit))

    matrices: dict[str, tuple[float, Call]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for m, n in ((SQUARE, SQUARE), (128, COLUMNS), (16, COLUMNS)):
            a, b = normal(m, m).to(dtype), normal(m, n).to(dtype)
            title = f"({m} x {m}) @ ({m} x {n}), {str(dtype).removeprefix('torch.')}"
            matrices[title] = (2 * m * m * n / 1e9, partial(torch.matmul, a, b))
    add(matrices, "GFLOP/s")
    x, y, z = normal(3, IN_CACHE).unbind()
    add({ELEMENT_WISE: (2 * IN_CACHE / 1e9, partial(z.addcmul_, x, y))}, "GFLOP/s")
    x, y, z = normal(3, IN_MEMORY).unbind()
    sides: dict[str, tuple[float, Call]] = {
        "copy": (2 * x.nbytes / 1e9, partial(y.copy_, x)),
        "triad": (3 * x.nbytes / 1e9, partial(torch.add, x, y, alpha=3.0, out=z)),
    }
    add(sides, "GB/s")
    for n in case.transforms:
        flops = 8 * 2.5 * n * (n.bit_length() - 1) / 1e9
        add({TRANSFORM: (flops, partial(torch.fft.rfft, normal(8, n)))}, "GFLOP/s", n)
    return rows


def _exchange(case: MachineOptions, group: Group, device: torch.device) -> list[Row]:
    """An all-to-all of two ranks: of nearly nothing, and of much."""
    ranks = group_size(group)
    sides, sent = {}, {}
    for name, numbers in (("latency", 2 * ranks), ("bandwidth", MESSAGE)):
        given = torch.randn(numbers, device=device)
        received = torch.empty_like(given)
        sides[name] = partial(dist.all_to_all_single, received, given, group=group)
        sent[name] = given.nbytes * (ranks - 1) / ranks
    seconds = medians(sides, group, device, case.seconds)
    bandwidth = sent["bandwidth"] / seconds["bandwidth"] / 1e9
    return [
        row("all-to-all: latency", ranks, 0, seconds["latency"] * 1e6, "us"),
        row("all-to-all: sent by a rank", ranks, 0, bandwidth, "GB/s"),
    ]


def _steps(case: MachineOptions, group: Group, device: torch.device) -> list[Row]:
    """Times of the parts of a step, means over steps, and the work that they do."""
    rows = []
    for name, model in case.models.items():
        for length in sorted(case.lengths):
            step = training_step(
                StepCase(model=model, length=length, vectors=case.vectors, scalars=case.scalars),
                group,
                device,
            )
            for _ in range(WARMUP_STEPS):
                step()
            splits, began = [], now(device)
            while len(splits) < LEAST_STEPS or now(device) - began < case.seconds:
                with measuring(device) as measured:
                    step()
                splits.append(measured.innermost())
            for title, part in PARTS.items():
                seconds = fmean(split.get(part, 0.0) for split in splits)
                rows.append(row(f"{name}: {title}", 1, length, seconds))
            work = _work(model, case, length)
            for key, value in asdict(work).items():
                if key == "exchange_bytes":  # one rank sends nothing
                    continue
                unit = "GB" if key.endswith("bytes") else "GFLOP"
                rows.append(row(f"{name}: {key}", 1, length, value * length / 1e9, unit))
    return rows


def _work(model: dict[str, Any], case: MachineOptions, length: int) -> Work:
    options = {key: value for key, value in model.items() if key != "name"}
    return build(model["name"], case.vectors, case.scalars, **options).work(length)


def _points(case: MachineOptions) -> list[Point]:
    return [
        Point("peaks_one_thread", 1, replace(case, threads=1)),
        Point("peaks_all_cores", 1, replace(case, threads=0)),
        Point("exchange", 2, replace(case, measured="exchange")),
        Point(f"step_{joined(case.lengths)}", 1, replace(case, measured="step")),
    ]


def _conclude(_case: MachineOptions, rows: list[Row]) -> tuple[list[Row], str]:
    """What share of a step its parts take, and of a part the least time of its work."""
    found = {(row["case"], row["length"]): row["value"] for row in rows}
    measured = [
        (case.removesuffix(": projection"), length)
        for case, length in found
        if case.endswith(": projection")
    ]
    more = []
    for name, length in measured:
        times = {part: found[f"{name}: {part}", length] for part in PARTS}
        for part, seconds in times.items():
            share = seconds / sum(times.values())
            more.append(row(f"{name}: {part} / step", 1, length, seconds, "s", share))
        peaks = _peaks_of_one_thread(rows, length)
        for part, work, peak in BOUNDS:
            least = found[f"{name}: {work}", length] / peaks[peak]
            title = f"{name}: {work} at the peak of {peak} / {part}"
            more.append(row(title, 1, length, least, "s", least / times[part]))
    return [*rows, *more], REMARK


def _peaks_of_one_thread(rows: list[Row], length: int) -> dict[str, float]:
    """Matrix products, element-wise and memory the best, transforms of the nearest length."""
    one = [row for row in rows if row["case"].startswith("1 thread: ")]
    transforms = {row["length"]: row["value"] for row in one if row["case"].endswith(TRANSFORM)}
    return {
        "matrix products": max(row["value"] for row in one if row["case"].endswith("float32")),
        "a + b c": max(row["value"] for row in one if row["case"].endswith(ELEMENT_WISE)),
        "transforms": transforms[min(transforms, key=lambda n: abs(n - length))],
        "memory": max(row["value"] for row in one if row["unit"] == "GB/s"),
    }


BOUNDS = (  # part, work, peak
    ("projection", "matrix_flops", "matrix products"),
    ("projection", "product_flops", "a + b c"),
    ("projection", "projection_bytes", "memory"),
    ("transforms", "transform_flops", "transforms"),
    ("transforms", "frequency_flops", "a + b c"),
    ("transforms", "transforms_bytes", "memory"),
)
REMARK = (
    "The last rows, of one thread: what share of a step a part takes, and what share of the part "
    "its work would take at the measured peak (float32). The work is scaling/models/work.py's: "
    "the least, nothing twice, and no element-wise operation besides the products."
)
BENCH = Experiment(MachineOptions, _points, machine_rows, conclude=_conclude)
