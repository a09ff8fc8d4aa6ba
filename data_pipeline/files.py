"""The files of a store, each compared with its manifest whenever it is read.

zarr reads a missing chunk as fill values without a word, and one that belongs to another store as
its own. Here a file is what the manifest says (size, and sha256 where it is read whole), or an
error.
"""

import hashlib
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from data_pipeline.errors import StoreError, how_to_rebuild


def open_files(place: str, files: dict[str, Any]) -> "CheckedFiles":
    """The files of a store, to read.

    Args:
        place: a folder, or a URL that fsspec knows.
        files: those of the manifest, name -> size and sha256.
    """
    inner: Any
    if "://" in place:
        inner = FsspecStore.from_url(place, read_only=True)
    else:
        inner = LocalStore(Path(place), read_only=True)
    return CheckedFiles(inner, place, files)


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
        wanted = file["size"]
        if isinstance(part, RangeByteRequest):
            wanted = part.end - part.start
        elif isinstance(part, SuffixByteRequest):
            wanted = part.suffix
        elif part is not None:
            wanted = file["size"] - part.offset
        if len(value) != wanted:
            raise StoreError(
                f"{name} gave {len(value)} bytes instead of {wanted}; {how_to_rebuild(self._place)}"
            )
        if part is None:
            found = hashlib.sha256(value.as_numpy_array().data).hexdigest()
            if found != file["sha256"]:
                raise StoreError(
                    f"{name} is damaged or of another store (sha256 differs); "
                    f"{how_to_rebuild(self._place)}"
                )
