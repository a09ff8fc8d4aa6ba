"""What makes a folder of arrays a store: the manifest, and what it says of every file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.core import url_to_fs

from data_pipeline.errors import StoreError, how_to_build, how_to_rebuild, unreadable

VERSION = 1
MANIFEST = "manifest.json"
BLOCK = 1 << 18
"""Residues written and hashed at a time: 13 MB of backbone coordinates."""
OWN = ("xyz", "residue", "segment", "offsets", "id", "split", "cluster")
"""Arrays of every store."""


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
        raise StoreError(
            f"{place}/{MANIFEST} is no manifest ({error!r}); {how_to_rebuild(place)}"
        ) from error
    if version != VERSION:
        raise StoreError(
            f"{place} has version {version}, this program reads {VERSION}; {how_to_rebuild(place)}"
        )
    if sha256 != _sha256(manifest):
        raise StoreError(f"{place}/{MANIFEST} is damaged (sha256 differs); {how_to_rebuild(place)}")
    for name, file in manifest["files"].items():
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


def write_manifest(draft: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Puts it into the folder, with its own hash; what `read_manifest` will give."""
    text = json.dumps(manifest | {"sha256": _sha256(manifest)}, indent=1) + "\n"
    (draft / MANIFEST).write_text(text)
    return json.loads(text)


def _sha256(manifest: dict[str, Any]) -> str:
    """Of all in it but this hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _no_store(place: str) -> str:
    if "://" in place or Path(place, "zarr.json").exists():
        return f"{place} has no {MANIFEST}, so it is no finished store; {how_to_rebuild(place)}"
    if Path(place).exists():  # somebody's own
        return f"{place} is no store, it has no {MANIFEST}; choose another store=..."
    return f"there is no store at {place}; {how_to_build(place)}"


def read_back(draft: Path, given: dict[str, str]) -> dict[str, str]:
    """Hashes of the arrays, from the disk.

    Raises:
        OSError: they are not what was given to it.
    """
    import zarr

    group = zarr.open_group(draft, mode="r")
    content = {}
    for name, wanted in given.items():
        content[name], found = array_sha256(group[name])
        if found != wanted:
            raise OSError(f"{name} reads back as other values")
    return content


def array_sha256(array: Any) -> tuple[str, str]:
    """Of dtype, shape and values, what compression and machine do not change; of the values."""
    whole = hashlib.sha256(f"{array.dtype.str} {tuple(array.shape)}".encode())
    values = hashlib.sha256()
    for start in range(0, array.shape[0], BLOCK):
        block = np.ascontiguousarray(array[start : start + BLOCK]).data
        whole.update(block)
        values.update(block)
    return whole.hexdigest(), values.hexdigest()


def digest_of(content: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([VERSION, sorted(content.items())]).encode()).hexdigest()
