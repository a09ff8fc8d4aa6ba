"""Everything a run tells, in one place: rows, TensorBoard, progress, status, summary."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.tasks.protocol import Task
from scaling.observe.hardware import hardware
from scaling.observe.progress import Summary, progress_line, summarise
from scaling.observe.sinks import TensorBoardSink
from scaling.parallel.collectives import first_rank_says
from scaling.runs.environment import describe_environment
from scaling.runs.folder import RunFolder, RunWriter, claimed
from scaling.runs.identity import Identity
from scaling.runs.rows import Row


@contextmanager
def claimed_together(
    path: Path, identity: Identity, config: Mapping[str, Any]
) -> Iterator[RunFolder]:
    """The folder, claimed by the first rank for all; a refusal is everybody's. Collective."""
    run = RunFolder(path)
    with ExitStack() as stack:

        def claim() -> None:
            nonlocal run
            environment = describe_environment(**hardware())
            run = stack.enter_context(claimed(path, identity, config, environment))

        first_rank_says(claim)
        yield run


class Reporter:
    """Tells on the first rank; on others it is silent."""

    def __init__(self, run: RunFolder, task: Task, steps: int) -> None:
        self._run, self._task, self._steps = run, task, steps
        self._writer = run if isinstance(run, RunWriter) else None
        self._sink = TensorBoardSink(run.tensorboard)
        self._began_finished = False

    def __enter__(self) -> "Reporter":
        return self

    def start(self, step: int) -> None:
        """Training goes on after `step`; rows of later steps, which no checkpoint holds, go."""
        self._began_finished = step >= self._steps
        if self._writer is None:
            return
        self._writer.step = step
        rows = self._writer.keep(lambda row: row["step"] <= step)
        with self._writer.writing():
            self._sink.start(rows)
        if not self._began_finished:
            self._writer.set_status("running")
            if step > 0:
                self.say(f"{self._run.path}: going on after step {step}")

    def row(self, row: Row) -> None:
        """A row for metrics.jsonl, TensorBoard and the person who watches."""
        if self._writer is None:
            return
        (row,) = self._writer.append(row)
        with self._writer.writing():
            self._sink.write(row)
        self.say(progress_line(row, self._steps))

    def say(self, line: str) -> None:
        """A line for the person who watches."""
        if self._writer is not None:
            print(line, flush=True)

    def advance(self, step: int, saved: bool) -> None:
        """A step is done."""
        if self._writer is None:
            return
        self._writer.step = step
        if saved:
            with self._writer.writing():
                self._sink.flush()
            self._writer.set_status("running")

    def finish(self, step: int) -> Summary:
        """The summary, printed; the same on every rank but for the baselines (first rank only)."""
        state = "finished" if step >= self._steps else "interrupted"
        summary = summarise(self._run.path, self._run.rows(), step, state)
        if self._writer is not None:
            earlier = self._run.status().get("summary") or {}
            summary.baselines = earlier.get("baselines") or self._task.baselines("validation")
            self._writer.set_status(state, summary=asdict(summary))
            with self._writer.writing():
                self._run.stop_file.unlink(missing_ok=True)
        for line in summary.lines():
            self.say(line)
        if state == "interrupted":
            self.say("  the same command goes on from here")
        elif self._began_finished:
            longer = f"train.steps={2 * self._steps} goes on (on the longer schedule)"
            self.say(f"  nothing left to do: {longer}, another name=... starts another run")
        return summary

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # Of two errors the first says why.
        with suppress(OSError) if kind else nullcontext():
            self._sink.close()
