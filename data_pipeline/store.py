"""Backbones on disk: a zarr v3 group of flat arrays, and the manifest that makes it a store.

    xyz (residues, 4, 3) float32 Å, NaN where missing     residue (residues,) uint8
    segment (residues,) int32: 0, 1, ... inside a chain, one more after every break
    offsets (chains + 1,) int64     id (chains, width) uint8     split, cluster (chains,)
    and whatever else the source gives for each residue: vectors (residues, v, 3), ...

A store is written beside its place, read back, synced and renamed; nothing is a store without its
manifest, whose file sizes are compared at every opening, whose hashes `verify` compares, and which
every chunk that is read must match. Chunks are zstd with a checksum: the one codec that every zarr
engine verifies when it reads a part.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from fsspec.core import url_to_fs
from jaxtyping import Int

from data_pipeline import clusters, drafts, writer
from data_pipeline.bundle import BundledSource
from data_pipeline.chains import ATOMS, Chain, Notes
from data_pipeline.errors import StoreError, how_to_build, how_to_rebuild, unreadable
from data_pipeline.structures import file_sha256

VERSION = 1
MANIFEST = "manifest.json"
CACHED_CHUNKS = 64
"""Decoded chunks that a reader keeps: at most 50 MB."""


@runtime_checkable
class Source(Protocol):
    """Where chains come from."""

    def identity(self) -> dict[str, Any]:
        """What the chains follow from, as JSON; cheap, for it decides whether to build.

        Has `kind` and `files` (name -> sha256). A source whose xyz are not N, CA, C, O names its
        atoms in `atoms`: (points, ...) of any number, the same for all chains.
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


class Store:
    """A finished store, opened to read.

    Args:
        path: a folder, or a URL that fsspec knows (http://..., memory://...).

    Raises:
        StoreError: nothing there, no manifest, another version, or a file missing or cut.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.manifest = read_manifest(path)
        self.digest: str = self.manifest["digest"]
        self.atoms: tuple[str, ...] = tuple(self.manifest.get("atoms", ATOMS))
        """Names of the second axis of xyz."""
        self._arrays = _open(self.path, self.manifest)
        extra = sorted(self._arrays.keys() - set(writer.OWN))
        self.kinds = {
            name: (str(self._arrays[name].dtype), self._arrays[name].shape[1:]) for name in extra
        }
        """dtype and shape of a row of the arrays that the source gave beyond those of all."""
        self._chunk = lru_cache(CACHED_CHUNKS)(self._read_chunk)
        self.offsets: np.ndarray = self._whole("offsets")
        self.lengths = np.diff(self.offsets)
        """Residues of each chain."""
        self._split = self._whole("split")

    def chains(self, split: str) -> np.ndarray:
        """Numbers of the chains of a split."""
        return np.flatnonzero(self._split == clusters.SPLITS.index(split))

    def name(self, chain: int) -> str:
        rows = self._arrays["id"].chunks[0]
        return bytes(self._chunk("id", chain // rows)[chain % rows]).rstrip(b"\0").decode()

    def chunk_rows(self, array: str) -> int:
        return self._arrays[array].chunks[0]

    def read(self, array: str, chain: int, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a chain; decodes only the chunks that hold them."""
        return self.gather(array, np.array([chain]), np.array([start]), np.array([stop]))

    def gather(
        self,
        array: str,
        chains: Int[np.ndarray, " n"],
        starts: Int[np.ndarray, " n"],
        stops: Int[np.ndarray, " n"],
    ) -> np.ndarray:
        """Rows [start, stop) of each chain, one after another; every chunk is decoded once."""
        assert np.all((starts >= 0) & (starts <= stops) & (stops <= self.lengths[chains]))
        source, rows = self._arrays[array], self._arrays[array].chunks[0]
        first, last = self.offsets[chains] + starts, self.offsets[chains] + stops
        # A piece is what one chain has in one chunk.
        pieces = np.where(last > first, (last - 1) // rows - first // rows + 1, 0)
        which = np.repeat(np.arange(len(chains)), pieces)
        chunk = first[which] // rows + np.arange(len(which)) - np.repeat(before(pieces), pieces)
        low = np.maximum(first[which], chunk * rows)
        high = np.minimum(last[which], (chunk + 1) * rows)
        place = before(high - low)
        out = np.empty((int((high - low).sum()), *source.shape[1:]), source.dtype)
        for piece in np.argsort(chunk, kind="stable"):
            number, a, b = int(chunk[piece]), int(low[piece]), int(high[piece])
            here = self._chunk(array, number)[a - number * rows : b - number * rows]
            out[place[piece] : place[piece] + b - a] = here
        return out

    def _whole(self, array: str) -> np.ndarray:
        source = self._arrays[array]
        numbers = range(-(-source.shape[0] // source.chunks[0]))
        return np.concatenate([self._read_chunk(array, number) for number in numbers])

    def _read_chunk(self, array: str, number: int) -> np.ndarray:
        rows = self._arrays[array].chunks[0]
        try:
            return self._arrays[array][number * rows : (number + 1) * rows]
        except StoreError:
            raise
        except Exception as error:  # every codec has its own
            raise StoreError(
                f"{self.path}/{array}: chunk {number} is damaged: {error}; "
                f"{how_to_rebuild(self.path)}"
            ) from error


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


def ensure_bundled(path: str | Path) -> bool:
    """Builds the bundled data's store at `path` if it is not there; True if it had to.

    Milliseconds where it is. One process calls it, the others wait.
    """
    return ensure(path, BundledSource())[1]


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
    path, notes = Path(path), defaultdict(list)
    identity = source.identity()
    atoms = tuple(identity.get("atoms", ATOMS))
    try:
        with drafts.draft(path) as draft:
            written = writer.write(draft, source.chains(notes), atoms, shard)
            content = _read_back(draft, written.sha256)
            manifest = {
                "version": VERSION,
                "digest": _digest(content),
                "source": identity,
                "atoms": atoms,
                "counts": written.counts,
                "bonds": written.bonds,
                "left_out": notes,
                "content": content,
                "files": {
                    file.relative_to(draft).as_posix(): {
                        "size": file.stat().st_size,
                        "sha256": file_sha256(file),
                    }
                    for file in sorted(draft.rglob("*"))
                    if file.is_file()
                },
            }
            text = json.dumps(manifest, indent=1) + "\n"
            (draft / MANIFEST).write_text(text)
            drafts.publish(draft, path)
            return json.loads(text)
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
    manifest, place = read_manifest(path), str(path)
    files, root = url_to_fs(place)
    for name, file in manifest["files"].items():
        with files.open(f"{root}/{name}") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                raise StoreError(
                    f"{place}/{name} is damaged (sha256 differs); {how_to_rebuild(place)}"
                )
    arrays = _open(place, manifest)
    for name, sha256 in manifest["content"].items():
        if _array_sha256(arrays[name])[0] != sha256:
            raise StoreError(f"{place}/{name} decodes to other values; {how_to_rebuild(place)}")
    if _digest(manifest["content"]) != manifest["digest"]:
        raise StoreError(f"{place}/{MANIFEST} contradicts itself; {how_to_rebuild(place)}")
    return manifest


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest, after every file's size was compared with it.

    Raises:
        StoreError: see Store.
    """
    place = str(path)
    try:
        files, root = url_to_fs(place)
        text = files.cat_file(f"{root}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError) as error:
        if "://" in place or Path(place).is_dir():
            raise StoreError(
                f"{place} has no {MANIFEST}, so it is no finished store; {how_to_rebuild(place)}"
            ) from error
        raise StoreError(f"there is no store at {place}; {how_to_build(place)}") from error
    except Exception as error:  # every file system has its own
        raise StoreError(unreadable(f"{place}/{MANIFEST}", error)) from error
    try:
        manifest = json.loads(text)
        version, sizes = manifest["version"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{place}/{MANIFEST} is no manifest ({error!r}); {how_to_rebuild(place)}"
        ) from error
    if version != VERSION:
        raise StoreError(
            f"{place} has version {version}, this program reads {VERSION}; {how_to_rebuild(place)}"
        )
    for name, file in sizes.items():
        try:
            size = files.size(f"{root}/{name}")
        except FileNotFoundError as error:
            raise StoreError(f"{place}/{name} is missing; {how_to_rebuild(place)}") from error
        except Exception as error:
            raise StoreError(unreadable(f"{place}/{name}", error)) from error
        if size != file["size"]:
            raise StoreError(
                f"{place}/{name} has {size} bytes instead of {file['size']}; "
                f"{how_to_rebuild(place)}"
            )
    return manifest


def _open(place: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The arrays, each of which checks what it reads."""
    import zarr

    from data_pipeline.files import open_files

    group = zarr.open_group(open_files(place, manifest["files"]), mode="r")
    return {name: group[name] for name in manifest["content"]}


def _read_back(draft: Path, given: dict[str, str]) -> dict[str, str]:
    """Hashes of the arrays, from the disk.

    Raises:
        OSError: they are not what was given to it.
    """
    import zarr

    group = zarr.open_group(draft, mode="r")
    content = {}
    for name, wanted in given.items():
        content[name], found = _array_sha256(group[name])
        if found != wanted:
            raise OSError(f"{name} reads back as other values")
    return content


def _array_sha256(array: Any) -> tuple[str, str]:
    """Of dtype, shape and values, what compression and machine do not change; of the values."""
    whole = hashlib.sha256(f"{array.dtype.str} {tuple(array.shape)}".encode())
    values = hashlib.sha256()
    for start in range(0, array.shape[0], writer.BLOCK):
        block = np.ascontiguousarray(array[start : start + writer.BLOCK]).data
        whole.update(block)
        values.update(block)
    return whole.hexdigest(), values.hexdigest()


def _digest(content: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([VERSION, sorted(content.items())]).encode()).hexdigest()


def _exists(path: Path) -> bool:
    """Raises StoreError where that cannot be seen."""
    try:
        return path.exists()
    except OSError as error:
        raise StoreError(unreadable(str(path), error)) from error


def before(counts: np.ndarray) -> np.ndarray:
    """Sum of all counts before each."""
    return np.cumsum(counts) - counts
