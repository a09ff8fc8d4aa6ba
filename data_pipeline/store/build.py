"""Builds a store from a source, whole or not at all, and verifies it."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fsspec.core import url_to_fs

from data_pipeline.chains import Chain, Notes
from data_pipeline.disk import locked, sync
from data_pipeline.errors import StoreError, damaged, unreadable
from data_pipeline.store import writer
from data_pipeline.store.grouping import GroupedSource
from data_pipeline.store.manifest import read_back, read_manifest, write_manifest


@runtime_checkable
class Source(Protocol):
    """Where chains come from."""

    def identity(self) -> dict[str, Any]:
        """What the chains follow from, as JSON; cheap, for it decides whether to build.

        Has `kind` and `files` (name -> sha256). A source whose xyz are not N, CA, C, O names its
        atoms in an attribute `atoms`: (points, ...) of any number, the same for all chains.
        """
        ...

    def chains(self, notes: Notes) -> Iterable[Chain]:
        """The chains, once each; best one by one as they are asked for, for none is kept.

        Their order is the store's: packed samples are runs of neighbours, so a source that can
        give its chains in a shuffled order (a permutation that follows from a key) should. A chain
        may carry a `cluster` that is never parted, its `split` (then every chain does), its
        `segment`, and `extra` arrays. What is left out goes to `notes`.
        """
        ...


def ensure(path: str | Path, source: Source) -> tuple[dict[str, Any], bool]:
    """The manifest of the store of `source` at `path`, and whether it had to be built.

    Raises:
        StoreError: another source's store is there, or a damaged one.
    """
    path = Path(path)
    try:
        there = path.exists()
    except OSError as error:
        raise StoreError(unreadable(str(path), error)) from error
    if not there:
        try:
            return build(path, source), True
        except StoreError:
            if not path.exists():  # else another process was faster: is it the same store?
                raise
    manifest, wanted = read_manifest(path), source.identity()
    found = manifest["source"]
    if found != wanted:
        keys = [key for key in found | wanted if found.get(key) != wanted.get(key)]
        raise StoreError(
            f"{path} was built from another source (differs in {', '.join(keys)}); "
            f"delete it (rm -r {path}) to build it anew, or choose another store=..."
        )
    return manifest, False


def build(path: str | Path, source: Source) -> dict[str, Any]:
    """Writes, reads back, syncs and renames; whatever breaks it leaves nothing at `path`.

    Killed at once, it leaves a folder NAME.tmp-... that nothing reads and the next build removes.

    Returns:
        The manifest.
    Raises:
        StoreError: the folder cannot be written, or something came to `path` meanwhile.
        SourceError: a chain that cannot be stored.
    """
    path, notes = Path(path), Notes()
    grouped = source if isinstance(source, GroupedSource) else GroupedSource(source)
    try:
        with staged(path) as draft:
            about, given = writer.write(draft, grouped, notes)
            manifest = {
                "source": source.identity(),  # only now: it may have hashed what it read
                **about,
                "left_out": notes,
                "residues_left_out": notes.residues,
                **read_back(draft, given),
            }
            manifest = write_manifest(draft, manifest)
            for each in [*draft.rglob("*"), draft]:
                sync(each)
            os.replace(draft, path)
            sync(path.parent)
            return manifest
    except OSError as error:
        # Its text names the draft; what it says of that holds for `path`.
        reason = error.strerror or str(error)
        if path.exists():
            reason = "something came to that place meanwhile"
        raise StoreError(
            f"cannot write the store {path}: {reason}; choose another store=... on a disk with "
            "room where you may write"
        ) from error


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


def verify(path: str | Path) -> dict[str, Any]:
    """Reads every file and compares its hash; the manifest.

    Raises:
        StoreError: names the first file that is not what was written.
    """
    manifest = read_manifest(path)
    files, root = url_to_fs(str(path))
    for name, file in manifest["files"].items():
        try:
            with files.open(f"{root}/{name}") as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise StoreError(unreadable(f"{path}/{name}", error)) from error
        if sha256 != file["sha256"]:
            raise damaged(str(path), f"{name} is damaged (sha256 differs)")
    return manifest
