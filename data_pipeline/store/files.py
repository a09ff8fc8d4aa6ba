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
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from data_pipeline.errors import StoreError, how_to_rebuild

CHECKSUM = 4
"""Bytes at the end of a zstd frame."""


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


def files_of(draft: Path) -> dict[str, Any]:
    """What each file of the arrays is."""
    group: Any = zarr.open_group(draft, mode="r")
    found = {}
    for file in sorted(each for each in draft.rglob("*") if each.is_file()):
        name = file.relative_to(draft).as_posix()
        array, _, chunk = name.partition("/c/")
        chunks = 0
        if chunk:
            shards = group[array].shards
            chunks = shards[0] // group[array].chunks[0] if shards else 1
        found[name] = describe_file(file, chunks)
    return found


def describe_file(path: Path, chunks: int) -> dict[str, Any]:
    """size, sha256, and in `checksums` the last bytes of each zstd frame by the frame's end.

    Args:
        chunks: in the file: 0 for metadata, more than 1 in a shard.
    """
    data = path.read_bytes()
    ends = [len(data)] * chunks
    if chunks > 1:  # a shard ends with offset and length of each chunk, and a checksum of those
        index = np.frombuffer(data[-CHECKSUM - 16 * chunks : -CHECKSUM], "<u8").reshape(-1, 2)
        ends = [int(offset + length) for offset, length in index if offset < len(data)]
    return {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "checksums": {str(end): data[end - CHECKSUM : end].hex() for end in ends},
    }


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
            self._check(f"{self._place}/{key}", value, byte_range, self._files[key])
        return value

    def _check(
        self, name: str, value: Buffer | None, part: ByteRequest | None, file: dict[str, Any]
    ) -> None:
        if value is None:
            raise StoreError(f"{name} is missing; {how_to_rebuild(self._place)}")
        end, wanted = file["size"], file["size"]
        if isinstance(part, RangeByteRequest):
            end, wanted = part.end, part.end - part.start
        elif isinstance(part, SuffixByteRequest):
            wanted = part.suffix
        elif isinstance(part, OffsetByteRequest):
            wanted = end - part.offset
        if len(value) != wanted:
            raise StoreError(
                f"{name} gave {len(value)} bytes instead of {wanted}; {how_to_rebuild(self._place)}"
            )
        data = value.as_numpy_array()
        checksum = file.get("checksums", {}).get(str(end))
        if checksum is not None:
            same = data[-CHECKSUM:].tobytes().hex() == checksum
        else:
            same = part is not None or hashlib.sha256(data.data).hexdigest() == file["sha256"]
        if not same:
            raise StoreError(
                f"{name} is damaged or another store's: it is not what the manifest says; "
                f"{how_to_rebuild(self._place)}"
            )
