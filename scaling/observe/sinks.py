"""Views of the rows in metrics.jsonl."""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from scaling.runs.rows import Row

# Sections of TensorBoard; what a row has besides lies under the name of its split.
SECTIONS = {
    "tokens": "speed",
    "tokens_per_s": "speed",
    "step_s": "time",
    "data_wait_s": "time",
    "forward_s": "time",
    "backward_s": "time",
    "optimizer_s": "time",
    "projection_s": "time",
    "transforms_s": "time",
    "comm_s": "time",
    "other_s": "time",
    "comm_bytes": "exchange",
    "peak_bytes": "memory",
}


def tensorboard_command(folder: Path) -> str:
    """What to type to see the curves in `folder`, whether or not the environment is activated."""
    program, here = Path(sys.executable).with_name("tensorboard"), Path.cwd()
    if shutil.which("tensorboard") or not program.exists():
        program = Path("tensorboard")
    elif program.is_relative_to(here):
        program = program.relative_to(here)
    return f"{program} --logdir {folder}"


class TensorBoardSink:
    """Scalars of every row.

    Opening it writes all rows so far anew and removes the event files of earlier processes: what a
    killed process had not flushed is there, what was dropped on resuming is not, no step is twice.
    """

    def __init__(self, folder: Path, rows: Iterable[Row]) -> None:
        earlier = list(folder.glob("events.out.tfevents.*"))
        # A TensorBoard that is watching forgets what it has seen from step 0 on.
        self._writer = SummaryWriter(str(folder), purge_step=0, filename_suffix=".rows")
        for row in rows:
            self.write(row)
        self.flush()
        for path in earlier:
            path.unlink()

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                section = SECTIONS.get(name, row["split"]) if row["split"] == "train" else None
                self._writer.add_scalar(f"{section or row['split']}/{name}", value, row["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
