"""Builds a store from a source, whole or not at all, and verifies it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fsspec.core import url_to_fs

from data_pipeline.chains import ATOMS, Chain, Notes
from data_pipeline.errors import StoreError, how_to_rebuild, unreadable
from data_pipeline.store import staging, writer
from data_pipeline.store.grouping import Grouping
from data_pipeline.store.manifest import (
    VERSION,
    array_sha256,
    digest_of,
    read_back,
    read_manifest,
    write_manifest,
)


@runtime_checkable
class Source(Protocol):
    """Where chains come from."""

    def identity(self) -> dict[str, Any]:
        """What the chains follow from, as JSON; cheap, for it decides whether to build.

        Has `kind` and `files` (name -> sha256). A source whose xyz are not N, CA, C, O names its
        atoms in an attribute `atoms`: (points, ...) of any number, the same for all chains; one
        with a `grouping` of its own names it so.
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
    if not _exists(path):
        try:
            return build(path, source), True
        except StoreError:
            if not path.exists():  # else another process was faster: is it the same store?
                raise
    manifest, wanted = read_manifest(path), source.identity()
    there = manifest["source"]
    if there != wanted:
        keys = [key for key in there | wanted if there.get(key) != wanted.get(key)]
        raise StoreError(
            f"{path} was built from another source (differs in {', '.join(keys)}); "
            f"delete it (rm -r {path}) to build it anew, or choose another store=..."
        )
    return manifest, False


def build(path: str | Path, source: Source, shard: int = 1) -> dict[str, Any]:
    """Writes, reads back, syncs and renames; whatever breaks it leaves nothing at `path`.

    Killed at once, it leaves a folder NAME.tmp-... that nothing reads and the next build removes.

    Args:
        shard: chunks in a file.

    Returns:
        The manifest.
    Raises:
        StoreError: the folder cannot be written, or something came to `path` meanwhile.
        SourceError: a chain that cannot be stored.
    """
    from data_pipeline.store.files import files_of

    path, notes = Path(path), Notes()
    atoms = tuple(getattr(source, "atoms", ATOMS))
    grouping = getattr(source, "grouping", Grouping())
    try:
        with staging.staged(path) as draft:
            written = writer.write(draft, source.chains(notes), atoms, grouping, notes, shard)
            content = read_back(draft, written.sha256)
            manifest = {
                "version": VERSION,
                "digest": digest_of(content),
                "source": source.identity(),  # only now: it may have hashed what it read
                "atoms": atoms,
                "counts": written.counts,
                "bonds": written.bonds,
                "split": written.split,
                "left_out": notes,
                "residues_left_out": notes.residues,
                "content": content,
                "files": files_of(draft),
            }
            manifest = write_manifest(draft, manifest)
            staging.publish(draft, path)
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


def verify(path: str | Path) -> dict[str, Any]:
    """Reads everything: hashes of all files, decoded content; the manifest.

    Raises:
        StoreError: names the first file or array that is not what was written.
    """
    from data_pipeline.store.files import open_arrays

    manifest, place = read_manifest(path), str(path)
    files, root = url_to_fs(place)
    for name, file in manifest["files"].items():
        with files.open(f"{root}/{name}") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                raise StoreError(
                    f"{place}/{name} is damaged (sha256 differs); {how_to_rebuild(place)}"
                )
    arrays = open_arrays(place, manifest)
    for name, sha256 in manifest["content"].items():
        if array_sha256(arrays[name])[0] != sha256:
            raise StoreError(f"{place}/{name} decodes to other values; {how_to_rebuild(place)}")
    return manifest


def _exists(path: Path) -> bool:
    """Raises StoreError where that cannot be seen."""
    try:
        return path.exists()
    except OSError as error:
        raise StoreError(unreadable(str(path), error)) from error
