"""A run's directory: what it is, how it stands, and that only one process writes to it.

config.yaml         the whole configuration of the latest start
identity.json       the part of it that defines the result; another one is refused
environment.json    versions, host, ranks, command line, git commit
status.json         state (running, finished, failed, interrupted), step, process, error
metrics.jsonl       rows: see observe/metrics.py        tensorboard/    a view of them
checkpoints/        see checkpoint/checkpoint.py        profile/        see observe/profile.py
STOP                put there by a person: save, stop, and remove it
"""

import fcntl
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from data_pipeline.errors import RunError
from scaling.parallel.first_rank import first_rank_does
from scaling.runs.rows import MetricsFile, of_split, write_atomically

State = Literal["running", "finished", "failed", "interrupted"]

FREE = {
    "train.micro_batch_size",
    "train.log_every",
    "train.evaluate_every",
    "train.save_every",
    "train.keep",
    "train.max_length",
    "train.profile_steps",
}
"""Settings that change what is seen, not what is computed."""
STEPS = "train.steps"
PACKAGES = ("longfold", "torch", "deepspeed", "accelerate", "zarr", "numpy", "hydra-core")


class RunDirectory:
    """Opens or creates the directory. Collective: the first rank writes, all share its errors.

    Args:
        path: the run's folder.
        identity: the part of the configuration that defines the result, nested.
        config: the whole configuration, nested.

    Raises:
        RunError: not writable, in use by another process, or of another identity (differing keys
            are named with both values).
    """

    def __init__(self, path: Path, identity: dict[str, Any], config: dict[str, Any]) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))  # as it comes back from a file
        self.config = config
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        self._lock: Any = None
        first_rank_does(self._open)

    def set_status(
        self,
        state: State,
        step: int,
        error: str | None = None,
        summary: dict[str, Any] | None = None,
    ) -> None:
        """Rewrites status.json; on the first rank only."""
        if not self.first:
            return
        status = {
            "state": state,
            "step": step,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "error": error,
            "summary": summary,
        }
        text = json.dumps(status, indent=1, default=str)
        write_atomically(self.path / "status.json", text + "\n")

    def status(self) -> dict[str, Any]:
        """What status.json says; empty before the first start."""
        path = self.path / "status.json"
        return _read_object(path) if path.exists() else {}

    def evaluated(self, step: int) -> bool:
        """Whether the rows hold the validation of this step."""
        return any(row["step"] == step for row in of_split(self.metrics.rows(), "validation"))

    @property
    def stop_file(self) -> Path:
        return self.path / "STOP"

    def close(self) -> None:
        """Lets another process write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        try:
            for folder in (self.path, self.checkpoints, self.tensorboard):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")  # its owner stays readable
        except OSError as error:
            raise RunError(
                f"the run directory {self.path} cannot be written ({error.strerror}); choose "
                "another by runs=..., or change its permissions"
            ) from error
        try:
            self._claim()
        except RunError:
            self.close()
            raise

    def _claim(self) -> None:
        try:
            # The kernel lets go of it when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            raise RunError(
                f"the run {self.path} is being written by {owner}; wait for it, stop it, or "
                "choose another name=..."
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        self._check_identity()
        write_atomically(self.path / "identity.json", json.dumps(self.identity, indent=1) + "\n")
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(self.config))
        write_atomically(
            self.path / "environment.json", json.dumps(describe_environment(), indent=1) + "\n"
        )

    def _check_identity(self) -> None:
        path = self.path / "identity.json"
        if not path.exists():
            return
        before, now = (flatten(tree) for tree in (_read_object(path), self.identity))
        differing = [
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in FREE
        ]
        if now.get(STEPS, 0) > before.get(STEPS, 0) > 0:  # a run may grow, on the longer schedule
            differing = [text for text in differing if not text.startswith(f"{STEPS} ")]
        if differing:
            raise RunError(
                f"the run {self.path} belongs to another configuration: {'; '.join(differing)}; "
                "use those values, or choose another name=..."
            )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); remove it and start again") from error
    return content


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys -> values."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def describe_environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers, and to make them again."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "world": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "git": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Of the source tree that runs, where it is one."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
