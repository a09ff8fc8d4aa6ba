"""What a rank's processor and the network between ranks can do: measured here, or by data sheets.

Presets are peaks that the vendors publish and shares of them that codes usually reach. None of them
has been measured here.

    A100    NVIDIA A100 80GB SXM data sheet: FP32 19.5, BF16 312 TFLOP/s; 2,039 GB/s
    H100    NVIDIA H100 SXM data sheet: FP32 67, BF16 989 TFLOP/s dense; 3.35 TB/s
    H200    NVIDIA H200 SXM data sheet: as H100; 4.8 TB/s
    NVLink  half of what the data sheets give both ways, A100 600, H100 and H200 900 GB/s;
            InfiniBand: a NDR port, 400 Gbit/s
    shares  products 0.7, memory and networks 0.8 of the peak, 6 us to start an operator from
            Python, 15 to 50 us for a collective: usual orders of magnitude
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log2
from operator import mul
from statistics import geometric_mean
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from data_pipeline.errors import ConfigError
from scaling.cost.trace import PARTS, Operator, StepTrace, trace_step
from scaling.execution import Execution
from scaling.models import build
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row

KINDS = ("products", "spectra", "bytes", "calls")
"""Of work: matrix products, Fourier transforms, what is read and written, starting an operator."""
BOUNDS = (0.25, 20.0)
"""Of the kinds' factors: caches may be faster than memory, small operators slower than large."""


@dataclass(frozen=True)
class Network:
    """Between the ranks of a collective."""

    name: str
    latency_s: float
    """Of a collective of two ranks."""
    bytes_per_s: float
    """Sent by a rank."""
    measured: bool = False

    def seconds(self, calls: int, sent: int | float, ranks: int) -> float:
        """Of collectives; the latency grows with the logarithm of the ranks."""
        if ranks == 1:
            return 0.0
        return calls * self.latency_s * log2(ranks) + sent / self.bytes_per_s


@dataclass(frozen=True)
class Machine:
    """Of one rank."""

    name: str
    device: str
    """cpu or cuda."""
    products: Mapping[int, float]
    """Matrix products in float32 by their smallest side, flop/s."""
    transforms: Mapping[int, float]
    """Real Fourier transforms by length, flop/s."""
    memory: float
    """byte/s."""
    call_s: float
    """To start an operator."""
    products_bf16: Mapping[int, float] | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    """How much longer a kind of work (of KINDS), and then a part of a step, was measured to take
    than these rates say; 1 where nothing was measured."""
    measured: bool = False
    network: Network | None = None
    """Between its ranks, as measured."""
    within_node: Network | None = None
    """Between the GPUs of a node."""

    def least(self, operator: Operator, bf16: bool = False) -> tuple[float, ...]:
        """Seconds of one call at these rates, by kind of work."""
        rates = (self.products_bf16 if bf16 else None) or self.products
        products = transforms = 0.0
        if operator.matrix_flops:
            products = operator.matrix_flops / between(rates, operator.side)
        if operator.transform_flops:
            transforms = operator.transform_flops / between(self.transforms, operator.length)
        return products, transforms, operator.bytes / self.memory, self.call_s

    def seconds(self, operator: Operator, bf16: bool = False) -> float:
        """Of one call: its arithmetic, its bytes and its start, one after the other; on a GPU the
        host starts operators ahead, so that the slower of the two counts."""
        factors = (self.factors.get(kind, 1.0) for kind in KINDS)
        *work, start = map(mul, self.least(operator, bf16), factors)
        return max(sum(work), start) if self.device == "cuda" else sum(work) + start

    def seconds_by_part(self, trace: StepTrace, bf16: bool = False) -> dict[str, float]:
        """Of all that a step computes."""
        seconds: dict[str, float] = defaultdict(float)
        for (part, operator), calls in trace.operators.items():
            seconds[part] += calls * self.seconds(operator, bf16) * self.factors.get(part, 1.0)
        return dict(seconds)


def between(rates: Mapping[int, float], size: int) -> float:
    """The rate at a size: a power law between the sizes that are known, the nearest beyond."""
    sizes = sorted(rates)
    place = bisect_left(sizes, size)
    if place in (0, len(sizes)):
        return rates[sizes[min(place, len(sizes) - 1)]]
    low, high = sizes[place - 1], sizes[place]
    share = log2(size / low) / log2(high / low)
    return rates[low] ** (1 - share) * rates[high] ** share


NETWORKS = {
    "nvlink3": Network("NVLink 3", 15e-6, 0.8 * 300e9),
    "nvlink4": Network("NVLink 4", 15e-6, 0.8 * 450e9),
    "infiniband": Network("InfiniBand NDR", 25e-6, 0.8 * 50e9),
    "ethernet": Network("Ethernet, 100 Gbit/s", 50e-6, 0.8 * 12.5e9),
}


def _gpu(name: str, fp32: float, bf16: float, memory: float, within_node: str) -> Machine:
    """Peaks in TFLOP/s and TB/s."""
    any_side = {64: 0.7e12 * fp32}
    return Machine(name, "cuda", any_side, any_side, 0.8e12 * memory, 15e-6,
                   products_bf16={64: 0.7e12 * bf16},
                   within_node=NETWORKS[within_node])  # fmt: skip


MACHINES = {
    "a100": _gpu("A100 80GB SXM", 19.5, 312.0, 2.039, "nvlink3"),
    "h100": _gpu("H100 SXM", 67.0, 989.0, 3.35, "nvlink4"),
    "h200": _gpu("H200 SXM", 67.0, 989.0, 4.8, "nvlink4"),
}
NODE = 8
"""GPUs of a node."""
THIS = "benches/machine"
LEAST_SHARE = 0.05
"""Of a step, that a part must take to calibrate anything."""


def machine_named(name: str) -> Machine:
    """A preset, `this` (what `bench=machine` measured here), or what a folder of that bench says.

    Raises:
        ConfigError: no such preset or folder.
    """
    if name in MACHINES:
        return MACHINES[name]
    folder = RunFolder(THIS if name == "this" else name)
    if not folder.rows():
        if name == "this" or folder.path.is_dir():
            raise ConfigError(f"machine={name}: {folder.path} holds no measurements of a machine: "
                              "python -m launch bench bench=machine")  # fmt: skip
        raise ConfigError(f"machine={name}: no preset and no folder; presets: this, "
                          f"{', '.join(MACHINES)}, or the folder of a bench=machine")  # fmt: skip
    return measured_machine(folder.rows(), folder.identity()["bench"], str(folder.path))


def network_named(name: str) -> Network:
    if name not in NETWORKS:
        raise ConfigError(f"network={name}: no preset; presets: {', '.join(NETWORKS)}")
    return NETWORKS[name]


def measured_machine(rows: Sequence[Row], options: Mapping[str, Any], name: str) -> Machine:
    """From the rows of a bench=machine: its rates, and by how much each part of its steps took
    longer than its operators at these rates.

    Args:
        options: of the bench.
    """
    machine = measured_rates(rows, name)
    return replace(machine, factors=_factors(machine, _values(rows), options))


def _values(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    return {(each["case"], each["length"]): each["value"] for each in rows if "case" in each}


def measured_rates(rows: Sequence[Row], name: str) -> Machine:
    """From the rows of a bench=machine: peaks of one thread, and an exchange of two ranks.

    Raises:
        ConfigError: some are not measured.
    """
    value = _values(rows)
    one = {(case.removeprefix("1 thread: "), n): x for (case, n), x in value.items()
           if case.startswith("1 thread: ")}  # fmt: skip
    try:
        network = None
        if ("all-to-all: latency", 0) in value:
            network = Network("this machine's", 1e-6 * value["all-to-all: latency", 0],
                              1e9 * value["all-to-all: sent by a rank", 0], True)  # fmt: skip
        return Machine(
            name,
            next((each["device"] for each in rows if "device" in each), "cpu"),
            _products(one, "float32"),
            {n: 1e9 * x for (case, n), x in one.items() if case == "real transform"},
            1e9 * max(one["copy", 0], one["triad", 0]),
            1e-6 * one.get(("an operator of one number", 0), 5.0),
            _products(one, "bfloat16"),
            measured=True,
            network=network,
        )
    except (KeyError, ValueError):
        raise ConfigError(f"{name} lacks some of a machine's peaks; measure it to the end: "
                          "python -m launch bench bench=machine") from None  # fmt: skip


def _products(one: Mapping[tuple[str, int], float], dtype: str) -> dict[int, float]:
    """The fastest of each smallest side, flop/s."""
    rates: dict[int, float] = {}
    for (case, _), x in one.items():
        if case.endswith(dtype):
            side = int(case.partition(" x ")[0].strip("("))
            rates[side] = max(rates.get(side, 0.0), 1e9 * x)
    if not rates:
        raise KeyError(dtype)
    return rates


def _factors(
    machine: Machine, value: Mapping[tuple[str, int], float], options: Mapping[str, Any]
) -> dict[str, float]:
    """From the parts of the bench's steps: of each kind of work by least squares of relative
    errors, then of each part the mean of what is left."""
    channels = {key: options[key] for key in ("vectors", "scalars")}
    parts, least, measured = list[str](), list[np.ndarray](), list[float]()
    for name, section in options["models"].items():
        for n in sorted({n for case, n in value if case.startswith(f"{name}: ")}):
            model = build(**section, **channels)
            trace = trace_step(model, Execution(**options["execution"]), n, device=machine.device)
            times = {p: value[f"{name}: {p}", n] for p in PARTS if (f"{name}: {p}", n) in value}
            for part, seconds in times.items():
                calls = [(op, k) for (where, op), k in trace.operators.items() if where == part]
                if calls and seconds > LEAST_SHARE * sum(times.values()):
                    parts.append(part)
                    least.append(np.sum([k * np.array(machine.least(op)) for op, k in calls], 0))
                    measured.append(seconds)
    if not measured:
        return {}
    shares = np.array(least) / np.array(measured)[:, None]
    kinds = lsq_linear(shares, np.ones(len(shares)), bounds=BOUNDS).x
    left = 1 / (shares @ kinds)
    of_parts = {
        part: geometric_mean([x for x, where in zip(left, parts, strict=True) if where == part])
        for part in dict.fromkeys(parts)
    }
    return dict(zip(KINDS, kinds.tolist(), strict=True)) | of_parts
