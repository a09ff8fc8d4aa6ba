"""A job's copy of the program: what trains is what was there when the job was written."""

import shutil
from pathlib import Path

from data_pipeline.errors import RunError
from launch.cluster.script import slurm_folder
from launch.config.compose import config_folder
from scaling.runs.environment import git_commit

PACKAGES = ("launch", "scaling", "data_pipeline")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "site.env")


def copy_program(folder: Path) -> None:
    """The packages with their configurations, uncommitted changes too, and the commit.

    Raises:
        RunError: it cannot be written.
    """
    root = Path(__file__).parents[2]
    parts = {root / name: folder / name for name in PACKAGES}
    for beside in (config_folder(), slurm_folder()):
        if beside.parent == root:
            parts[beside] = folder / beside.name
    try:
        for source, target in parts.items():
            shutil.copytree(source, target, ignore=IGNORED)
        (folder / "COMMIT").write_text(f"{git_commit() or ''}\n")
    except (OSError, shutil.Error) as error:
        raise RunError(f"cannot copy the program to {folder}: {error}; make room, or choose "
                       "another folder by runs=...") from error  # fmt: skip
