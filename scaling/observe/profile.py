"""A trace of a few training steps, for a viewer: what ran when, on every rank.

Our own ranges in it are longfold.data_wait, .forward, .backward, .optimizer and, inside of these,
.projection, .transforms and .comm: see parallel/telemetry.py.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import profile, schedule

from data_pipeline.errors import RunError
from scaling.observe.metrics import WARMUP_STEPS
from scaling.parallel.collectives import group_rank


class StepProfiler:
    """Traces `count` steps of this process, those after its warm-up; 0 none. A file a rank.

    Traced steps are slower: StepMeter leaves them out of its means. Every rank needs the same
    count and the same steps.
    """

    def __init__(self, folder: Path, count: int, say: Callable[[str], None]) -> None:
        self._folder, self._count, self._say = folder, count, say
        self._steps: list[int] = []
        """Of this process, so far."""

    def __enter__(self) -> "StepProfiler":
        if self._count:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else ranks note their start and stop
            self._profile = profile(
                schedule=schedule(wait=WARMUP_STEPS - 1, warmup=1, active=self._count, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profile.start()
        return self

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of that number."""
        self._steps.append(number)
        yield
        if self._count:
            self._profile.step()  # writes after the last of them
            if len(self._steps) == WARMUP_STEPS + self._count and dist.is_initialized():
                dist.barrier()  # else the next step would wait for who writes longest

    def _write(self, trace: profile) -> None:
        if not (traced := self._steps[WARMUP_STEPS:]):
            return
        first, last = traced[0], traced[-1]
        # What TensorBoard's profiler plugin looks for ends so.
        name = f"rank{group_rank(None)}.steps{first}-{last}.pt.trace.json.gz"
        path = self._folder / name
        try:
            path.parent.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"cannot write the trace {path}: {error}; make room, or say profile_steps=0"
            ) from error
        self._say(f"traced steps {first} to {last}: open {path} in ui.perfetto.dev")

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if not self._count:
            return
        with suppress(RunError) if kind else nullcontext():
            self._profile.stop()  # writes what has been traced, if that was cut short
        if not kind and 0 < len(self._steps) <= WARMUP_STEPS:
            self._say(
                f"profile_steps={self._count} traced nothing: this process took "
                f"{len(self._steps)} steps, and the first {WARMUP_STEPS} warm up"
            )
