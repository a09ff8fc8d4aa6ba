"""A training step of every model, with as many parameters, over N until it takes too much."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from scaling.experiments.cases.train_step import step_cost
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count, Positive, Selection, StepOptions
from scaling.models import MODELS, build
from scaling.runs.rows import Row

SHOWN = {"step": ("step_s", "s"), "exchanged": ("comm_bytes", "B"), "memory": ("peak_bytes", "B")}
"""What is said of a model at a length: of the slowest rank, or of the one that has most."""


@dataclass(kw_only=True)
class Models(StepOptions, Experiment):
    """
    Args:
        names: of the models, each with its usual options.
        parameters: of each model that has a width, about.
        lengths: N, tokens of the one sequence of a step.
        sp: ranks that share it.
        limit_s: a model stops before the N at which a step would take longer, s.
        memory_bytes: or a rank more, bytes.
        steps: timed steps; their median counts.
    """

    names: list[str]
    parameters: Count = 50_000
    lengths: Selection
    sp: Selection
    limit_s: Positive = 20.0
    memory_bytes: Count = 8 << 30
    steps: Count = 3

    def points(self) -> Iterator[Point]:
        """All lengths of a model in one set of ranks; memory in its own."""
        for name in self.names:
            for ranks in sorted(self.sp):
                for side in ("", "memory"):
                    yield Point(name, side, ranks=ranks)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        name, only_memory = point.part, point.side == "memory"
        options: dict[str, Any] = {"name": name}
        if MODELS[name].width:
            options["parameters"] = self.parameters
        built = build(**options, vectors=self.vectors, scalars=self.scalars)
        label = {"parameters": sum(p.numel() for p in built.parameters())}
        shown = {case: of for case, of in SHOWN.items() if (case == "memory") == only_memory}
        before: dict[str, float] = {}
        growth: dict[str, float] = {"step_s": 1.0, "peak_bytes": 1.0}
        for n in sorted(self.lengths):
            foreseen = {key: before.get(key, 0.0) * growth[key] for key in growth}
            if foreseen["step_s"] > self.limit_s or foreseen["peak_bytes"] > self.memory_bytes:
                if not only_memory:
                    yield row(f"{name}: would take", foreseen["step_s"], "s", length=n, **label)
                return
            # The second step has the optimiser's state.
            cost = step_cost(self, options, n, device, 1, 1 if only_memory else self.steps)
            growth = {key: cost[key] / before.get(key, cost[key]) for key in growth}
            before = cost
            for case, (key, unit) in shown.items():
                yield row(f"{name}: {case}", cost[key], unit, length=n, **label)

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        """Steps and memory as ratios to the first model's, too, and where each stopped."""
        first = self.names[0]
        value = {(r["case"], r["length"], r["sp"]): r["value"] for r in rows}
        ratios, remarks = [], []
        for each in rows:
            name, _, case = each["case"].partition(": ")
            beside = value.get((f"{first}: {case}", each["length"], each["sp"]))
            if case in ("step", "memory") and beside:
                title = f"{name}: {case} / {first}'s"
                ratios.append(each | {"case": title, "ratio": each["value"] / beside})
        for stop in (r for r in rows if r["case"].endswith(": would take") and not r["sp"] > 1):
            said = f"- {stop['case']} {stop['value']:.3g} s at N = {stop['length']:,}."
            remarks += [said] * (said not in remarks)
        counts = dict.fromkeys(f"{r['case'].split(':')[0]} {r['parameters']:,}" for r in rows)
        remarks.append(f"- Parameters: {', '.join(counts)}.")
        remarks.append("- Memory is the peak of a whole process over two steps.")
        return [r for r in rows if "would take" not in r["case"]] + ratios, "\n".join(remarks)
