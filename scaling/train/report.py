"""Everything a run tells, in one place: rows, TensorBoard, progress, status, summary."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from data_pipeline.tasks.protocol import Task
from scaling.observe.memory import hardware
from scaling.observe.metrics import TIME_SHARES
from scaling.parallel.collectives import first_rank_says
from scaling.runs.environment import describe_environment
from scaling.runs.folder import RunFolder, RunWriter, claimed, tensorboard_command
from scaling.runs.identity import Identity
from scaling.runs.rows import NOT_FINITE, Row, of_split
from scaling.train.not_finite import said_of

_log = logging.getLogger(__name__)


@contextmanager
def claimed_together(
    path: Path, identity: Identity, config: Mapping[str, Any]
) -> Iterator[RunFolder]:
    """The folder, claimed by the first rank for all; a refusal is everybody's. Collective."""
    with ExitStack() as stack:
        runs: list[RunFolder] = []

        def claim() -> None:
            environment = describe_environment(**hardware())
            runs.append(stack.enter_context(claimed(path, identity, config, environment)))

        first_rank_says(claim)
        yield runs[0] if runs else RunFolder(path)


def progress_line(row: Row, steps: int) -> str:
    """What a row says to a person who waits for step `steps`."""
    at = f"step {row['step']}/{steps}"
    if row["split"] == NOT_FINITE:
        return f"{at} left out: {said_of(row)}"
    if row["split"] != "train":
        error = row["equivariance_error"]
        return f"{at} validation loss {row['loss']:.4f} equivariance error {error:.1e}"
    left = timedelta(seconds=int((steps - row["step"]) * row["step_s"]))
    slow = ""
    if "slow_rank" in row:
        slow = f" rank {row['slow_rank']} computes {row['slow_by']:.1f} times as long as others"
    return (
        f"{at} loss {row['loss']:.4f} {row['tokens_per_s']:,.0f} tokens/s "
        f"data wait {row['data_wait_s'] * 1e3:.0f} ms eta {left}{slow}"
    )


def evaluation_lines(run: Path, row: Row, baselines: Mapping[str, float]) -> list[str]:
    """What the row of an evaluation after training says to a person."""
    data = f" of {row['store']}" if row["store"] else ""
    counts = f"{row['samples']:,} samples, {row['tokens']:,} tokens"
    beside = "; ".join(f"{name} {value:.4f}" for name, value in baselines.items())
    return [
        f"{run} at step {row['step']}, {row['split']}{data}: {counts}",
        f"  loss                {_with_error(row)}  ({beside})",
        *(
            f"{'':<22}{_with_error(part)}  (tokens {part['from']:,} to {part['to'] - 1:,})"
            for part in row.get("error_by_position", ())
        ),
        f"  equivariance error  {_number(row['equivariance_error'], '.1e')}",
        "  (mean squared error over that of the trivial answer ± standard error over samples)",
    ]


def _with_error(row: Row) -> str:
    error = row["standard_error"]
    return f"{row['loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")


@dataclass
class Summary:
    """How a run stands, made from its rows; losses in units of the trivial answer."""

    folder: Path
    steps: int
    train_loss: float | None
    """Median of the last tenth of the training rows."""
    validation_loss: float | None
    tokens_per_s: float | None
    """Median of the training rows but the first."""
    peak_bytes: int | None
    """Of the rank that needed most."""
    equivariance_error: float | None
    time_shares: dict[str, float] = field(default_factory=dict)
    """Shares of the training rows' time, by part."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Validation loss of trivial answers."""
    status: str = "finished"

    def lines(self) -> list[str]:
        """For people."""
        time = ", ".join(f"{part} {share:.0%}" for part, share in self.time_shares.items())
        baselines = "; ".join(f"{name} {value:.4f}" for name, value in self.baselines.items())
        return [
            f"{self.folder}: {self.status} at step {self.steps}",
            f"  train loss          {_number(self.train_loss, '.4f')}",
            f"  validation loss     {_number(self.validation_loss, '.4f')}  ({baselines})",
            f"  equivariance error  {_number(self.equivariance_error, '.1e')}",
            f"  tokens/s            {_number(self.tokens_per_s, ',.0f')}",
            f"  time                {time or '-'}",
            f"  peak memory         {_number(self.peak_bytes, ',.0f', 2**20)} MiB a rank",
            f"  {tensorboard_command(self.folder.parent)}",
        ]


def summarise(folder: Path, rows: list[Row], steps: int, status: str) -> Summary:
    """The summary that rows up to step `steps` tell."""
    train, validation = of_split(rows, "train"), of_split(rows, "validation")
    last = validation[-1] if validation else {}
    speeds = [row["tokens_per_s"] for row in train[1:] or train]
    recent = [row["loss"] for row in train[-max(len(train) // 10, 1) :]]
    return Summary(
        folder=folder,
        steps=steps,
        train_loss=median(recent) if recent else None,
        validation_loss=last.get("loss"),
        tokens_per_s=median(speeds) if speeds else None,
        peak_bytes=max((row["peak_bytes"] for row in train), default=None),
        equivariance_error=last.get("equivariance_error"),
        time_shares=_time_shares(train[1:] or train),
        status=status,
    )


def _time_shares(rows: list[Row]) -> dict[str, float]:
    """Rows of earlier versions lack parts."""
    seconds = {name: sum(row.get(name, 0.0) for row in rows) for name in TIME_SHARES}
    whole = sum(seconds.values())
    return {name.removesuffix("_s"): x / whole for name, x in seconds.items() if x}


def _number(value: float | int | None, form: str, unit: int = 1) -> str:
    return "-" if value is None else format(value / unit, form)


class Reporter:
    """Tells on the first rank; others tell their logs."""

    def __init__(self, run: RunFolder, task: Task, steps: int) -> None:
        self._run, self._task, self._steps = run, task, steps
        self._writer = run if isinstance(run, RunWriter) else None
        self._earlier: list[Row] = []
        self._sink: Any = None
        self._began_finished = self._stepped = False

    def __enter__(self) -> "Reporter":
        return self

    def start(self, step: int, damage: str = "") -> None:
        """Training goes on after `step`; rows of later steps, which no checkpoint holds, go.

        Args:
            damage: why no newer checkpoint is used.
        """
        self._began_finished = step >= self._steps
        self._run.step = step
        if self._writer is not None:
            self._earlier = self._writer.keep(lambda row: row["step"] <= step)
            if not self._began_finished:
                self._writer.set_status("running")
        if damage:
            self.say(f"{damage}: an older one is used")
        if step > 0 and not self._began_finished:
            self.say(f"{self._run.path}: going on after step {step}")

    def row(self, row: Row) -> None:
        """A row for metrics.jsonl, TensorBoard and the person who watches."""
        if self._writer is None:
            return
        (row,) = self._writer.append(row)
        with self._writer.writing():
            self._tensorboard().write(row)
        print(progress_line(row, self._steps), flush=True)

    def say(self, text: str) -> None:
        """For the person who watches, and every rank's log."""
        _log.info(text)
        if self._writer is not None:
            print(text, flush=True)

    def advance(self, step: int, saved: bool) -> None:
        """A step is done."""
        self._run.step = step
        if not self._stepped:
            self._stepped = True
            _log.info("the first step of this process is done")
        if self._writer is None:
            return
        if saved:
            with self._writer.writing():
                if self._sink is not None:
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
                self._tensorboard()
                self._run.stop_file.unlink(missing_ok=True)
        self.say("\n".join(summary.lines()))
        if state == "interrupted":
            self.say("  the same command goes on from here")
        elif self._began_finished:
            longer = f"train.steps={2 * self._steps} goes on (on the longer schedule)"
            self.say(f"  nothing left to do: {longer}, another name=... starts another run")
        return summary

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # Of two errors the first says why.
        with suppress(OSError) if kind else nullcontext():
            if self._sink is not None:
                self._sink.close()

    def _tensorboard(self) -> Any:
        """Its sink, opened at the first row: the first step need not wait for the import."""
        if self._sink is None:
            from scaling.observe.sinks import TensorBoardSink, about_run

            self._sink = TensorBoardSink(self._run.tensorboard)
            self._sink.start(self._earlier, about_run(self._run))
        return self._sink
