"""What the long convolution costs, beside its rivals and its own FFTs, in one run each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from data_pipeline.errors import OptionError
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count, Positive, Selection
from scaling.experiments.rivals import CROSS, channel_all_to_all_conv, expanded_conv, transforms
from scaling.experiments.timing import both_ways, medians, peak_of
from scaling.long_conv.form import fast_length
from scaling.ops import geometric_long_conv, vector_long_conv
from scaling.parallel.collectives import global_maxima
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import measuring
from scaling.runs.rows import Row

CHANNELS = 8


@dataclass
class LongConv(Experiment):
    """
    Args:
        lengths: N, tokens; multiples of every number in sp.
        sp: numbers of ranks: one alone (against FFTs and the paper's listing), several against the
            channel all-to-all.
        tokens: channels are 8, or as many fewer as keep channels · N within this.
        seconds: of every comparison.
    """

    lengths: Selection
    sp: Selection
    tokens: Count = 1 << 22
    seconds: Positive = 2.0

    goals: ClassVar = {
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for length, sp in ((n, sp) for n in self.lengths for sp in self.sp if n % sp):
            raise OptionError(
                "lengths",
                length,
                f"is no multiple of sp={sp}, which the channel all-to-all needs; try"
                f" {length // sp * sp or sp}",
            )

    def points(self) -> Iterator[Point]:
        return (Point(length=n, ranks=sp) for sp in sorted(self.sp) for n in sorted(self.lengths))

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """Memory, then all comparisons that this number of ranks allows."""
        shard = SequenceShard(point.length)
        q, k, g = torch.randn(3, 1, 3, shard.n_local, device=device)
        train = both_ways(partial(vector_long_conv, shard=shard), [q, k], [g])
        yield row("memory", peak_of(train, device), "B", channels=1)
        channels = max(1, min(CHANNELS, self.tokens // point.length))
        compared = self._shared(shard, channels, device)
        if point.ranks == 1:
            compared = self._alone(point.length, channels, device)
        for each in compared:
            yield each | {"channels": channels}

    def _alone(self, n: int, channels: int, device: torch.device) -> Iterator[Row]:
        """One rank: against the listing and against bare FFTs; awkward lengths; accuracy."""
        normal = partial(torch.randn, device=device)
        q, k, g = normal(3, channels, 3, n)
        qs, ks, gs = normal(3, channels, n)
        four, seven = normal(channels, 4, n), normal(channels, 7, n)
        u, in_four, in_seven = map(torch.fft.rfft, (g, four, seven))

        def geometric(qs: Tensor, q: Tensor, ks: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            return geometric_long_conv((qs, q), (ks, k))

        forward = partial(vector_long_conv, q, k)
        times = medians(
            {"ours": forward, "listed": partial(expanded_conv, CROSS, q, k)}, self.seconds, device
        )
        speed_up = times["listed"] / times["ours"]
        yield row("vector, forward: speed-up over the listing", times["ours"], "s", speed_up)
        for case, ours, tokens, spectra in (
            ("vector, forward: time / its 9 FFTs", forward, [q, k], [u]),
            (
                "vector, forward + backward: time / its 18 FFTs",
                both_ways(vector_long_conv, [q, k], [g]),
                [q, k, g],
                [u, u, u],
            ),
            (
                "geometric, forward: time / its 15 FFTs",
                partial(geometric, qs, q, ks, k),
                [four, four],
                [in_seven],
            ),
            (
                "geometric, forward + backward: time / its 30 FFTs",
                both_ways(geometric, [qs, q, ks, k], [gs, g, q]),
                [four, four, seven],
                [in_seven, in_four, in_four],
            ),
        ):
            yield self._beside(case, ours, partial(transforms, tokens, spectra, n), device)
        a, b = normal(2, channels, 3, awkward_length(n))
        awkward = partial(vector_long_conv, a, b)
        yield self._beside("vector, forward: time at an awkward N / at N", awkward, forward, device)
        q, k = (x - x.mean(-1, keepdim=True) for x in (q[:1].double(), k[:1].double()))
        exact, single = vector_long_conv(q, k), vector_long_conv(q.float(), k.float())
        error = ((single - exact).norm() / exact.norm()).item()
        yield row("float32: error, centred", error, "")

    def _shared(self, shard: SequenceShard, channels: int, device: torch.device) -> Iterator[Row]:
        """Several ranks: against the channel all-to-all; few channels; what is exchanged."""
        tensors = torch.randn(3, channels, 3, shard.n_local, device=device)
        by_tokens = partial(vector_long_conv, shard=shard)
        by_channels = partial(channel_all_to_all_conv, group=shard.group)

        def train(convolve: Callable[..., Tensor], channels: int) -> Callable[[], object]:
            q, k, g = tensors[:, :channels].clone()
            return both_ways(convolve, [q, k], [g])

        ours, ranks = train(by_tokens, channels), shard.size
        if channels % ranks == 0:
            case = "vector, forward + backward: time / channel all-to-all"
            yield self._beside(case, ours, train(by_channels, channels), device)
        if channels == CHANNELS:
            few = {count: train(by_tokens, count) for count in (1, 3)}
            sides = {"8": ours, "1 channel": few[1], "3 channels": few[3]}
            times = medians(sides, self.seconds, device)
            for side, count in (("1 channel", 1), ("3 channels", 3)):
                one = times[side] / count
                ratio = one / (times["8"] / CHANNELS)
                yield row(f"{side}: time / per channel of 8", one, "s", ratio)
        whole, steps = medians({"ours": ours}, self.seconds, device)["ours"], 3
        with measuring(device) as measured:
            for _ in range(steps):
                ours()
        count = measured.exchanges["long_conv"]
        (exposed,) = global_maxima(count.seconds / steps, device=device)
        case = "exchange: time not hidden / forward + backward"
        yield row(case, exposed, "s", exposed / whole)
        bins = shard.length // ranks // 2 + 1
        formula = 18 * channels * bins * 8 * (ranks - 1) / ranks
        sent = count.bytes / steps
        yield row("exchange: bytes / formula", sent, "B", sent / formula)

    def _beside(
        self,
        case: str,
        ours: Callable[[], object],
        rival: Callable[[], object],
        device: torch.device,
    ) -> Row:
        times = medians({"ours": ours, "rival": rival}, self.seconds, device)
        return row(case, times["ours"], "s", times["ours"] / times["rival"])

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        fit = memory_fit(rows)
        return [*(each for each in rows if each["case"] != "memory"), fit], (
            f"Peak memory of a rank: {fit['base'] / 1e6:,.0f} MB + {fit['per_token']:,.0f}"
            " bytes a local token (vector convolution of one channel, forward and backward)."
        )


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
    case = "memory: residual of a + b N/P"
    return row(case, residual, "", sp="all", length=0, base=a.item(), per_token=b.item())


def awkward_length(n: int) -> int:
    """The largest length below n that is no fast one and odd: padded, then folded."""
    n -= 1 + n % 2
    while fast_length(n) == n and n > 1:
        n -= 2
    return n
