"""SLURM's commands: a script into the queue, and what became of a job there."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.errors import ConfigError, RunError
from launch.cluster.options import JobOptions

_PATIENCE_S = 60


def submit_script(script: Path, options: JobOptions, site: Path | None) -> str:
    """The job's id. The site's file chooses partition and account where the job does not.

    Raises:
        RunError: sbatch refuses; its own words, in one line.
    """
    chosen = [key.upper() for key in ("partition", "account") if getattr(options, key)]
    lines = [
        f"source {shlex.quote(str(site))} >&2" if site else "",
        *(f"unset SBATCH_{key}" for key in chosen),  # it would win over the script
        f"exec sbatch --parsable {shlex.quote(str(script))}",
    ]
    ended = _run(["bash", "-c", "\n".join(lines)])
    if ended.returncode or not (found := re.search(r"^(\d+)(;\S+)?$", ended.stdout, re.M)):
        said = " ".join(f"{ended.stderr} {ended.stdout}".split())[-300:]
        raise RunError(f"sbatch refuses {script}: {said}; change what it names by key=value "
                       "(python -m launch submit --help)")  # fmt: skip
    return found[1]


def require_sbatch() -> None:
    """Raises ConfigError where there is no sbatch."""
    if not shutil.which("sbatch"):
        raise ConfigError("there is no sbatch on PATH, so this machine submits no job: go to a "
                          "login node, or see the job here by action=print and "
                          "action=rehearse")  # fmt: skip


def state_in_queue(job: str) -> str | None:
    """PENDING, RUNNING, ...; empty: it has left the queue; None: nobody here can tell."""
    if not shutil.which("squeue"):
        return None
    try:
        ended = _run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"])
    except RunError:
        return None
    if ended.returncode:
        return "" if "Invalid job id" in ended.stderr else None
    return next(iter(ended.stdout.split()), "")


def inside_allocation(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a job's nodes are already ours."""
    return "SLURM_JOB_ID" in environ


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise RunError(f"SLURM did not answer within {_PATIENCE_S} s; is its controller "
                       "there? (sinfo)") from None  # fmt: skip
