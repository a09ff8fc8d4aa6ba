"""TensorBoard: a view of the rows in metrics.jsonl."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from scaling.observe.metrics import LARGEST, TIME_SHARES
from scaling.runs.rows import Row

Scalar = tuple[str, int, bytes, float | None]
"""Tag, step, value as bytes of float32, which a NaN equals too, and time."""
# Sections of TensorBoard; what a row has besides lies under the name of its split.
SECTIONS = {
    "tokens": "speed",
    "tokens_per_s": "speed",
    "peak_bytes": "memory",
    **dict.fromkeys((*LARGEST, *TIME_SHARES), "time"),
    "comm_bytes": "exchange",
    "transfer_s": "exchange",
}


def tensorboard_command(folder: Path) -> str:
    """What to type to see the curves of the runs in `folder`, under their names, whether or not
    the environment is activated."""
    return f"{os.path.relpath(Path(sys.executable).with_name('tensorboard'))} --logdir {folder}"


class TensorBoardSink:
    """Scalars of every row, at the row's time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def start(self, rows: list[Row]) -> None:
        """Compares the event files with all rows so far. Where they agree they are left alone and
        later rows go to a file beside them. Else (a killed process had not flushed, rows were
        dropped on resuming) all rows are written anew and earlier files removed."""
        earlier = list(self._folder.glob("events.out.tfevents.*"))
        if (_events(self._folder) if earlier else set()) == _scalars(rows):
            return
        # A TensorBoard that is watching forgets what it has seen from step 0 on.
        self._writer = self._open(purge_step=0)
        for row in rows:
            self.write(row)
        self.flush()
        for path in earlier:
            path.unlink()

    def write(self, row: Row) -> None:
        """Adds a row."""
        if self._writer is None:  # the first row of this process: a start alone leaves no file
            self._writer = self._open()
        for tag, value in _tagged(row):
            self._writer.add_scalar(tag, value, row["step"], walltime=row.get("time"))

    def flush(self) -> None:
        """What has been written can be seen."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Writes no more."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        return SummaryWriter(str(self._folder), purge_step=purge_step, filename_suffix=".rows")


def _tagged(row: Row) -> Iterator[tuple[str, float]]:
    """TensorBoard's names of a row's numbers."""
    for name, value in row.items():
        if isinstance(value, (int, float)) and name not in ("step", "time"):
            section = SECTIONS.get(name, row["split"]) if row["split"] == "train" else None
            yield f"{section or row['split']}/{name}", value


def _scalars(rows: list[Row]) -> set[Scalar]:
    """What event files of these rows hold."""
    return {
        (tag, row["step"], np.float32(value).tobytes(), row.get("time"))
        for row in rows
        for tag, value in _tagged(row)
    }


def _events(folder: Path) -> set[Scalar]:
    """What the event files of a folder hold."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        (tag, event.step, np.float32(event.value).tobytes(), event.wall_time)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
