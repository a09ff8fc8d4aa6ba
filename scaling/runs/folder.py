"""A run's folder: read by anybody at any time, written by one process.

config.yaml         the whole configuration of the latest start
identity.json       the part of it that defines the result; another one is refused
environment.json    versions, host, ranks, command line, git commit
status.json         state (running, finished, failed, interrupted), step, process, error
metrics.jsonl       rows: see rows.py                   tensorboard/    a view of them
checkpoints/        see checkpoint/checkpoint.py        profile/        see observe/profile.py
evaluations.jsonl   rows that `eval` adds, also while the run goes on
logs/               a file a rank: see log.py
ranks/              while it trains, where each rank is: see launch/ranks/watch.py
jobs/               of SLURM, counted from 1: script, configuration, program, logs, job.json
STOP                put there by a person: save, stop, and remove it
Experiments have points/ (what their processes were told and said) and tables instead of the latter.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import time
from typing import Any, Literal

import yaml

from data_pipeline.disk import locked, write_atomically
from data_pipeline.errors import RunError
from scaling.runs.identity import Identity
from scaling.runs.rows import Row, as_lines, of_split, read_rows

State = Literal["running", "finished", "failed", "interrupted"]


class RunFolder:
    """Reads a run, also while another process writes it; changes nothing."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.stop_file = self.path / "STOP"
        self._rows_file = self.path / "metrics.jsonl"
        self.step = 0
        """How far the run is, as far as this process knows."""

    def config(self) -> dict[str, Any]:
        """The whole configuration of the latest start.

        Raises:
            RunError: the folder holds none, or it cannot be read.
        """
        path = self.path / "config.yaml"
        try:
            content = yaml.safe_load(path.read_text())
            if not isinstance(content, dict):
                raise ValueError("no mapping")
        except (FileNotFoundError, NotADirectoryError) as error:
            lack = "has no config.yaml" if self.path.is_dir() else "there is no such folder"
            raise RunError(f"{self.path} is no run ({lack}): name the folder of one, such as "
                           "runs/first_light") from error  # fmt: skip
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"{path} cannot be read ({reason}); make it readable, or let the run's "
                           "own command write it again") from error  # fmt: skip
        return content

    def identity(self) -> dict[str, Any]:
        """The part of the configuration that defines the result; empty before the first start."""
        return self._read("identity.json")

    def environment(self) -> dict[str, Any]:
        """Command, versions, machine and commit of the latest start; empty before the first."""
        return self._read("environment.json")

    def status(self) -> dict[str, Any]:
        """What status.json says; empty before the first start."""
        return self._read("status.json")

    def job(self) -> str:
        """Id of the latest job that was submitted for it; empty: none."""
        jobs = [path for path in self.path.glob("jobs/*/job.json") if path.parent.name.isdecimal()]
        if not jobs:
            return ""
        newest = max(jobs, key=lambda path: int(path.parent.name))
        return str(self._read(str(newest.relative_to(self.path))).get("id", ""))

    def rows(self) -> list[Row]:
        """All whole rows so far."""
        return read_rows(self._rows_file)

    def validation_losses(self) -> dict[int, float]:
        """By the steps that were validated."""
        return {row["step"]: row["loss"] for row in of_split(self.rows(), "validation")}

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict):
                raise ValueError("no mapping")
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}); remove it and start again") from error
        return content


def tensorboard_command(folder: Path) -> str:
    """What to type to see the curves of the runs in `folder`, under their names, whether or not
    the environment is activated."""
    return f"{os.path.relpath(Path(sys.executable).with_name('tensorboard'))} --logdir {folder}"


def add_evaluation(run: RunFolder, row: Row) -> Path:
    """Adds a row, with the time, to the file of evaluations that came after training, which no
    lock guards: the run itself may be going on. The file.

    Raises:
        RunError: it cannot be written.
    """
    path = run.path / "evaluations.jsonl"
    try:
        with path.open("a") as file:
            file.write(as_lines([{"time": time()} | row]))  # at once: others may add, too
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); make room, or change its "
                       "permissions") from error  # fmt: skip
    return path


class RunWriter(RunFolder):
    """The one process that writes; see `claimed`."""

    def append(self, *rows: Row) -> list[Row]:
        """Adds rows, with the time; they are on disk when it returns."""
        stamped = [{"time": time()} | row for row in rows]
        with self.writing(), self._rows_file.open("a") as file:
            file.write(as_lines(stamped))
            file.flush()
            os.fsync(file.fileno())
        return stamped

    def keep(self, wanted: Callable[[Row], bool]) -> list[Row]:
        """Drops the other rows and half a last line, at once or not at all. Returns the rest."""
        rows = [row for row in self.rows() if wanted(row)]
        self.write("metrics.jsonl", as_lines(rows))
        return rows

    def set_status(
        self, state: State, error: str | None = None, summary: Mapping[str, Any] | None = None
    ) -> None:
        """Rewrites status.json."""
        status = {
            "state": state,
            "step": self.step,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "error": error,
            "summary": summary,
        }
        self.write("status.json", json.dumps(status, indent=1, default=str) + "\n")

    def write(self, name: str, text: str) -> None:
        """A file of the folder, replaced at once, and only if it would change."""
        path = self.path / name
        with self.writing():
            if not path.exists() or path.read_text() != text:
                write_atomically(path, text)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Every write goes through here: a full disk, or a removed folder, is one line."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write to the run {self.path}: {error}; make room, or start again if it "
                "was removed"
            ) from error


@contextmanager
def claimed(
    path: Path | str,
    identity: Identity,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    parent: str = "runs",
    wait: bool = False,
) -> Iterator[RunWriter]:
    """Opens or creates a run's folder for writing; only one process at a time gets it.

    An error that leaves the body is noted in status.json, unless the run had finished.

    Args:
        config: the whole configuration, nested.
        parent: the key that chooses the folder around it.
        wait: for another process that has it, instead of an error.

    Raises:
        RunError: not writable, in use by another process, or of another identity (differing keys
            are named with both values).
    """
    run = RunWriter(path)
    lock = run.path / ".lock"
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise RunError(
            f"the run directory {run.path} cannot be written ({error.strerror}); choose another by "
            f"{parent}=..., or change its permissions"
        ) from error
    with ExitStack() as stack:
        try:
            sure = stack.enter_context(locked(lock, wait))
        except BlockingIOError as error:
            owner = lock.read_text().strip() or "another process"
            raise RunError(
                f"the run {path} is being written by {owner}; wait for it, stop it, or choose "
                "another name=..."
            ) from error
        if not sure:
            raise RunError(f"the file system of {path} has no locks; choose another folder")
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        earlier = run.identity()
        if earlier and (differing := identity.differences(earlier)):
            raise RunError(
                f"the run {run.path} belongs to another configuration: {'; '.join(differing)}; "
                "use those values, or choose another name=..."
            )
        run.write("identity.json", json.dumps(identity.values(), indent=1) + "\n")
        run.write("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        run.write("environment.json", json.dumps(environment, indent=1) + "\n")
        try:
            yield run
        except BaseException as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            try:
                if run.status().get("state") != "finished":
                    run.set_status("failed", error=text[:500])
            except RunError:
                pass  # the first error says more
            raise
