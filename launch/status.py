"""Say how runs are: python -m launch status [runs/NAME ...]

Without a path: every run in runs/ and sweep in sweeps/. Folders are read, and left alone. SLURM is
asked about the jobs of those that `submit` put there.
"""

from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import RunError
from launch.cluster.queue import state_in_queue
from launch.config.compose import command_line
from scaling.runs.folder import RunFolder
from scaling.runs.state import RunState, state_of

HOMES = ("runs", "sweeps", "benches")
"""Where runs lie that nobody names."""


@dataclass
class StatusConfig:
    paths: list[str] = field(default_factory=list)
    """Folders of runs, sweeps or benches; none: all in runs, sweeps and benches."""


def main(arguments: list[str]) -> None:
    """One line a run."""
    config, _ = command_line(arguments, "status", StatusConfig)
    paths = config.paths or [
        str(path.parent) for home in HOMES for path in sorted(Path(home).glob("*/config.yaml"))
    ]
    if not paths:
        raise RunError(f"there is no run in {', '.join(HOMES)}: name its folder, or go where it is")
    width = max(map(len, paths))
    for path in paths:
        run = _state(path, alone=len(paths) == 1)
        print(f"{path:<{width}}  {run.state:<12}{run.detail}".rstrip())


def _state(path: str, alone: bool) -> RunState:
    """One that cannot be read is said in its line, among others."""
    try:
        return state_of(RunFolder(path), state_in_queue)
    except RunError as error:
        if alone:
            raise
        return RunState("unreadable", str(error))
