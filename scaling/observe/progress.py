"""What a person watching sees: a line a row, a summary at the end."""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median

from scaling.observe.metrics import TIME_SHARES
from scaling.observe.sinks import tensorboard_command
from scaling.runs.rows import Row, of_split


def progress_line(row: Row, steps: int) -> str:
    """What a row says to a person who waits for step `steps`."""
    at = f"step {row['step']}/{steps}"
    if row["split"] != "train":
        error = row["equivariance_error"]
        return f"{at} validation loss {row['loss']:.4f} equivariance error {error:.1e}"
    left = timedelta(seconds=int((steps - row["step"]) * row["step_s"]))
    return (
        f"{at} loss {row['loss']:.4f} {row['tokens_per_s']:,.0f} tokens/s "
        f"data wait {row['data_wait_s'] * 1e3:.0f} ms eta {left}"
    )


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
