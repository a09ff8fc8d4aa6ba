"""What the long convolution costs, beside its rivals and its own FFTs, in one run each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from data_pipeline.errors import OptionError
from scaling.experiments.experiment import Experiment, Point, joined, row
from scaling.experiments.options import Checked, Count, Counts, Positive
from scaling.experiments.rivals import CROSS, channel_all_to_all_conv, expanded_conv, transforms
from scaling.experiments.timing import medians
from scaling.long_conv.form import fast_length
from scaling.observe.memory import peak_bytes, reset_peak
from scaling.ops import geometric_long_conv, vector_long_conv
from scaling.parallel.collectives import Group, global_maxima
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import measuring
from scaling.runs.identity import NotIdentity
from scaling.runs.rows import Row

GOALS = {
    "vector, forward: speed-up over the listing": (">=", 4.5),
    "vector, forward: time / its 9 FFTs": ("<=", 1.15),
    "vector, forward + backward: time / its 18 FFTs": ("<=", 1.3),
    "geometric, forward: time / its 15 FFTs": ("<=", 1.15),
    "geometric, forward + backward: time / its 30 FFTs": ("<=", 1.3),
    "vector, forward + backward: time / channel all-to-all": ("<=", 1.05),
    "1 channel: time / per channel of 8": ("<=", 1.3),
    "3 channels: time / per channel of 8": ("<=", 1.3),
    "memory: residual of a + b N/P": ("<=", 0.1),
    "float32: error, centred": ("<=", 1e-6),
}
"""How the geometric mean over N, or the largest value of the last two, should compare."""


@dataclass
class LongConvOptions(Checked):
    """
    Args:
        lengths: N, tokens; multiples of every number in sp.
        sp: numbers of ranks: one alone (against FFTs and the paper's listing), several against the
            channel all-to-all.
        tokens: channels are 8, or as many fewer as keep channels · N within this.
        seconds: of every comparison.
    """

    lengths: Annotated[Counts, NotIdentity()]
    sp: Annotated[Counts, NotIdentity()]
    tokens: Count = 1 << 22
    seconds: Positive = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for length, sp in ((n, sp) for n in self.lengths for sp in self.sp if n % sp):
            raise OptionError(
                "lengths",
                length,
                f"is no multiple of sp={sp}, which the channel all-to-all needs; try"
                f" {length // sp * sp or sp}",
            )


def long_conv_rows(case: LongConvOptions, group: Group, device: torch.device) -> list[Row]:
    """All comparisons that this number of ranks allows."""
    # Memory first, and short sequences first: what was freed is not given back to the system.
    rows = [_Bench(length, 1, group, device, 0.0).memory() for length in sorted(case.lengths)]
    for length in sorted(case.lengths):
        channels = max(1, min(8, case.tokens // length))
        bench = _Bench(length, channels, group, device, case.seconds)
        if bench.shard.size == 1:
            rows += [*bench.local(), bench.accuracy()]
        else:
            rows += bench.sharded()
    return rows


def memory_fit(rows: list[Row]) -> Row:
    """Peak = a + b N/P by least squares over all memory rows; the largest relative residual.

    `value` is the residual, `base` a in bytes, `per_token` b in bytes per local token.
    """
    points = [each for each in rows if each["case"] == "memory"]
    x = torch.tensor([each["length"] / each["sp"] for each in points]).double()
    y = torch.tensor([each["value"] for each in points]).double()
    design = torch.stack([torch.ones_like(x), x], 1)
    # Relative residuals count, so that short sequences do.
    a, b = torch.linalg.lstsq(design / y[:, None], torch.ones_like(y)[:, None]).solution[:, 0]
    residual = ((a + b * x - y).abs() / y).max().item()
    fit = row("memory: residual of a + b N/P", 0, 0, residual, "")
    return fit | {"sp": "all", "base": a.item(), "per_token": b.item()}


class _Bench:
    """One length."""

    def __init__(
        self, length: int, channels: int, group: Group, device: torch.device, seconds: float
    ) -> None:
        self.shard = SequenceShard(length, group)
        self.channels, self.group, self.device, self.seconds = channels, group, device, seconds

    def tensors(self, channels: int, *components: int, n: int | None = None) -> list[Tensor]:
        """Random tokens (channels, component, n_local), or (channels, n_local) for 0."""
        n = self.shard.n_local if n is None else n
        shapes = [(channels, c, n) if c else (channels, n) for c in components]
        return [torch.randn(shape, device=self.device) for shape in shapes]

    def row(self, case: str, value: float, unit: str = "s", ratio: float | None = None) -> Row:
        return row(
            case, self.shard.size, self.shard.length, value, unit, ratio, channels=self.channels
        )

    def against(self, case: str, times: dict[str, float], rival: str) -> Row:
        return self.row(case, times["ours"], ratio=times["ours"] / times[rival])

    def compare(
        self, ours: Callable[[], object], **rivals: Callable[[], object]
    ) -> dict[str, float]:
        return medians({"ours": ours, **rivals}, self.group, self.device, self.seconds)

    def local(self) -> list[Row]:
        """One rank: against the listing and against bare FFTs; awkward lengths."""
        n = self.shard.length
        q, k, g = self.tensors(self.channels, 3, 3, 3)
        u = torch.fft.rfft(g)
        times = self.compare(
            lambda: vector_long_conv(q, k),
            listed=lambda: expanded_conv(CROSS, q, k),
            bare=lambda: transforms([q, k], [u], n),
        )
        speed_up = times["listed"] / times["ours"]
        rows = [
            self.row("vector, forward: speed-up over the listing", times["ours"], ratio=speed_up),
            self.against("vector, forward: time / its 9 FFTs", times, "bare"),
        ]
        times = self.compare(
            trainer(vector_long_conv, [q, k], [g]),
            bare=lambda: transforms([q, k, g], [u, u, u], n),
        )
        rows.append(self.against("vector, forward + backward: time / its 18 FFTs", times, "bare"))

        def geometric(qs: Tensor, q: Tensor, ks: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            return geometric_long_conv((qs, q), (ks, k))

        given, grads = self.tensors(self.channels, 0, 3, 0, 3), self.tensors(self.channels, 0, 3, 3)
        (four, seven) = self.tensors(self.channels, 4, 7)
        in_four, in_seven = torch.fft.rfft(four), torch.fft.rfft(seven)
        times = self.compare(
            lambda: geometric(*given), bare=lambda: transforms([four, four], [in_seven], n)
        )
        rows.append(self.against("geometric, forward: time / its 15 FFTs", times, "bare"))
        times = self.compare(
            trainer(geometric, given, grads),
            bare=lambda: transforms([four, four, seven], [in_seven, in_four, in_four], n),
        )
        case = "geometric, forward + backward: time / its 30 FFTs"
        rows.append(self.against(case, times, "bare"))
        a, b = self.tensors(self.channels, 3, 3, n=awkward_length(n))
        times = self.compare(lambda: vector_long_conv(a, b), fast=lambda: vector_long_conv(q, k))
        rows.append(self.against("vector, forward: time at an awkward N / at N", times, "fast"))
        return rows

    def accuracy(self) -> Row:
        """float32 against float64 of centred input, relative to the norm."""
        q, k = (x.double() for x in self.tensors(1, 3, 3))
        q, k = (x - x.mean(-1, keepdim=True) for x in (q, k))
        exact, found = vector_long_conv(q, k), vector_long_conv(q.float(), k.float())
        error = ((found - exact).norm() / exact.norm()).item()
        return self.row("float32: error, centred", error, unit="")

    def sharded(self) -> list[Row]:
        """Several ranks: against the channel all-to-all; few channels; what is exchanged."""
        q, k, g = self.tensors(self.channels, 3, 3, 3)

        def ours(q: Tensor, k: Tensor) -> Tensor:
            return vector_long_conv(q, k, self.shard)

        def by_channels(q: Tensor, k: Tensor) -> Tensor:
            return channel_all_to_all_conv(q, k, self.group)

        rows = []
        train = trainer(ours, [q, k], [g])
        if self.channels % self.shard.size == 0:
            times = self.compare(train, channels=trainer(by_channels, [q, k], [g]))
            case = "vector, forward + backward: time / channel all-to-all"
            rows.append(self.against(case, times, "channels"))
        if self.channels == 8:
            few = {
                str(c): trainer(ours, [q[:c].clone(), k[:c].clone()], [g[:c].clone()])
                for c in (1, 3)
            }
            times = self.compare(train, **few)
            for c, name in ((1, "1 channel"), (3, "3 channels")):
                value = times[str(c)] / c
                case = f"{name}: time / per channel of 8"
                rows.append(self.row(case, value, ratio=value / (times["ours"] / 8)))
        times, steps, ranks = self.compare(train), 3, self.shard.size
        with measuring(self.device) as measured:
            for _ in range(steps):
                train()
        count = measured.exchanges["long_conv"]
        (exposed,) = global_maxima(count.seconds / steps, group=self.group, device=self.device)
        bins = self.shard.length // ranks // 2 + 1
        formula = 18 * self.channels * bins * 8 * (ranks - 1) / ranks
        share = exposed / times["ours"]
        rows.append(
            self.row("exchange: time not hidden / forward + backward", exposed, ratio=share)
        )
        sent = count.bytes / steps
        rows.append(self.row("exchange: bytes / formula", sent, unit="B", ratio=sent / formula))
        return rows

    def memory(self) -> Row:
        """Peak of a rank over forward and backward, everything in the process included."""
        given, (g,) = self.tensors(self.channels, 3, 3), self.tensors(self.channels, 3)
        reset_peak(self.device)
        trainer(lambda q, k: vector_long_conv(q, k, self.shard), given, [g])()
        (peak,) = global_maxima(peak_bytes(self.device), group=self.group, device=self.device)
        return self.row("memory", peak, unit="B")


def trainer(
    convolve: Callable[..., Tensor | tuple[Tensor, ...]], given: list[Tensor], grads: list[Tensor]
) -> Callable[[], None]:
    """Forward and backward."""
    given = [x.detach().requires_grad_() for x in given]

    def step() -> None:
        for x in given:
            x.grad = None
        results = convolve(*given)
        torch.autograd.backward(results, grads if isinstance(results, tuple) else grads[0])

    return step


def awkward_length(n: int) -> int:
    """The largest length below n that is no fast one and odd: padded, then folded."""
    n -= 1 + n % 2
    while fast_length(n) == n and n > 1:
        n -= 2
    return n


def _points(case: LongConvOptions) -> list[Point]:
    return [
        Point(f"sp{sp}_{joined(case.lengths)}", sp, replace(case, sp=[sp]))
        for sp in sorted(case.sp)
    ]


def _conclude(_case: LongConvOptions, rows: list[Row]) -> tuple[list[Row], str]:
    fit = memory_fit(rows)
    return [*(each for each in rows if each["case"] != "memory"), fit], (
        f"Peak memory of a rank: {fit['base'] / 1e6:,.0f} MB + {fit['per_token']:,.0f}"
        " bytes a local token (vector convolution of one channel, forward and backward)."
    )


BENCH = Experiment(LongConvOptions, _points, long_conv_rows, GOALS, _conclude)
