"""What every source needs of its files."""

import hashlib
from pathlib import Path

from data_pipeline.errors import SourceError


def file_sha256(path: Path) -> str:
    """Of a source's file.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror}; correct path, or that file's permissions"
        ) from error
