"""Backbones on disk: a zarr v3 group of flat arrays, and the manifest that makes it a store.

    xyz (residues, 4, 3) float32 Å, NaN where missing     residue (residues,) uint8
    segment (residues,) int32: 0, 1, ... inside a chain, one more after every break
    offsets (chains + 1,) int64     id (chains, width) uint8     split, cluster (chains,)

zarr reads a missing chunk as fill values without a word. So a store is written beside its place,
verified, synced and renamed; nothing is a store without its manifest, whose file sizes are
compared at every opening and whose hashes `verify` compares. Chunks are zstd with a checksum:
the one codec that every zarr engine verifies when it reads a part.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data_pipeline import clusters
from data_pipeline.bundle import BundledSource, encode
from data_pipeline.errors import StoreError
from data_pipeline.structures import Chain, Notes, bond_lengths, file_sha256

VERSION = 1
MANIFEST = "manifest.json"
CHUNK = 1 << 16
"""Atoms in a chunk of xyz, rows in a chunk of everything else."""
CACHED_CHUNKS = 64
"""Decoded chunks that a reader keeps: at most 50 MB."""


@runtime_checkable
class Source(Protocol):
    """Where chains come from."""

    def identity(self) -> dict[str, Any]:
        """What the chains follow from, as JSON; cheap, for it decides whether to build."""
        ...

    def chains(self, notes: Notes) -> list[Chain]: ...


class Store:
    """A finished store, opened to read.

    Raises:
        StoreError: nothing there, no manifest, another version, or a file missing or cut.
    """

    def __init__(self, path: str | Path):
        import zarr

        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.digest: str = self.manifest["digest"]
        group = zarr.open_group(self.path, mode="r")
        self._arrays: dict[str, Any] = {name: group[name] for name in self.manifest["content"]}
        self._chunk = lru_cache(CACHED_CHUNKS)(self._read_chunk)
        self.offsets: np.ndarray = self._arrays["offsets"][:]
        self.lengths = np.diff(self.offsets)
        """Residues of each chain."""
        self._split: np.ndarray = self._arrays["split"][:]

    def chains(self, split: str) -> np.ndarray:
        """Numbers of the chains of a split."""
        return np.flatnonzero(self._split == clusters.SPLITS.index(split))

    def name(self, chain: int) -> str:
        return bytes(self._arrays["id"][chain]).rstrip(b"\0").decode()

    def read(self, array: str, chain: int, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a chain; decodes only the chunks that hold them."""
        assert 0 <= start <= stop <= self.lengths[chain]
        first, last = int(self.offsets[chain]) + start, int(self.offsets[chain]) + stop
        rows = self._arrays[array].chunks[0]
        parts = [
            self._chunk(array, n)[max(first - n * rows, 0) : last - n * rows]
            for n in range(first // rows, max(last - 1, first) // rows + 1)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_chunk(self, array: str, number: int) -> np.ndarray:
        rows = self._arrays[array].chunks[0]
        try:
            chunk = self._arrays[array][number * rows : (number + 1) * rows]
        except Exception as error:  # every codec has its own
            raise StoreError(f"{self.path}/{array}: chunk {number} is damaged: {error}") from error
        if array == "xyz" and np.isnan(chunk).all():
            raise StoreError(f"{self.path}/xyz: chunk {number} vanished while reading")
        return chunk


def ensure(path: str | Path, source: Source) -> tuple[dict[str, Any], bool]:
    """The manifest of the store of `source` at `path`, and whether it had to be built.

    Raises:
        StoreError: another source's store is there, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
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


def build(path: Path, source: Source) -> dict[str, Any]:
    """Writes, verifies, syncs and renames; whatever breaks it leaves nothing at `path`.

    Killed at once, it leaves a folder NAME.tmp-... that nothing reads.

    Returns:
        The manifest.
    Raises:
        StoreError: the folder cannot be written, or something came to `path` meanwhile.
    """
    notes: Notes = defaultdict(list)
    chains = source.chains(notes)
    arrays = _arrays(chains)
    draft = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        _write(draft, arrays)
        content = {name: _array_sha256(array) for name, array in arrays.items()}
        manifest = {
            "version": VERSION,
            "digest": _digest(content),
            "source": source.identity(),
            "counts": _counts(arrays),
            "bonds": bond_lengths(chains),
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
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        manifest = verify(draft)
        _sync(draft)
        os.replace(draft, path)
        _sync_file(path.parent)
        return manifest
    except OSError as error:
        # Its text names the draft; what it says of that holds for `path`.
        reason = error.strerror or str(error).replace(str(draft), str(path))
        raise StoreError(
            f"cannot write the store {path}: {reason}; choose another store=... on a disk with "
            "room where you may write"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def verify(path: str | Path) -> dict[str, Any]:
    """Reads everything: hashes of all files, number of chunks, decoded content; the manifest.

    Raises:
        StoreError: names the first file or array that is not what was written.
    """
    import zarr

    path = Path(path)
    manifest = read_manifest(path)
    for name, file in manifest["files"].items():
        if file_sha256(path / name) != file["sha256"]:
            raise StoreError(f"{path / name} is damaged (sha256 differs); {_rebuild(path)}")
    group = zarr.open_group(path, mode="r")
    for name, sha256 in manifest["content"].items():
        array: Any = group[name]
        if array.nchunks_initialized != array.nchunks:
            raise StoreError(f"{path}/{name} lacks chunks; {_rebuild(path)}")
        if _array_sha256(array) != sha256:
            raise StoreError(f"{path}/{name} decodes to other values; {_rebuild(path)}")
    if _digest(manifest["content"]) != manifest["digest"]:
        raise StoreError(f"{path / MANIFEST} contradicts itself; {_rebuild(path)}")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, after every file's size was compared with it.

    Raises:
        StoreError: see Store.
    """
    if not path.is_dir():
        raise StoreError(f"there is no store at {path}; {_build(path)}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["version"], manifest["files"]
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} has no {MANIFEST}, so it is no finished store; {_rebuild(path)}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path / MANIFEST} is no manifest ({error!r}); {_rebuild(path)}"
        ) from error
    if version != VERSION:
        raise StoreError(
            f"{path} has version {version}, this program reads {VERSION}; {_rebuild(path)}"
        )
    for name, file in files.items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError as error:
            raise StoreError(f"{path / name} is missing; {_rebuild(path)}") from error
        if size != file["size"]:
            raise StoreError(
                f"{path / name} has {size} bytes instead of {file['size']}; {_rebuild(path)}"
            )
    return manifest


def _arrays(chains: list[Chain]) -> dict[str, np.ndarray]:
    sequences = [chain.sequence for chain in chains]
    groups = clusters.cluster(sequences)
    names = np.array([chain.id.encode() for chain in chains])
    return {
        "xyz": np.concatenate([chain.xyz for chain in chains]),
        "residue": np.concatenate([encode(sequence) for sequence in sequences]),
        "segment": np.concatenate([np.cumsum(c.breaks) for c in chains]).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64),
        "id": names.view(np.uint8).reshape(len(names), -1),
        "split": clusters.split(sequences, groups).astype(np.uint8),
        "cluster": groups.astype(np.int32),
    }


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    import zarr
    from zarr.codecs import ZstdCodec

    group = zarr.create_group(folder)
    for name, array in arrays.items():
        rows = CHUNK // array.shape[1] if name == "xyz" else CHUNK
        group.create_array(
            name,
            data=array,
            chunks=(min(rows, len(array)), *array.shape[1:]),
            compressors=ZstdCodec(level=-5, checksum=True),
            fill_value=np.nan if array.dtype.kind == "f" else 0,
            config={"write_empty_chunks": True},
        )


def _counts(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    lengths = np.diff(arrays["offsets"])
    splits = {}
    for number, name in enumerate(clusters.SPLITS):
        chosen = arrays["split"] == number
        splits[name] = {
            "chains": int(chosen.sum()),
            "clusters": len(np.unique(arrays["cluster"][chosen])),
            "residues": int(lengths[chosen].sum()),
        }
    return {
        "chains": len(lengths),
        "clusters": len(np.unique(arrays["cluster"])),
        "residues": int(lengths.sum()),
        "breaks": int(arrays["segment"][arrays["offsets"][1:] - 1].sum()),
        "missing atoms": int(np.isnan(arrays["xyz"]).any(-1).sum()),
        "splits": splits,
    }


def _array_sha256(array: Any) -> str:
    """Of the values, chunk after chunk: what compression and machine do not change."""
    sha256 = hashlib.sha256(f"{array.dtype.str} {tuple(array.shape)}".encode())
    for start in range(0, array.shape[0], CHUNK):
        sha256.update(np.ascontiguousarray(array[start : start + CHUNK]).tobytes())
    return sha256.hexdigest()


def _digest(content: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([VERSION, sorted(content.items())]).encode()).hexdigest()


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_file(path)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _build(path: Path) -> str:
    return f"build it with: python -m launch prepare store={path}"


def _rebuild(path: Path) -> str:
    return f"delete it (rm -r {path}) and {_build(path)}"
