"""Folders in the making: written beside their place, locked by their writer, renamed when whole."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.disk import locked, sync


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """An empty folder NAME.tmp-... beside `path`, gone afterwards unless it was renamed.

    The kernel lets go of a draft's lock when its writer ends, however it ends: drafts of dead
    writers are removed first, those of living ones stay. Where the file system has no locks
    nothing is removed.

    Raises:
        OSError: the folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    # Under the parent's lock nobody takes a draft for dead before its writer has locked it.
    with locked(path.parent):
        for left in path.parent.glob(f"{path.name}.tmp-*"):
            with suppress(OSError), locked(left, wait=False) as sure:
                if sure:
                    shutil.rmtree(left)
        folder.mkdir()
        lock = locked(folder)
        lock.__enter__()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.__exit__(None, None, None)


def publish(folder: Path, path: Path) -> None:
    """Syncs everything and renames the folder to `path`.

    Raises:
        OSError: something is at `path` already, or the disk fails.
    """
    for each in [*folder.rglob("*"), folder]:
        sync(each)
    os.replace(folder, path)
    sync(path.parent)
