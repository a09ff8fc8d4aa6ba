"""What a person watching sees: a bar or plain lines on the first rank, a summary at the end."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tqdm import tqdm

from scaling.observe.metrics import TIME_SHARES
from scaling.observe.sinks import tensorboard_command
from scaling.runs.rows import Row, of_split


class Progress:
    """A bar where stdout is a terminal, else one line a training row; silent if not `shown`."""

    def __init__(self, shown: bool, start: int, steps: int) -> None:
        self._shown = shown
        self._terminal = shown and sys.stdout.isatty()
        self._steps = steps
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=not self._terminal,
            file=sys.stdout,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def advance(self) -> None:
        self._bar.update()

    def train(self, row: Row) -> None:
        if self._terminal:
            self._bar.set_postfix_str(_figures(row))
        else:
            left = (self._steps - row["step"]) * row["step_s"]
            self.say(f"step {row['step']}/{self._steps} {_figures(row)} eta {_clock(left)}")

    def validation(self, row: Row) -> None:
        self.say(
            f"step {row['step']}/{self._steps} validation loss {row['loss']:.4f} "
            f"equivariance error {row['equivariance_error']:.1e}"
        )

    def say(self, line: str) -> None:
        if self._terminal:
            self._bar.write(line, file=sys.stdout)
        elif self._shown:
            print(line, flush=True)

    def close(self) -> None:
        self._bar.close()


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
        lines = [
            f"{self.folder}: {self.status} at step {self.steps}",
            f"  train loss          {_number(self.train_loss, '.4f')}",
            f"  validation loss     {_number(self.validation_loss, '.4f')}  ({baselines})",
            f"  equivariance error  {_number(self.equivariance_error, '.1e')}",
            f"  tokens/s            {_number(self.tokens_per_s, ',.0f')}",
            f"  time                {time or '-'}",
            f"  peak memory         {_number(self.peak_bytes, ',.0f', 2**20)} MiB a rank",
            f"  {tensorboard_command(self.folder.parent)}",
        ]
        return lines


def summarise(
    folder: Path, rows: list[Row], baselines: dict[str, float], steps: int, status: str
) -> Summary:
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
        baselines=baselines,
        status=status,
    )


def _time_shares(rows: list[Row]) -> dict[str, float]:
    """Rows of earlier versions lack parts."""
    seconds = {name: sum(row.get(name, 0.0) for row in rows) for name in TIME_SHARES}
    whole = sum(seconds.values())
    return {name.removesuffix("_s"): x / whole for name, x in seconds.items() if x}


def _figures(row: Row) -> str:
    return (
        f"loss {row['loss']:.4f} {row['tokens_per_s']:,.0f} tokens/s "
        f"data wait {row['data_wait_s'] * 1e3:.0f} ms"
    )


def _clock(seconds: float | int) -> str:
    return tqdm.format_interval(int(seconds))


def _number(value: float | int | None, form: str, unit: int = 1) -> str:
    return "-" if value is None else format(value / unit, form)
