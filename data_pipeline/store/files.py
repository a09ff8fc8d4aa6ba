"""The files of a store, each compared with its manifest whenever it is read.

zarr reads a missing chunk as fill values without a word, and one that belongs to another store as
its own. Here a file is what the manifest says, or an error. A chunk ends with zstd's checksum of
its values, which the codec compares with what it decodes: that these four bytes are those of the
manifest costs nothing, and says that the values are.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from data_pipeline.errors import damaged

CHECKSUM = 4
"""Bytes at the end of a chunk."""
BLOCK = 1 << 18
"""Rows that are hashed at a time: 13 MB of backbone coordinates."""


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


def read_back(draft: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What a manifest says of each array, and of each file that holds a part of one."""
    group: Any = zarr.open_group(draft, mode="r")
    content = {name: content_sha256(array) for name, array in sorted(group.arrays())}
    files = {}
    for file in sorted(each for each in draft.rglob("*") if each.is_file()):
        data, name = file.read_bytes(), file.relative_to(draft).as_posix()
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if "/c/" in name:
            files[name]["checksum"] = data[-CHECKSUM:].hex()
    return content, files


def content_sha256(array: Any) -> str:
    """Of dtype, shape and values: what compression and machine do not change."""
    found = hashlib.sha256(f"{array.dtype.str} {tuple(array.shape)}".encode())
    for start in range(0, array.shape[0], BLOCK):
        found.update(np.ascontiguousarray(array[start : start + BLOCK]).data)
    return found.hexdigest()


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
