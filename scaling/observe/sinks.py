"""TensorBoard: a view of the rows in metrics.jsonl."""

import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from scaling.observe.metrics import LARGEST, TIME_SHARES
from scaling.runs.rows import Row

# Sections of TensorBoard; what a row has besides lies under the name of its split.
SECTIONS = {
    "tokens": "speed",
    "tokens_per_s": "speed",
    "peak_bytes": "memory",
    **dict.fromkeys((*LARGEST, *TIME_SHARES), "time"),
    "comm_bytes": "exchange",
}


def tensorboard_command(folder: Path) -> str:
    """What to type to see the curves of the runs in `folder`, under their names, whether or not
    the environment is activated."""
    program, here = Path(sys.executable).with_name("tensorboard"), Path.cwd()
    if shutil.which("tensorboard") or not program.exists():
        program = Path("tensorboard")
    elif program.is_relative_to(here):
        program = program.relative_to(here)
    return f"{program} --logdir {folder}"


class TensorBoardSink:
    """Scalars of every row, at the row's time.

    Opening it compares the event files with all rows so far. Where they agree they are left alone
    and later rows go to a file beside them. Else (a killed process had not flushed, rows were
    dropped on resuming) all rows are written anew and earlier files removed.
    """

    def __init__(self, folder: Path, rows: Iterable[Row]) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        rows, earlier = list(rows), list(folder.glob("events.out.tfevents.*"))
        if _agree(_events(folder), _scalars(rows)):
            return
        # A TensorBoard that is watching forgets what it has seen from step 0 on.
        self._writer = self._open(purge_step=0)
        for row in rows:
            self.write(row)
        self.flush()
        for path in earlier:
            path.unlink()

    def write(self, row: Row) -> None:
        if self._writer is None:  # the first row of this process: a start alone leaves no file
            self._writer = self._open()
        for tag, value in _tagged(row):
            self._writer.add_scalar(tag, value, row["step"], walltime=row.get("time"))

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
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


Scalars = dict[str, list[tuple[int, bytes, float | None]]]
"""Tag -> step, value as bytes of float32, which a NaN equals too, and time."""


def _scalars(rows: Iterable[Row]) -> Scalars:
    """What event files of these rows hold; times of early rows, which have none, are not known."""
    found: Scalars = defaultdict(list)
    for row in rows:
        for tag, value in _tagged(row):
            found[tag].append((row["step"], np.float32(value).tobytes(), row.get("time")))
    return found


def _agree(events: Scalars, rows: Scalars) -> bool:
    """Whether they are the same scalars at the same times, as far as the rows know these."""
    return events.keys() == rows.keys() and all(
        len(events[tag]) == len(rows[tag])
        and all(
            event[:2] == row[:2] and row[2] in (None, event[2])
            for event, row in zip(events[tag], rows[tag], strict=True)
        )
        for tag in rows
    )


def _events(folder: Path) -> Scalars:
    """What the event files of a folder hold."""
    if not folder.exists():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, np.float32(e.value).tobytes(), e.wall_time) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
