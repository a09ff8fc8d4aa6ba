"""What makes a folder of arrays a store: the manifest, and what it says of every file."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from data_pipeline.errors import StoreError, damaged, how_to_build, unreadable

VERSION = 1
MANIFEST = "manifest.json"
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
    """Puts it into the folder, with its own hash; what `read_manifest` will give."""
    text = json.dumps(manifest | {"sha256": _sha256(manifest)}, indent=1) + "\n"
    (draft / MANIFEST).write_text(text)
    return json.loads(text)


def _sha256(manifest: dict[str, Any]) -> str:
    """Of all in it but this hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def digest_of(content: dict[str, str]) -> str:
    """One hash of those of all arrays."""
    return hashlib.sha256(json.dumps([VERSION, sorted(content.items())]).encode()).hexdigest()


def _no_store(place: str) -> str:
    if "://" in place or Path(place, "zarr.json").exists():
        return str(damaged(place, f"{MANIFEST} is missing, so it is no finished store"))
    if Path(place).exists():  # somebody's own
        return f"{place} is no store, it has no {MANIFEST}; choose another store=..."
    return f"there is no store at {place}; {how_to_build(place)}"
