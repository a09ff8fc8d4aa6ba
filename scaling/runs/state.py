"""What became of a run, as its folder and the processes of this machine tell; changes nothing."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from psutil import Error, NoSuchProcess, Process

from data_pipeline.errors import RunError
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row

RECENT = 20
"""Rows whose median step says when a run will end."""
CLOCKS = 2.0
"""Seconds that a process may seem to have begun after what it wrote."""


@dataclass(frozen=True)
class RunState:
    """A word and what more is known."""

    state: str
    """not started, running, interrupted, finished, failed, killed: its process is gone without a
    word; unknown: it ran on another machine. Of a job of SLURM too: pending, not begun; preempted,
    it has saved and is in the queue again."""
    detail: str


def state_of(run: RunFolder, in_queue: Callable[[str], str | None] = lambda job: None) -> RunState:
    """Also of one that another process writes.

    Args:
        in_queue: a job's state in SLURM's queue; empty: it is not there; None: nobody knows.

    Raises:
        RunError: the folder holds no run, or its files cannot be read.
    """
    config = run.config()
    status = run.status()
    rows = run.rows()
    step, steps = _step(rows, status), (config.get("train") or {}).get("steps")
    place = f"step {step:,}" + (f" of {steps:,}" if steps else "") if step is not None else ""
    state = status.get("state", "not started")
    job = run.job() if state != "finished" else ""
    queued = in_queue(job) if job else None
    if queued == "PENDING" and state == "running":
        why = f"without a word; job {job} is in the queue again, and goes on"
        return RunState("killed", _joined(place, why, _age(run, rows)))
    if queued == "PENDING":
        word = "preempted" if status else "pending"
        return RunState(word, _joined(place, f"job {job} is in the queue", _age(run, rows)))
    if queued and queued != "COMPLETING" and state != "running":
        return RunState("running", _joined(place, f"job {job} begins"))
    if state != "running":
        reasons = {
            "failed": str(status.get("error")),
            "interrupted": "the same command goes on",
            "finished": _result(status),
        }
        return RunState(state, _joined(place, reasons.get(state, ""), _age(run, rows)))
    if status.get("host") != socket.gethostname():
        if queued:
            return RunState("running", _joined(place, f"job {job}", _eta(rows, step, steps),
                                               _age(run, rows)))  # fmt: skip
        if queued == "":
            why = f"job {job} has left the queue without a word; the same command goes on"
            return RunState("killed", _joined(place, why, _age(run, rows)))
        why = f"on {status.get('host')}, which alone can tell"
        return RunState("unknown", _joined(place, why, _age(run, rows)))
    if not _alive(status.get("pid"), run):
        why = f"process {status.get('pid')} is gone without a word; the same command goes on"
        return RunState("killed", _joined(place, why, _age(run, rows)))
    return RunState("running", _joined(place, _eta(rows, step, steps), _age(run, rows)))


def _step(rows: list[Row], status: dict[str, Any]) -> int | None:
    """The last that left a row; of what has no steps none."""
    return max((row["step"] for row in rows if "step" in row), default=status.get("step") or None)


def _result(status: dict[str, Any]) -> str:
    loss = (status.get("summary") or {}).get("validation_loss")
    return f"validation loss {loss:.4g}" if isinstance(loss, float) else ""


def _eta(rows: list[Row], step: int | None, steps: int | None) -> str:
    recent = [row["step_s"] for row in rows[-RECENT:] if row.get("split") == "train"]
    if not recent or not steps or step is None:
        return ""
    return f"about {duration((steps - step) * median(recent))} left"


def _age(run: RunFolder, rows: list[Row]) -> str:
    """Since something was written."""
    if rows and "time" in rows[-1]:
        return f"last row {duration(time.time() - rows[-1]['time'])} ago"
    path = run.path / "status.json"
    if not path.exists():
        return ""
    return f"no row yet, begun {duration(time.time() - path.stat().st_mtime)} ago"


def _alive(pid: Any, run: RunFolder) -> bool:
    """Whether the process that wrote the status still is; another may have its number by now."""
    written = os.stat(run.path / "status.json").st_mtime
    try:
        return Process(pid).create_time() <= written + CLOCKS
    except NoSuchProcess:
        return False
    except (Error, TypeError, ValueError) as error:
        raise RunError(f"{run.path}/status.json names process {pid!r}, which cannot be asked "
                       f"({error})") from error  # fmt: skip


def _joined(*texts: str) -> str:
    return ", ".join(text for text in texts if text)


def duration(seconds: float) -> str:
    """For reading: 5 s, 3 min, 2.5 h, 4 days."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
