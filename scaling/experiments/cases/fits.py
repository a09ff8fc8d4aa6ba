"""How often the intervals of `fit` hold the truth, where it is known."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge

from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.fits.entries import BEYOND, Refused, entry
from scaling.experiments.fits.power_law import Data, Form
from scaling.experiments.options import Count
from scaling.runs.rows import Row


@dataclass(frozen=True)
class Truth:
    """A law, and how measurements of it scatter."""

    form: str
    values: tuple[float, ...]
    """Of exponents, coefficients and offset."""
    axes: tuple[np.ndarray, ...]
    """Scales of the variables; every combination is measured."""
    runs: int
    """Of every scale."""
    noise: float
    """Standard deviation of the logarithm of a run's measurement."""
    scatter: float = 0.0
    """The same of what all runs of a scale share."""
    heavy: bool = False
    """Noise of Student's t with 3 degrees of freedom, times `noise`: runs that stalled."""

    def law(self, form: Form, x: np.ndarray) -> np.ndarray:
        exponents = len(form.exponents)
        logs = [log(value) for value in self.values[exponents:-1]]
        theta = np.array([*self.values[:exponents], *logs, self.values[-1]])
        return np.exp(form.predict(theta, np.log(x))[0])

    def measure(self, form: Form, random: np.random.Generator) -> Data:
        cells = np.stack([a.ravel() for a in np.meshgrid(*self.axes, indexing="ij")], -1)
        shared = np.repeat(self.scatter * random.standard_normal(len(cells)), self.runs)
        x = np.repeat(cells, self.runs, axis=0)
        own = random.standard_t(3, len(x)) if self.heavy else random.standard_normal(len(x))
        return Data(x, self.law(form, x) * np.exp(shared + self.noise * own))


LENGTHS, RANKS = 2.0 ** np.arange(10, 21, 2), 2.0 ** np.arange(6)
TIME = "c + a N^b", (1.1, 1e-6, 0.05), (LENGTHS,)
TRUTHS = {
    "time over length": Truth(*TIME, runs=3, noise=0.03),
    "the same, five scales, one run each": Truth(*TIME[:2], (LENGTHS[1:],), runs=1, noise=0.03),
    "the same, runs stall": Truth(*TIME, runs=3, noise=0.03, heavy=True),
    "the same, scales scatter": Truth(*TIME, runs=3, noise=0.01, scatter=0.03),
    "time over ranks": Truth("c + a P^-g", (0.9, 2.0, 0.05), (RANKS,), 3, 0.03),
    "time over length and ranks": Truth(
        "c + a N^b P^-g", (1.1, 0.9, 1e-6, 0.05), (LENGTHS, RANKS), 1, 0.03
    ),
    "loss over length": Truth("c + a N^b", (-0.5, 5.0, 0.2), (2.0 ** np.arange(6, 12),), 3, 0.01),
    "loss over size and tokens": Truth(
        "E + A N^-a + B D^-b",
        (0.35, 0.37, 5.0, 30.0, 0.05),
        (np.geomspace(1e4, 3e6, 6), np.geomspace(1e5, 1e8, 6)),
        runs=1,
        noise=0.01,
    ),
    "loss over compute": Truth("E + A C^-a", (0.2, 100.0, 0.1), (np.logspace(12, 17, 6),), 3, 0.01),
}
"""By name; what `fit` meets, and worse."""
PREDICTION, HELD_OUT, REFUSED = f"law at {BEYOND} x the largest", "largest held out", "refused"


@dataclass(kw_only=True)
class Fits(Experiment):
    """
    Args:
        repeats: synthetic sweeps of every truth.
        draws: of each one's bootstrap.
        seed: of everything.
    """

    repeats: Count = 1000
    draws: Annotated[int, Ge(1000)] = 1000
    seed: Annotated[int, Ge(0)] = 0

    goals: ClassVar = {
        f"{name}: {what}": (">=", 0.93)
        for name, truth in TRUTHS.items()
        for what in (*Form(truth.form).exponents, PREDICTION, HELD_OUT)
    }

    def points(self) -> Iterator[Point]:
        return (Point(name) for name in TRUTHS)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """Shares of the repeats in which the intervals hold the truth; refused ones are counted,
        and count for nothing else."""
        truth = TRUTHS[point.part]
        form, held = Form(truth.form), defaultdict(list)
        for repeat in range(self.repeats):
            data = truth.measure(form, np.random.default_rng([self.seed, repeat]))
            try:
                found = entry(form, data, form.variables, self.draws, repeat)
            except Refused:
                held[REFUSED].append(True)
                continue
            held[REFUSED].append(False)
            for name, value in zip(form.exponents, truth.values, strict=False):
                held[name].append(_holds(found["parameters"][name], value))
            last = found["curve"][-1]
            at = np.array([[last[variable] for variable in form.variables]])
            held[PREDICTION].append(_holds(last, float(truth.law(form, at)[0])))
            held[HELD_OUT].append(found["held_out"]["covered"])
        for what, each in held.items():
            yield row(f"{point.part}: {what}", fmean(each), "")

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        return rows, (
            f"Of {self.repeats} synthetic sweeps, the share whose 95 % interval holds the true"
            " exponent, the true law beyond the data, and the largest scale's measurement where it"
            " was held out."
        )


def _holds(interval: dict[str, float | None], value: float) -> bool:
    low, high = interval["low"], interval["high"]
    return (low is None or low <= value) and (high is None or value <= high)
