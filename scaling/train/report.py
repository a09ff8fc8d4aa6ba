"""Everything a run tells, in one place: rows, TensorBoard, progress, status, summary."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType

from data_pipeline.errors import RunError
from data_pipeline.tasks.protocol import Task
from scaling.observe.progress import Progress, Summary, summarise
from scaling.observe.sinks import TensorBoardSink
from scaling.runs.rows import Row
from scaling.train.run import RunDirectory


class Reporter:
    """Tells on the first rank; on others it is silent. An error that leaves the `with` is noted
    in status.json; the run directory is free for others afterwards."""

    def __init__(self, run: RunDirectory, task: Task, steps: int) -> None:
        self._run, self._task, self._steps = run, task, steps
        self._step, self._began_finished = 0, False
        self._sink: TensorBoardSink | None = None
        self._progress = Progress(False, 0, steps)

    def __enter__(self) -> "Reporter":
        return self

    def start(self, step: int) -> None:
        """Training goes on after `step`; rows of later steps, which no checkpoint holds, go."""
        self._step, self._began_finished = step, step >= self._steps
        if not self._run.first:
            return
        with self._writing():
            rows = self._run.metrics.truncate(step)
            self._sink = TensorBoardSink(self._run.tensorboard, rows)
            if not self._began_finished:
                self._run.set_status("running", step)
        self._progress = Progress(True, step, self._steps)
        if step > 0 and not self._began_finished:
            self._progress.say(f"{self._run.path}: going on after step {step}")

    def row(self, row: Row) -> None:
        """A row for metrics.jsonl, TensorBoard and the person who watches."""
        if self._sink is None:
            return
        with self._writing():
            self._run.metrics.append(row)
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
        self._step = step
        self._progress.advance()
        if saved and self._sink is not None:
            with self._writing():
                self._sink.flush()
                self._run.set_status("running", step)

    def finish(self, step: int) -> Summary:
        """The summary, printed; the same on every rank but for the baselines (first rank only)."""
        state = "finished" if step >= self._steps else "interrupted"
        earlier = self._run.status().get("summary") or {}
        baselines = earlier.get("baselines") or (
            self._task.baselines("validation") if self._run.first else {}
        )
        summary = summarise(self._run.path, self._run.metrics.rows(), baselines, step, state)
        if self._run.first:
            with self._writing():
                self._run.set_status(state, step, summary=asdict(summary))
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
        try:
            with self._writing():
                if self._sink is not None:
                    self._sink.close()
                if error is not None and self._run.status().get("state") != "finished":
                    text = " ".join(f"{type(error).__name__}: {error}".split())
                    self._run.set_status("failed", self._step, error=text[:500])
        except RunError:
            if error is None:  # else that one came first, and says why
                raise
        finally:
            self._run.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Every write of a report goes through here."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write to the run {self._run.path}: {error}; make room, or start again if "
                "it was removed"
            ) from error
