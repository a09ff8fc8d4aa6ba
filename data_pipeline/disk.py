"""Locks that end with their holder, and files that are the old ones or the new ones."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a file or folder; False where the file system has none.

    The kernel lets go of it when the process ends, however it ends.

    Raises:
        BlockingIOError: not `wait`, and another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str) -> None:
    """The file is the old one or the new one, whenever the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or renames inside a folder, last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
