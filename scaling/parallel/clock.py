"""Where the time of a step goes, by part: everything that takes its time enters one of

    projection   pointwise modules, their recomputation and their backward
    transforms   the long convolutions, forward and backward, except for
    comm         waiting in the sequence's exchanges

    with clock.part("projection"):        or, on a function: @clock.part("projection")
        ...

Parts nest, across functions and threads: a moment counts for the innermost part alone. Autograd
knows nothing of it: a backward has to enter its part itself, as an autograd.Function can.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal

import torch
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

    def start(self, device: torch.device) -> None:
        """Begins anew."""
        self._device, self._marks = device, []
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


clock = Clock()
