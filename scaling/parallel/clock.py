"""Where the time of a step goes, by part: everything that takes its time enters one of

    projection   pointwise modules, their recomputation and their backward
    transforms   the long convolutions, forward and backward, except for
    comm         waiting in the sequence's exchanges

    with clock.part("projection"):        or, on a function: @clock.part("projection")
        ...

Parts nest, across functions and threads: a moment counts for the innermost part alone. Autograd
knows nothing of it: a backward has to enter its part itself, as an autograd.Function can, and
`both_ways` has it done for a function of tensors.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import record_function

Part = Literal["projection", "transforms", "comm"]


class Clock:
    """Times parts between `start` and `stop`; at all other times entering a part does nothing.

    On CUDA a part lasts from where its first kernel can begin to the end of its last: events on
    the current stream, read by `stop`, so that nothing is synchronised inside.
    """

    tracing = False
    """Whether parts appear as ranges in a profiler's trace; see observe/profile.py."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._inside: list[Part] = []
        self._marks: list[tuple[Part | None, Any]] = []
        """Moments, and the part that begins there; None: outside of all."""
        self._backward: list[AbstractContextManager[None]] = []
        """Parts that a backward pass is in."""

    def start(self, device: torch.device) -> None:
        """Begins anew."""
        self._device, self._marks = device, []
        self._inside, self._backward = [], []
        self._mark(None)

    def stop(self) -> dict[Part | None, float]:
        """Time since the start in s by part; None: outside of all. On CUDA waits for the device."""
        self._mark(None)
        marks, on_cuda = self._marks, self._on_cuda
        self._device, self._marks = None, []
        if on_cuda:
            marks[-1][1].synchronize()
        seconds: dict[Part | None, float] = defaultdict(float)
        for (part, began), (_, ended) in pairwise(marks):
            seconds[part] += began.elapsed_time(ended) / 1e3 if on_cuda else ended - began
        return seconds

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """What happens inside belongs to the part, unless it enters another."""
        if self._device is None:
            yield
            return
        self._inside.append(name)
        self._mark(name)
        try:
            with self.range(name):
                yield
        finally:
            self._inside.pop()
            self._mark(self._inside[-1] if self._inside else None)

    def both_ways(
        self, name: Part, run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """run(*tensors) in the part, and so its backward: from the gradients of all its results to
        those of all its tensors. Where none of these has one, nothing tells when it is over."""

        def enter() -> None:
            self._backward.append(self.part(name))
            self._backward[-1].__enter__()

        def leave() -> None:
            self._backward.pop().__exit__(None, None, None)

        with self.part(name):
            if self._device is None or not any(x.requires_grad for x in tensors):
                return run(*tensors)
            return _with_border(enter, run(*_with_border(leave, tensors)))

    def range(self, name: str) -> AbstractContextManager[object]:
        """A range in the trace alone."""
        return record_function(f"longfold.{name}") if self.tracing else nullcontext()

    @property
    def now(self) -> Part | None:
        """The innermost part entered; None: outside of all."""
        return self._inside[-1] if self._inside else None

    @property
    def _on_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    def _mark(self, part: Part | None) -> None:
        if self._on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = perf_counter()
        self._marks.append((part, now))


def _with_border(crossed: Callable[[], None], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same tensors; `crossed` is called where their gradients pass."""
    trained = iter(_Border.apply(crossed, *(x for x in tensors if x.requires_grad)))
    return tuple(next(trained) if x.requires_grad else x for x in tensors)


class _Border(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossed: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.crossed = crossed
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.crossed()
        return None, *grads


clock = Clock()
