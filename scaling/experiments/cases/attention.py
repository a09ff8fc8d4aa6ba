"""Vector attention, plain and in blocks, beside the long convolution until it no longer fits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count, Positive, Selection
from scaling.experiments.timing import both_ways, medians, now, peak_of
from scaling.ops import vector_long_conv
from scaling.ops.attention import vector_attention
from scaling.ops.pairs import block_tokens
from scaling.runs.rows import Row

CONVOLUTION, PLAIN, BLOCKED = "long convolution", "plain attention", "attention in blocks"
NUMBERS = {CONVOLUTION: (52, 0), PLAIN: (0, 18), BLOCKED: (30, 0)}
"""What forward and backward hold: numbers a token, and a pair of tokens, of a channel; measured.
Small tensors' memory is not given back at once on a CPU, and adds up to half as much."""
PROBE = 2048
"""The N from whose time that of a longer one is foreseen, tokens."""


@dataclass
class Attention(Experiment):
    """
    Args:
        lengths: N, tokens.
        channels: vector channels.
        memory_bytes: a side stops before the N at which it would hold more.
        longest_s: and before the N at which forward and backward would take longer, s.
        seconds: of every comparison, of three rounds at least.
    """

    lengths: Selection
    channels: Count = 1
    memory_bytes: Count = 1 << 32
    longest_s: Positive = 10.0
    seconds: Positive = 2.0

    def points(self) -> Iterator[Point]:
        for n in sorted(self.lengths):
            yield Point("time", length=n)
            for side in NUMBERS:
                yield Point("memory", side, n)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """Peak memory of one side, or the times of all that fit."""
        if side := point.side:
            if excess := self._excess(side, point.length, device):
                yield row(f"{side}: would take", *excess, channels=self.channels)
            else:
                peak = peak_of(self._step(side, point.length, device), device)
                yield row(f"{side}: memory", peak, "B", channels=self.channels)
            return
        fitting = [side for side in NUMBERS if not self._excess(side, point.length, device)]
        if CONVOLUTION not in fitting:
            return
        steps = {side: self._step(side, point.length, device) for side in fitting}
        times = medians(steps, self.seconds, device)
        for side, taken in times.items():
            ratio = None if side == CONVOLUTION else taken / times[CONVOLUTION]
            title = f"{side}: time" if ratio is None else f"{side}: time / {CONVOLUTION}"
            yield row(title, taken, "s", ratio, channels=self.channels)

    def _step(self, side: str, length: int, device: torch.device) -> Callable[[], object]:
        q, k, v, g = torch.randn(4, self.channels, 3, length, device=device)
        if side == CONVOLUTION:
            return both_ways(vector_long_conv, [q, k], [g])
        block = None if side == PLAIN else block_tokens(device.type, self.channels)
        return both_ways(partial(vector_attention, block=block), [q, k, v], [g])

    def _excess(self, side: str, length: int, device: torch.device) -> tuple[float, str] | None:
        """What a run at that length would take, where that is more than it may."""
        tokens, pairs = NUMBERS[side]
        held = 4 * self.channels * (tokens * length + pairs * length**2)
        if held > self.memory_bytes:
            return held / 2**30, "GiB"
        if length <= PROBE:
            return None
        step = self._step(side, PROBE, device)
        step()  # the first call takes longer
        began = now(device)
        step()
        growth = length / PROBE
        seconds = (now(device) - began) * (growth if side == CONVOLUTION else growth**2)
        return (seconds, "seconds") if seconds > self.longest_s else None

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        """Where attention becomes slower, and the first N that was too much."""
        remarks = []
        for side in (PLAIN, BLOCKED):
            beside = [r for r in rows if r["case"] == f"{side}: time / {CONVOLUTION}"]
            if not beside:
                continue
            fast = max((r["length"] for r in beside if r["ratio"] < 1), default=0)
            slow = min((r["length"] for r in beside if r["length"] > fast), default=0)
            said = "as fast as the long convolution, or faster, at the longest N"
            if slow:
                said = f"slower than the long convolution from N = {slow:,} on"
            stops = [r for r in rows if r["case"] == f"{side}: would take"]
            for stop in sorted(stops, key=lambda r: r["length"])[:1]:
                said += f"; N = {stop['length']:,} would take {stop['value']:.3g} {stop['unit']}"
            remarks.append(f"- {side.capitalize()}: {said}.")
        remarks.append("- Forward and backward; memory is the peak of a whole process.")
        return [r for r in rows if not r["case"].endswith("would take")], "\n".join(remarks)
