"""A trace of a few training steps, for a viewer: what ran when, on every rank.

Our own ranges in it are longfold.data_wait, .forward, .backward, .optimizer and, inside of these,
.projection, .transforms and .comm: see parallel/telemetry.py.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.profiler import profile, schedule

from data_pipeline.errors import RunError
from scaling.observe.metrics import WARMUP_STEPS


class StepProfiler:
    """Traces `count` steps of this process, those after its warm-up; 0 none. A file a rank.

    Traced steps are slower: StepMeter leaves them out of its means. Every rank needs the same
    count and the same steps.
    """

    def __init__(self, folder: Path, count: int, say: Callable[[str], None]) -> None:
        self._folder, self._count, self._say = folder, count, say
        self._steps: list[int] = []
        """Of this process, so far."""
        self._written = False
        self._profile: profile | None = None
        if count:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else ranks note their start and stop
            self._profile = profile(
                schedule=schedule(wait=WARMUP_STEPS - 1, warmup=1, active=count, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )

    def __enter__(self) -> "StepProfiler":
        if self._profile is not None:
            self._profile.start()
        return self

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of that number."""
        self._steps.append(number)
        yield
        if self._profile is not None:
            self._profile.step()  # writes after the last of them
            if len(self._steps) == WARMUP_STEPS + self._count:
                self._stop()
                if dist.is_initialized():
                    dist.barrier()  # else the next step would wait for who writes longest

    def _stop(self) -> None:
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()  # writes what has been traced

    def _write(self, trace: profile) -> None:
        traced = self._steps[WARMUP_STEPS:]
        if not traced:
            return
        rank = dist.get_rank() if dist.is_initialized() else 0
        steps = f"steps{traced[0]}-{traced[-1]}"
        # What TensorBoard's profiler plugin looks for ends so.
        path = self._folder / f"rank{rank}.{steps}.pt.trace.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"cannot write the trace {path}: {error}; make room, or say profile_steps=0"
            ) from error
        self._written = True
        self._say(f"traced steps {traced[0]} to {traced[-1]}: open {path} in ui.perfetto.dev")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(RunError) if error else nullcontext():
            self._stop()
        if self._count and self._steps and not (self._written or error):
            self._say(
                f"profile_steps={self._count} traced nothing: this process took "
                f"{len(self._steps)} steps, and the first {WARMUP_STEPS} warm up"
            )
