"""What two ranks wait for each other over networks of several speeds, measured and foreseen.

Communication of a step is foreseen as

    c + r latency + b bytes / bandwidth

with c, r, b >= 0 from the points of the smallest and the largest bandwidth alone (least squares of
relative errors): r is how many times in a row a rank waits for the link's latency, b how many times
the bytes counted cross it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Ge, MinLen
from scipy.optimize import nnls

from scaling.experiments.cases.train_step import step_cost
from scaling.experiments.curves import Chart, Line, Spot
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count, Positive, StepOptions
from scaling.runs.rows import Row


@dataclass(kw_only=True)
class Network(StepOptions, Experiment):
    """
    Args:
        model: `name` and options.
        length: N, tokens of the one sequence of a step.
        bandwidths: of the link between the ranks, Mbit/s; the outermost calibrate.
        latencies: of the link, one way, ms.
        steps: timed steps of a point; their median counts.
    """

    model: dict[str, Any]
    length: Count = 16384
    bandwidths: Annotated[list[Positive], MinLen(2)]
    latencies: Annotated[list[Annotated[float, Ge(0)]], MinLen(1)]
    steps: Count = 5

    goals: ClassVar = {"points foreseen within 20 %, share": (">=", 0.8)}

    def points(self) -> Iterator[Point]:
        for bandwidth, latency in product(sorted(self.bandwidths), sorted(self.latencies)):
            values = {"bandwidth_mbit": bandwidth, "latency_ms": latency}
            yield Point(length=self.length, ranks=2, values=values)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        cost = step_cost(self, self.model, self.length, device, 1, self.steps)
        link = f"{point.values['bandwidth_mbit']:g} Mbit/s, {point.values['latency_ms']:g} ms"
        for case, key, unit in (
            ("step", "step_s", "s"),
            ("waiting", "comm_s", "s"),
            ("sent", "comm_bytes", "B"),
        ):
            yield row(f"{link}: {case}", cost[key], unit)

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        """Waiting as foreseen, and its ratio to what was measured."""
        waited = [each for each in rows if each["case"].endswith(": waiting")]
        sent = max(each["value"] for each in rows if each["unit"] == "B")
        terms = np.array([
            [1.0, each["latency_ms"] / 1e3, sent / (each["bandwidth_mbit"] * 1e6 / 8)]
            for each in waited
        ])  # fmt: skip
        measured = np.array([each["value"] for each in waited])
        ends = {min(self.bandwidths), max(self.bandwidths)}
        known = np.array([each["bandwidth_mbit"] in ends for each in waited])
        weights = 1 / measured[known]
        (c, r, b), _ = nnls(terms[known] * weights[:, None], measured[known] * weights)
        foreseen = terms @ (c, r, b)
        ratios = foreseen / measured
        more = [
            each | {"case": each["case"] + ", foreseen", "value": value, "ratio": ratio}
            for each, value, ratio in zip(waited, foreseen, ratios, strict=True)
        ]
        good = np.abs(ratios - 1) <= 0.2
        share = row("points foreseen within 20 %, share", good.mean(), "", good.mean())
        worst = int(np.abs(np.log(ratios)).argmax())
        remarks = (
            f"- Foreseen: {c:.3g} s + {r:.3g} latencies + {b:.3g} times {sent / 1e6:.3g} MB over "
            f"the bandwidth, from {known.sum()} points of the outermost bandwidths.\n"
            f"- Within 20 % at {good.sum()} of {len(good)} points, of those that did not calibrate "
            f"at {good[~known].sum()} of {(~known).sum()}; the worst is "
            f"{waited[worst]['case'].removesuffix(': waiting')}, {ratios[worst]:.3g} times."
        )
        return [*rows, *more, share | {"sp": 2, "length": self.length}], remarks

    def chart(self, concluded: Sequence[Row]) -> Chart:
        """Waiting over the bandwidth, measured and as foreseen."""

        def lines(ending: str) -> list[Line]:
            rows = [each for each in concluded if each["case"].endswith(ending)]
            at = {latency: [each for each in rows if each["latency_ms"] == latency]
                  for latency in sorted(self.latencies)}  # fmt: skip
            return [
                Line([Spot(each["bandwidth_mbit"], each["value"]) for each in some], some,
                     f"{latency:g} ms" + ending.partition(",")[2])
                for latency, some in at.items()
            ]  # fmt: skip

        return Chart(
            "what two ranks wait for each other",
            "bandwidth, Mbit/s",
            "waiting in a step, s",
            lines(": waiting"),
            lines(": waiting, foreseen"),
        )
