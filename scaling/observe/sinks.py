"""TensorBoard: a view of the rows in metrics.jsonl, with what the folder says about the run."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, scalar, text

from scaling.observe.metrics import LARGEST, TIME_SHARES
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row

Summary = Any
"""A protobuf message of TensorBoard's, made at run time: one tag and what is shown under it."""
Shown = tuple[int, bytes, float | None]
"""Step, what is shown with its tag (bytes, which a NaN equals too), and the time of a row's."""
# Sections of TensorBoard; what a row has besides lies under the name of its split.
SECTIONS = {
    "peak_bytes": "memory",
    "tokens": "speed",
    "tokens_per_s": "speed",
    **dict.fromkeys((*LARGEST, *TIME_SHARES), "time"),
    "comm_bytes": "exchange",
    "transfer_s": "exchange",
}
PAGES = {
    "learning": {
        "loss": ["loss/train", "loss/validation"],
        "gradient norm": ["train/grad_norm"],
    },
    "scaling": {
        "where a step's time goes, s": [f"time/{name}" for name in TIME_SHARES],
        "tokens/s of all ranks": ["speed/tokens_per_s"],
        "bytes sent by a rank": ["exchange/comm_bytes"],
        "peak memory of a rank, bytes": ["memory/peak_bytes"],
    },
}
"""Of a run's custom scalars: page -> chart -> tags."""


def about_run(run: RunFolder) -> list[Summary]:
    """Command and configuration as texts, what defines the result as hyperparameters, and PAGES.

    A run's last losses stand beside its hyperparameters. TensorBoard takes which columns there are
    from the first run that says so: none does, so that runs of different models can be compared.
    """
    _, session, _ = hparams(_flat(run.identity()), {})
    return [*about_folder(run), session, pages(PAGES)]


def about_folder(run: RunFolder) -> list[Summary]:
    """Command and configuration as texts."""
    configuration = yaml.safe_dump(run.config(), sort_keys=False, allow_unicode=True)
    command = f"    {run.environment().get('command')}"
    return [text("command", command), text("configuration", indent(configuration, "    "))]


def pages(charts: Mapping[str, Mapping[str, Sequence[str]]]) -> Summary:
    """The layout of custom scalars: page -> chart -> regular expressions of tags."""
    return custom_scalars(
        {
            page: {chart: ["Multiline", list(tags)] for chart, tags in of_page.items()}
            for page, of_page in charts.items()
        }
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            simple = value is None or isinstance(value, (bool, int, float, str))
            flat[prefix + key] = value if simple else str(value)
    return flat


class TensorBoardSink:
    """Scalars of every row, at the row's time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self, rows: Sequence[Row], about: Sequence[Summary] = ()) -> None:
        """Compares the event files with all rows so far, and what is said about them. Where they
        agree they are left alone and later rows go to a file beside them. Else (a killed process
        had not flushed, rows were dropped on resuming, the run got another configuration) all is
        written anew and earlier files removed."""
        earlier = list(self._folder.glob("events.out.tfevents.*"))
        if _in_files(earlier) == _expected(rows, about):
            return
        # A TensorBoard that is watching forgets what it has seen from step 0 on.
        self._writer = self._open(purge_step=0)
        for summary in about:
            self._writer.add_summary(summary, 0)
        for row in rows:
            self.write(row)
        self.flush()
        for path in earlier:
            path.unlink()

    def write(self, row: Row) -> None:
        """Adds a row."""
        if self._writer is None:  # the first row of this process: a start alone leaves no file
            self._writer = self._open()
        for summary in _summaries(row):
            self._writer.add_summary(summary, row["step"], row.get("time"))

    def flush(self) -> None:
        """What has been written can be seen."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Writes no more."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, purge_step: int | None = None) -> Any:
        """A writer of whole summaries, which SummaryWriter has, but not in its interface."""
        options = {"purge_step": purge_step, "filename_suffix": ".rows"}
        return SummaryWriter(str(self._folder), **options).file_writer


def _summaries(row: Row) -> Iterator[Summary]:
    """A row's numbers under TensorBoard's names."""
    split = row["split"]
    sections = SECTIONS if split == "train" else {}
    for name, value in row.items():
        if isinstance(value, (int, float)) and name not in ("step", "time"):
            # The few columns that the page of hyperparameters begins with are the first by name.
            tag = f"loss/{split}" if name == "loss" else f"{sections.get(name, split)}/{name}"
            yield scalar(tag, value)


def _expected(rows: Sequence[Row], about: Sequence[Summary]) -> Counter[Shown]:
    """What event files of these hold, and how often: once each."""
    shown: Counter[Shown] = Counter()
    for summary in about:
        shown.update((0, value.SerializeToString(), None) for value in summary.value)
    for row in rows:
        values = (value for summary in _summaries(row) for value in summary.value)
        shown.update((row["step"], v.SerializeToString(), row.get("time")) for v in values)
    return shown


def _in_files(files: Sequence[Path]) -> Counter[Shown]:
    """What event files hold; of a file that a killed process left, the whole records."""
    shown: Counter[Shown] = Counter()
    for file in files:
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                time = event.wall_time if value.HasField("simple_value") else None
                shown[event.step, value.SerializeToString(), time] += 1
    return shown
