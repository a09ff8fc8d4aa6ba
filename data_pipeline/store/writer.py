"""Chains to the arrays of a store, block by block: memory does not grow with the store.

What grows are some 100 bytes a chain (names, offsets, hashes) and, while sequences are compared,
one byte a residue.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from data_pipeline.chains import ATOMS, SPLITS, Bonds, Chain, Notes, encode
from data_pipeline.errors import SourceError
from data_pipeline.store import clusters
from data_pipeline.store.grouping import GroupedSource
from data_pipeline.store.manifest import BLOCK, OWN

CHUNK = 1 << 16
"""Most rows in a chunk, and most vectors of three numbers: 786 kB of float32."""


def write(
    folder: Path, source: GroupedSource, notes: Notes
) -> tuple[dict[str, Any], dict[str, str]]:
    """All arrays of a store into an empty folder; what its manifest says of the chains, and sha256
    of the values of each array, as they were given to the disk.

    Args:
        notes: gains what the source and its groups have to say.

    Raises:
        SourceError: no chain at all, or one that fits neither itself nor the others (named).
        OSError: as the disk says.
    """
    group, atoms = zarr.create_group(folder), source.atoms
    arrays: dict[str, Any] = {}
    hashes = defaultdict(hashlib.sha256)

    def put(name: str, values: np.ndarray) -> None:
        hashes[name].update(np.ascontiguousarray(values).data)
        if name in arrays:
            arrays[name].append(values)
        else:
            arrays[name] = _create(group, name, values)

    names, keys, splits, lengths = [], [], [], []
    bonds, breaks, missing = Bonds(), 0, 0
    for block in _blocks(source.chains(notes), atoms):
        names += [chain.id for chain in block]
        keys += [chain.cluster for chain in block]
        splits += [SPLITS.index(chain.split) for chain in block if chain.split is not None]
        lengths += [len(chain.sequence) for chain in block]
        xyz = np.concatenate([chain.xyz for chain in block])
        segments = [_segment(chain, atoms) for chain in block]
        put("xyz", xyz)
        put("residue", encode("".join(chain.sequence for chain in block)))
        put("segment", np.concatenate(segments))
        for name in block[0].extra:
            put(name, np.concatenate([chain.extra[name] for chain in block]))
        breaks += sum(int(segment[-1]) for segment in segments)
        missing += int(np.isnan(xyz).any(-1).sum())
        if atoms == ATOMS:
            bonds.add(xyz, np.concatenate([np.diff(s, prepend=-1) != 0 for s in segments]))
    if not names:
        raise SourceError("the source gives no chain; choose other files or looser limits")
    residue, offsets = arrays["residue"][:], np.cumsum([0, *lengths], dtype=np.int64)
    groups = source.groups(residue, offsets, names, keys, notes)
    split = np.array(splits or clusters.split(residue, offsets, groups, names), np.uint8)
    encoded = np.array([name.encode() for name in names])
    put("offsets", offsets)
    put("id", encoded.view(np.uint8).reshape(len(names), -1))
    put("split", split)
    put("cluster", groups.astype(np.int32))
    about = {
        "atoms": atoms,
        "counts": {
            **_counts(np.array(lengths), groups),
            "splits": {
                name: _counts(np.array(lengths)[split == number], groups[split == number])
                for number, name in enumerate(SPLITS)
            },
            "breaks": breaks,
            "missing atoms": missing,
        },
        "bonds": bonds.result(),
        "split": "the source itself" if splits else source.rule,
    }
    return about, {name: sha256.hexdigest() for name, sha256 in hashes.items()}


def _create(group: Any, name: str, values: np.ndarray) -> Any:
    """An array that holds these values and can grow; if it will, they fill a chunk."""
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(min(chunk_rows(values), len(values)), *values.shape[1:]),
        compressors=ZstdCodec(level=-5, checksum=True),
        fill_value=np.nan if values.dtype.kind == "f" else 0,
        config={"write_empty_chunks": True},
    )
    array[:] = values
    return array


def chunk_rows(values: np.ndarray) -> int:
    """Rows in a chunk of an array like this."""
    width = int(np.prod(values.shape[1:], dtype=np.int64))
    return max(CHUNK * 3 // max(width, 3), 1)


def _counts(lengths: np.ndarray, groups: np.ndarray) -> dict[str, int]:
    clusters, residues = len(np.unique(groups)), int(lengths.sum())
    return {"chains": len(lengths), "clusters": clusters, "residues": residues}


def _blocks(chains: Iterable[Chain], atoms: tuple[str, ...]) -> Iterator[list[Chain]]:
    """The chains by BLOCK residues, none of which can spoil a store.

    Raises:
        SourceError: names the first chain that would, and how.
    """
    block, residues, first = [], 0, None
    for chain in chains:
        first = first or chain
        if fault := _fault(chain, first, atoms):
            raise SourceError(f"chain {chain.id}: {fault}; correct the source or leave it out")
        block.append(chain)
        residues += len(chain.sequence)
        if residues >= BLOCK:
            yield block
            block, residues = [], 0
    if block:
        yield block


def _segment(chain: Chain, atoms: tuple[str, ...]) -> np.ndarray:
    """(residues,) int32: 0, 1, ..., one more after every break; other atoms have no bonds."""
    if chain.segment is None and atoms != ATOMS:
        return np.zeros(len(chain.sequence), np.int32)
    return np.cumsum(chain.breaks, dtype=np.int32)


def _fault(chain: Chain, first: Chain, atoms: tuple[str, ...]) -> str:
    length = len(chain.sequence)
    if chain.xyz.shape != (length, len(atoms), 3) or chain.xyz.dtype != np.float32 or not length:
        return (
            f"xyz is {chain.xyz.dtype} {chain.xyz.shape}, its {length} residues of "
            f"{', '.join(atoms)} need float32 ({max(length, 1)}, {len(atoms)}, 3)"
        )
    if np.isinf(chain.xyz).any():
        return "a coordinate is infinite (missing ones are NaN)"
    if np.isnan(chain.xyz).all():
        return "no atom was observed"
    if (chain.split is None) != (first.split is None):
        return f"split is {chain.split}, that of {first.id} is {first.split}: give all or none"
    if chain.split not in (None, *SPLITS):
        return f"split is {chain.split}, not one of {', '.join(SPLITS)}"
    if chain.segment is not None:
        steps = np.diff(chain.segment, prepend=0)
        if chain.segment.shape != (length,) or steps[0] or not np.isin(steps, (0, 1)).all():
            return f"segment must hold {length} numbers: 0, ..., one more after each break"
    kinds, others = (
        {name: (x.dtype, x.shape[1:]) for name, x in each.extra.items()} for each in (chain, first)
    )
    if kinds != others:
        return f"its extra arrays are {kinds}, those of {first.id} are others"
    for name, array in chain.extra.items():
        if name in OWN or array.dtype.kind not in "fiu" or len(array) != length:
            return f"extra array {name} must hold numbers, {length} rows, under a name of its own"
        if not np.isfinite(array).all():
            return f"extra array {name} holds NaN or infinity"
    return ""
