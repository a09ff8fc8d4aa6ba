"""Vector attention, plain and in blocks, beside the long convolution until it no longer fits."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, get_args

import torch

from scaling.experiments.cases.long_conv import trainer
from scaling.experiments.experiment import Experiment, Point, joined, row
from scaling.experiments.options import Checked, Count, Counts, Positive
from scaling.experiments.timing import medians, now
from scaling.observe.memory import peak_bytes, reset_peak
from scaling.ops import vector_long_conv
from scaling.ops.attention import BLOCK, vector_attention
from scaling.parallel.collectives import Group
from scaling.runs.identity import NotIdentity
from scaling.runs.rows import Row

Side = Literal["long convolution", "plain attention", "attention in blocks"]
CONVOLUTION, PLAIN, BLOCKED = SIDES = get_args(Side)
NUMBERS = {CONVOLUTION: (52, 0), PLAIN: (0, 18), BLOCKED: (30, 0)}
"""What forward and backward hold: numbers a token, and a pair of tokens, of a channel; measured.
Small tensors' memory is not given back at once on a CPU, and adds up to half as much."""
PROBE = 1024
"""The longest N whose time is not foreseen from a shorter one's, tokens."""


@dataclass
class AttentionOptions(Checked):
    """
    Args:
        lengths: N, tokens.
        channels: vector channels.
        memory_bytes: a side stops before the N at which it would hold more.
        longest_s: and before the N at which forward and backward would take longer, s.
        seconds: of every comparison, of three rounds at least.
        sides: those that one process measures; its points choose them.
    """

    lengths: Annotated[Counts, NotIdentity()]
    channels: Count = 1
    memory_bytes: Count = 1 << 32
    longest_s: Positive = 10.0
    seconds: Positive = 2.0
    sides: Sequence[Side] = SIDES


class _Contestant:
    """One side."""

    def __init__(self, side: Side, case: AttentionOptions, device: torch.device) -> None:
        self.side, self.case, self.device = side, case, device
        self.length, self.taken_s = 0, 0.0
        """Of the last run."""

    def step(self, length: int) -> Callable[[], None]:
        """Forward and backward."""
        q, k, v, g = torch.randn(4, self.case.channels, 3, length, device=self.device)
        if self.side == CONVOLUTION:
            return trainer(vector_long_conv, [q, k], [g])
        block = None if self.side == PLAIN else BLOCK
        return trainer(partial(vector_attention, block=block), [q, k, v], [g])

    def run(self, length: int) -> None:
        step, self.length = self.step(length), length
        began = now(self.device)
        step()
        self.taken_s = now(self.device) - began

    def excess(self, length: int) -> tuple[float, str] | None:
        """What a run at that length would take, where that is more than it may."""
        tokens, pairs = NUMBERS[self.side]
        held = 4 * self.case.channels * (tokens * length + pairs * length**2)
        if held > self.case.memory_bytes:
            return held / 2**30, "GiB"
        if self.length < min(length, PROBE):
            self.run(min(length, PROBE))  # also the first call of all, which takes longer
            self.run(self.length)
        growth = length / self.length
        seconds = self.taken_s * (growth if self.side == CONVOLUTION else growth**2)
        return (seconds, "seconds") if seconds > self.case.longest_s else None


def attention_rows(case: AttentionOptions, group: Group, device: torch.device) -> list[Row]:
    """Peak memory of one side in a process of its own, or the times of several in turn."""
    running = [_Contestant(side, case, device) for side in case.sides]
    measure = _memory if len(running) == 1 else partial(_times, group=group)
    return [
        row(title, 1, length, value, unit, ratio, case.channels)
        for title, length, value, unit, ratio in measure(case, running, device)
    ]


_Found = Iterator[tuple[str, int, float, str, float | None]]


def _memory(case: AttentionOptions, running: list[_Contestant], device: torch.device) -> _Found:
    """Short N first, because the system does not get back all that was freed."""
    (one,) = running
    for length in sorted(case.lengths):
        if excess := one.excess(length):
            yield f"{one.side}: would take", length, *excess, None
            return
        reset_peak(device)
        one.run(length)
        yield f"{one.side}: memory", length, peak_bytes(device), "B", None


def _times(
    case: AttentionOptions, running: list[_Contestant], device: torch.device, group: Group
) -> _Found:
    for length in sorted(case.lengths):
        running = [one for one in running if one.excess(length) is None]
        if CONVOLUTION not in [one.side for one in running]:
            return
        for one in running:
            one.run(length)
        steps = {one.side: one.step(length) for one in running}
        times = medians(steps, group, device, case.seconds)
        base = times.pop(CONVOLUTION)
        yield f"{CONVOLUTION}: time", length, base, "s", None
        for side, taken in times.items():
            yield f"{side}: time / {CONVOLUTION}", length, taken, "s", taken / base


def _points(case: AttentionOptions) -> list[Point]:
    together = Point(f"time_{joined(case.lengths)}", 1, replace(case, sides=SIDES))
    alone = [
        Point(f"memory_{side.replace(' ', '_')}_{joined(case.lengths)}", 1,
              replace(case, sides=[side]))
        for side in SIDES
    ]  # fmt: skip
    return [together, *alone]


def crossover(ratios: dict[int, float]) -> float | None:
    """N from which a ratio stays at least 1, between two measured N by a power law; None: never,
    0: everywhere."""
    lengths = sorted(ratios)
    below = [n for n in lengths if ratios[n] < 1]
    if not below or below[-1] == lengths[-1]:
        return None if below else 0.0
    left = below[-1]
    right = lengths[lengths.index(left) + 1]
    share = math.log(ratios[left]) / (math.log(ratios[left]) - math.log(ratios[right]))
    return left * (right / left) ** share


def _conclude(_case: AttentionOptions, rows: list[Row]) -> tuple[list[Row], str]:
    remarks = []
    for side in (PLAIN, BLOCKED):
        title = f"{side}: time / {CONVOLUTION}"
        ratios = {r["length"]: r["ratio"] for r in rows if r["case"] == title}
        place = crossover(ratios)
        if place is None:
            said = "as fast as the long convolution or faster at every N measured"
        elif place == 0:
            said = "slower than the long convolution at every N measured"
        else:
            said = f"slower than the long convolution from N = {place:,.0f} on"
        stops = [r for r in rows if r["case"] == f"{side}: would take"]
        ends = [f"; N = {r['length']:,} would take {r['value']:.3g} {r['unit']}" for r in stops]
        remarks.append(f"- {side.capitalize()}: {said}{''.join(ends)}.")
    remarks.append("- Forward and backward; memory is the peak of a whole process.")
    return [r for r in rows if not r["case"].endswith("would take")], "\n".join(remarks)


BENCH = Experiment(AttentionOptions, _points, attention_rows, conclude=_conclude)
