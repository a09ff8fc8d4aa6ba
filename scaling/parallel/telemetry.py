"""What a stretch of work takes: its time by nested ranges, and what this rank exchanges in it.

    with measuring(device) as step:
        with timed("forward"):                  or on a function: @timed("transforms")
            ...
    step.total_s, step.within("forward"), step.innermost()["comm"], step.exchanges["long_conv"]

Ranges of a training step:

    data_wait  forward  backward  optimizer
        projection   pointwise modules, their recomputation and their backward
        transforms   the long convolutions, forward and backward, except for
        comm         waiting in the sequence's exchanges
        pairs        all pairs of tokens, likewise

A measurement sees what its own thread does while it is entered, also in one that is entered inside,
and the backward passes that the thread starts, whichever thread runs them. Autograd knows nothing
of ranges: a backward enters its own, as an autograd.Function can, and `timed_both_ways` has it done
for a function of tensors.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

_ACTIVE = "longfold.measurements"


@dataclass
class ExchangeCount:
    """What one operator has exchanged."""

    calls: int = 0
    bytes: int = 0
    """Sent to other ranks by this one."""
    seconds: float = 0.0
    """Time in which this rank waited for them (host time; with NCCL only the launch)."""
    transfer_s: float = 0.0
    """From their start to their arrival (likewise); what nobody waited for, computing hid."""


class Measurement:
    """Times and exchanges of this rank; see `measuring`."""

    def __init__(self, device: torch.device) -> None:
        self.exchanges: defaultdict[str, ExchangeCount] = defaultdict(ExchangeCount)
        """By operator."""
        self.total_s = 0.0
        self.exchange: str | None = None
        """The one that is waited for."""
        self._seconds: dict[tuple[str, ...], float] = defaultdict(float)
        """By the ranges entered, from the outside in."""
        self._on_cuda = device.type == "cuda"
        self._inside: list[str] = []
        self._marks: list[tuple[tuple[str, ...], Any]] = []
        """Moments, and the ranges that one is in from then on."""

    def within(self, name: str) -> float:
        """Seconds in ranges of that name, whatever was entered inside."""
        return sum((s for path, s in self._seconds.items() if name in path), 0.0)

    def innermost(self) -> dict[str | None, float]:
        """Seconds by the innermost range; None: outside of all. They add up to total_s."""
        seconds: dict[str | None, float] = defaultdict(float)
        for path, some in self._seconds.items():
            seconds[path[-1] if path else None] += some
        return seconds

    @property
    def sent_bytes(self) -> int:
        """Sent to other ranks by this one."""
        return sum(each.bytes for each in self.exchanges.values())

    @property
    def waited_s(self) -> float:
        """Time in which this rank waited for exchanges."""
        return sum((each.seconds for each in self.exchanges.values()), 0.0)

    @property
    def transfer_s(self) -> float:
        """Time in which exchanges were under way, whether or not this rank waited for them."""
        return sum((each.transfer_s for each in self.exchanges.values()), 0.0)

    def _mark(self) -> None:
        if self._on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = perf_counter()
        self._marks.append((tuple(self._inside), now))

    def _close(self) -> None:
        self._mark()
        if self._on_cuda:
            self._marks[-1][1].synchronize()
        for (path, began), (_, ended) in pairwise(self._marks):
            self._seconds[path] += (
                began.elapsed_time(ended) / 1e3 if self._on_cuda else ended - began
            )
        self.total_s = sum(self._seconds.values(), 0.0)
        self._marks = []


@contextmanager
def measuring(device: torch.device | str = "cpu") -> Iterator[Measurement]:
    """Measures what happens inside; its numbers are there on leaving.

    On CUDA a range lasts from where its first kernel can begin to the end of its last: events on
    the current stream, read at the end, so that nothing is synchronised inside.
    """
    measurement, outer = Measurement(torch.device(device)), _active()
    _activate((*outer, measurement))
    measurement._mark()
    try:
        yield measurement
    finally:
        _activate(outer)
    measurement._close()


@contextmanager
def timed(name: str) -> Iterator[None]:
    """What happens inside belongs to the range of that name, in measurements and in traces."""
    measurements = _active()
    for measurement in measurements:
        measurement._inside.append(name)
        measurement._mark()
    try:
        with record_function(f"longfold.{name}") if is_traced() else nullcontext():
            yield
    finally:
        for measurement in measurements:
            measurement._inside.pop()
            measurement._mark()


def timed_both_ways(
    name: str, run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
) -> tuple[Tensor, ...]:
    """run(*tensors) in the range, and so its backward: from the gradients of all its results to
    those of all its tensors. Where none of these has one, nothing tells when it is over."""
    with timed(name):
        if not _active() or not any(x.requires_grad for x in tensors):
            return run(*tensors)
        backward = ExitStack()
        results = run(*_Border.apply(backward.close, *tensors))
        return _Border.apply(lambda: backward.enter_context(timed(name)), *results)


@contextmanager
def exchanging(operator: str, sent: int, transfer: "Transfer | None" = None) -> Iterator[None]:
    """Counts one exchange of `sent` bytes, and the time inside as waiting for it.

    Args:
        transfer: of an exchange that was started before.
    """
    began, measurements = perf_counter(), _active()
    for measurement in measurements:
        measurement.exchange = f"{'all_to_all' if transfer else 'all_reduce'} of {operator}"
    with timed("comm"):
        yield
    waited = perf_counter() - began
    for measurement in measurements:
        measurement.exchange = None
        count = measurement.exchanges[operator]
        count.calls += 1
        count.bytes += sent
        count.seconds += waited
        count.transfer_s += transfer.seconds() if transfer else waited


class Transfer:
    """When an exchange under way began, and when it arrived if that was before anybody waited."""

    def __init__(self) -> None:
        self._began = perf_counter()
        self._arrived: float | None = None

    def arrived(self, _: object = None) -> None:
        """Called by whoever completes it, in whichever thread."""
        self._arrived = perf_counter()

    def seconds(self) -> float:
        """Until it arrived, or until now."""
        return (self._arrived or perf_counter()) - self._began


class Progress:
    """Where this process is in its training, for a thread that looks on."""

    step = 0
    """The one under way, or the last."""
    measured: Measurement | None = None
    """Of the step under way."""

    def ranges(self) -> tuple[str, ...]:
        """From the outside in."""
        return () if self.measured is None else tuple(self.measured._inside)

    def exchange(self) -> str | None:
        """The one that is waited for: `all_to_all of long_conv`."""
        return None if self.measured is None else self.measured.exchange

    def moves(self) -> int:
        """How often a range was entered or left in the step."""
        return 0 if self.measured is None else len(self.measured._marks)


progress = Progress()


def innermost_range() -> str | None:
    """The range entered last, in this thread's measurement; None: outside of all, or no such."""
    inside = [measurement._inside for measurement in _active()][-1:]
    return inside[0][-1] if inside and inside[0] else None


def is_measured() -> bool:
    """Whether somebody measures what this thread does."""
    return bool(_active())


def is_traced() -> bool:
    """Whether a profiler writes down what this thread does."""
    return _profiler_enabled()


def _active() -> tuple[Measurement, ...]:
    """This thread's measurements, the outermost first. Torch takes its thread-local values along to
    the threads of a backward pass, unlike Python's."""
    return torch._C._get_obj_in_tls(_ACTIVE) if torch._C._is_key_in_tls(_ACTIVE) else ()


def _activate(measurements: tuple[Measurement, ...]) -> None:
    if measurements:
        torch._C._stash_obj_in_tls(_ACTIVE, measurements)
    else:  # what is left there would be freed without Python's lock when the thread ends
        torch._C._remove_obj_from_tls(_ACTIVE)


class _Border(torch.autograd.Function):
    """The same tensors; `crossed` is called where their gradients pass."""

    @staticmethod
    def forward(ctx: Any, crossed: Callable[[], object], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.crossed = crossed
        ctx.set_materialize_grads(False)
        same = tuple(x.view_as(x) for x in tensors)
        trained = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(x for x, y in zip(same, trained, strict=True) if not y))
        return same

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.crossed()
        return None, *grads
