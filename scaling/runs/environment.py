"""What a reader needs to judge numbers, and to make them again."""

import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("longfold", "torch", "deepspeed", "accelerate", "zarr", "numpy", "hydra-core")


def describe_environment(**further: Any) -> dict[str, Any]:
    """Command, versions, machine and commit; what only torch knows is handed in."""
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        **further,
        "git": git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Of the source tree that runs, where it is one; of a job's copy, as its COMMIT says."""
    copied = Path(__file__).parents[2] / "COMMIT"
    if copied.is_file():
        return copied.read_text().strip() or None
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
