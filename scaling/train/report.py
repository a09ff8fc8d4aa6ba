"""Everything a run tells, in one place: rows, TensorBoard, progress, status, summary."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.tasks.protocol import Task
from scaling.observe.hardware import hardware
from scaling.observe.progress import Progress, Summary, summarise
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
        self._began_finished = False
        self._sink: TensorBoardSink | None = None
        self._progress = Progress(False, 0, steps)

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
            self._sink = TensorBoardSink(self._run.tensorboard, rows)
        if not self._began_finished:
            self._writer.set_status("running")
        self._progress = Progress(True, step, self._steps)
        if step > 0 and not self._began_finished:
            self._progress.say(f"{self._run.path}: going on after step {step}")

    def row(self, row: Row) -> None:
        """A row for metrics.jsonl, TensorBoard and the person who watches."""
        if self._writer is None or self._sink is None:
            return
        (row,) = self._writer.append(row)
        with self._writer.writing():
            self._sink.write(row)
        if row["split"] == "train":
            self._progress.train(row)
        else:
            self._progress.validation(row)

    def say(self, line: str) -> None:
        """A line for the person who watches."""
        self._progress.say(line)

    def advance(self, step: int, saved: bool) -> None:
        """A step is done."""
        self._progress.advance()
        if self._writer is not None:
            self._writer.step = step
            if saved and self._sink is not None:
                with self._writer.writing():
                    self._sink.flush()
                self._writer.set_status("running")

    def finish(self, step: int) -> Summary:
        """The summary, printed; the same on every rank but for the baselines (first rank only)."""
        state = "finished" if step >= self._steps else "interrupted"
        earlier = self._run.status().get("summary") or {}
        baselines = earlier.get("baselines") or (
            self._task.baselines("validation") if self._writer else {}
        )
        summary = summarise(self._run.path, self._run.rows(), baselines, step, state)
        if self._writer is not None:
            self._writer.set_status(state, summary=asdict(summary))
            with self._writer.writing():
                self._run.stop_file.unlink(missing_ok=True)
        self._progress.close()
        for line in [*summary.lines(), *self._way_on(state)]:
            self._progress.say(line)
        return summary

    def _way_on(self, state: str) -> list[str]:
        if state == "interrupted":
            return ["  the same command goes on from here"]
        if self._began_finished:
            longer = f"train.steps={2 * self._steps} goes on (on the longer schedule)"
            return [f"  nothing left to do: {longer}, another name=... starts another run"]
        return []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.close()
        if self._sink is not None:
            try:
                self._sink.close()
            except OSError:
                if error is None:  # else that one came first, and says why
                    raise
