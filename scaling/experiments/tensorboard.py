"""TensorBoard scalars made from measured rows."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from scaling.experiments.plots import Row

SCALARS = ("tokens_per_s", "step_s", "comm_s", "comm_bytes", "all_to_alls", "peak_bytes")


def write_sweep(rows: Sequence[Row], folder: Path) -> None:
    """One TensorBoard run per sp, the sequence length as its step; earlier files are replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    for sp in sorted({row["sp"] for row in rows}):
        with SummaryWriter(str(folder / f"sp={sp}")) as writer:
            for row in rows:
                if row["sp"] == sp and row["status"] == "ok":
                    for name in SCALARS:
                        writer.add_scalar(f"sweep/{name}", row[name], int(row["length"]))
