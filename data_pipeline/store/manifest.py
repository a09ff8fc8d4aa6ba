"""What makes a folder of arrays a store: the manifest, with which every file is compared.

zarr reads a missing chunk as fill values without a word, and one that belongs to another store as
its own. Here a file is what the manifest says, or an error. A chunk ends with zstd's checksum of
its values, which the codec compares with what it decodes: that these four bytes are those of the
manifest costs nothing, and says that the values are.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from fsspec.core import url_to_fs
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from data_pipeline.errors import StoreError, damaged, how_to_build, unreadable

VERSION = 1
MANIFEST = "manifest.json"
OWN = ("xyz", "residue", "segment", "offsets", "id", "split", "cluster")
"""Arrays of every store."""
CHECKSUM = 4
"""Bytes at the end of a chunk."""
BLOCK = 1 << 18
"""Residues written, and rows hashed, at a time: 13 MB of backbone coordinates."""


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
        raise StoreError(_no_store(place)) from error
    except Exception as error:  # every file system has its own
        raise StoreError(unreadable(f"{place}/{MANIFEST}", error)) from error
    try:
        manifest = json.loads(text)
        version, sha256 = manifest["version"], manifest["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(place, f"{MANIFEST} is no manifest ({error!r})") from error
    if version != VERSION:
        raise damaged(place, f"{MANIFEST} has version {version}, this program reads {VERSION}")
    if sha256 != _sha256(manifest):
        raise damaged(place, f"{MANIFEST} is damaged (sha256 differs)")
    for name, file in manifest["files"].items():
        try:
            size = files.size(f"{root}/{name}")
        except FileNotFoundError as error:
            raise damaged(place, f"{name} is missing") from error
        except Exception as error:
            raise StoreError(unreadable(f"{place}/{name}", error)) from error
        if size != file["size"]:
            raise damaged(place, f"{name} has {size} bytes instead of {file['size']}")
    return manifest


def write_manifest(draft: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Puts it into the folder, with version and its own hash; what `read_manifest` will give."""
    manifest = {"version": VERSION} | manifest
    text = json.dumps(manifest | {"sha256": _sha256(manifest)}, indent=1) + "\n"
    (draft / MANIFEST).write_text(text)
    return json.loads(text)


def _sha256(manifest: dict[str, Any]) -> str:
    """Of all in it but this hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _no_store(place: str) -> str:
    if "://" in place or Path(place, "zarr.json").exists():
        return str(damaged(place, f"{MANIFEST} is missing, so it is no finished store"))
    if Path(place).exists():  # somebody's own
        return f"{place} is no store, it has no {MANIFEST}; choose another store=..."
    return f"there is no store at {place}; {how_to_build(place)}"


def open_arrays(place: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a store by name, each of which checks what it reads.

    Args:
        place: a folder, or a URL that fsspec knows.
    """
    inner: Any
    if "://" in place:
        inner = FsspecStore.from_url(place, read_only=True)
    else:
        inner = LocalStore(Path(place), read_only=True)
    group = zarr.open_group(CheckedFiles(inner, place, manifest["files"]), mode="r")
    return {name: group[name] for name in manifest["content"]}


def read_back(draft: Path, given: dict[str, str]) -> dict[str, Any]:
    """What a manifest says of each array and each file, and one digest of all arrays.

    Args:
        given: sha256 of the values of each array, as they were given to the disk.

    Raises:
        OSError: the disk gives other values back.
    """
    group: Any = zarr.open_group(draft, mode="r")
    content, files = {}, {}
    for name in sorted(given):
        content[name], found = _array_sha256(group[name])
        if found != given[name]:
            raise OSError(f"{name} reads back as other values")
    for file in sorted(each for each in draft.rglob("*") if each.is_file()):
        data, name = file.read_bytes(), file.relative_to(draft).as_posix()
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if "/c/" in name:
            files[name]["checksum"] = data[-CHECKSUM:].hex()
    digest = hashlib.sha256(json.dumps([VERSION, sorted(content.items())]).encode()).hexdigest()
    return {"digest": digest, "content": content, "files": files}


def _array_sha256(array: Any) -> tuple[str, str]:
    """Of dtype, shape and values, what compression and machine do not change; of the values."""
    whole = hashlib.sha256(f"{array.dtype.str} {tuple(array.shape)}".encode())
    values = hashlib.sha256()
    for start in range(0, array.shape[0], BLOCK):
        block = np.ascontiguousarray(array[start : start + BLOCK]).data
        whole.update(block)
        values.update(block)
    return whole.hexdigest(), values.hexdigest()


class CheckedFiles(WrapperStore):
    """A zarr store that gives what its manifest says, or raises.

    Raises:
        StoreError: from every read of a file that is missing or has another content.
    """

    def __init__(self, store: Any, place: str, files: dict[str, Any]):
        super().__init__(store)
        self._place, self._files = place, files

    def _with_store(self, store: Any) -> "CheckedFiles":
        return CheckedFiles(store, self._place, self._files)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        if key in self._files:
            if value is None:
                raise damaged(self._place, f"{key} is missing")
            # Of a part of a file, which nothing of ours asks for, the codec's checksum tells.
            if byte_range is None and not _same(value.as_numpy_array(), self._files[key]):
                what = "is damaged or another store's: it is not what the manifest says"
                raise damaged(self._place, f"{key} {what}")
        return value


def _same(data: np.ndarray, file: dict[str, Any]) -> bool:
    if len(data) == file["size"] and "checksum" in file:
        return data[-CHECKSUM:].tobytes().hex() == file["checksum"]
    return hashlib.sha256(data.data).hexdigest() == file["sha256"]
