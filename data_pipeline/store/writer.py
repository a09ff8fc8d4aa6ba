"""Chains to the arrays of a store, block by block: memory does not grow with the store.

What grows are some 100 bytes a chain: names, offsets, hashes. Sequences are compared from a file
beside the arrays, one byte a residue, which is removed before the store is finished.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.chains import ATOMS, SPLITS, Bonds, Chain, Notes, bonded, encode
from data_pipeline.errors import SourceError
from data_pipeline.store import clusters
from data_pipeline.store.grouping import Grouping
from data_pipeline.store.manifest import BLOCK, OWN

CHUNK = 1 << 16
"""Most rows in a chunk, and most vectors of three numbers: 786 kB of float32."""


@dataclass
class Written:
    """What the arrays hold."""

    counts: dict[str, Any]
    bonds: dict[str, tuple[float, float]]
    split: str
    """The rule that made the split."""
    sha256: dict[str, str]
    """Of the values of each array, as they were given to the disk."""


def write(
    folder: Path,
    chains: Iterable[Chain],
    atoms: tuple[str, ...],
    grouping: Grouping,
    notes: Notes,
    shard: int = 1,
) -> Written:
    """All arrays of a store into an empty folder.

    Args:
        atoms: names of the second axis of xyz.
        notes: gains what the grouping has to say.
        shard: chunks in a file; more than one where files are dear (object stores, inodes).

    Raises:
        SourceError: no chain at all, or one that fits neither itself nor the others (named).
        OSError: as the disk says.
    """
    import zarr

    group = zarr.create_group(folder)
    columns: dict[str, _Column] = {}

    def put(name: str, values: np.ndarray) -> None:
        columns.setdefault(name, _Column(group, name, shard)).append(values)

    table, bonds, breaks, missing = _Table(), Bonds(), 0, 0
    scratch = folder / "sequences"
    with scratch.open("wb") as sequences:
        for block in _blocks(_checked(chains, atoms)):
            table.add(block)
            xyz = np.concatenate([chain.xyz for chain in block])
            segment = _segments(block, xyz, atoms)
            residue = encode("".join(chain.sequence for chain in block))
            put("xyz", xyz)
            put("residue", residue)
            put("segment", segment)
            for name in block[0].extra:
                put(name, np.concatenate([chain.extra[name] for chain in block]))
            residue.tofile(sequences)
            # Chains begin at segment 0; what follows it in the chain is no break.
            new = np.diff(segment, prepend=-1) != 0
            breaks += int((new & (segment > 0)).sum())
            missing += int(np.isnan(xyz).any(-1).sum())
            if atoms == ATOMS:
                bonds.add(xyz, new | _starts(block))
    if not table.names:
        raise SourceError("the source gives no chain; choose other files or looser limits")
    residue = np.memmap(scratch, np.uint8, "r")
    for name, values in table.arrays(residue, grouping, notes).items():
        put(name, values)
    counts = table.counts() | {"breaks": breaks, "missing atoms": missing}
    del residue
    scratch.unlink()
    sums = {name: columns[name].close() for name in [*OWN, *(columns.keys() - set(OWN))]}
    rule = "the source itself" if table.splits else grouping.rule
    return Written(counts, bonds.result(), rule, sums)


class _Column:
    """One array that grows by whole chunks; a last, shorter one closes it."""

    def __init__(self, group: Any, name: str, shard: int):
        self._group, self._name, self._shard = group, name, shard
        self._array: Any = None
        self._rest: list[np.ndarray] = []
        self._sha256 = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values)
        self._sha256.update(values.data)
        self._rest.append(values)
        file = chunk_rows(values) * self._shard
        if sum(map(len, self._rest)) >= file:
            rest = np.concatenate(self._rest)
            whole = len(rest) // file * file
            self._write(rest[:whole])
            self._rest = [rest[whole:].copy()]

    def close(self) -> str:
        """The sha256 of all values."""
        rest = np.concatenate(self._rest)
        if len(rest) or self._array is None:
            self._write(rest)
        return self._sha256.hexdigest()

    def _write(self, values: np.ndarray) -> None:
        from zarr.codecs import ZstdCodec

        if self._array is None:
            rows, tail = min(chunk_rows(values), len(values)), values.shape[1:]
            many = self._shard > 1 and len(values) >= rows * self._shard
            self._array = self._group.create_array(
                self._name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(rows, *tail),
                shards=(rows * self._shard, *tail) if many else None,
                compressors=ZstdCodec(level=-5, checksum=True),
                fill_value=np.nan if values.dtype.kind == "f" else 0,
                config={"write_empty_chunks": True},
            )
            self._array[:] = values
        else:
            there = self._array.shape[0]
            self._array.resize((there + len(values), *values.shape[1:]))
            self._array[there:] = values


def chunk_rows(values: np.ndarray) -> int:
    """Rows in a chunk of an array like this."""
    width = int(np.prod(values.shape[1:], dtype=np.int64))
    return max(CHUNK * 3 // max(width, 3), 1)


@dataclass
class _Table:
    """What is kept of each chain."""

    names: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    _arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, block: list[Chain]) -> None:
        self.names += [chain.id for chain in block]
        self.keys += [chain.cluster for chain in block]
        self.splits += [SPLITS.index(c.split) for c in block if c.split is not None]
        self.lengths += [len(chain.sequence) for chain in block]

    def arrays(
        self, residue: np.ndarray, grouping: Grouping, notes: Notes
    ) -> dict[str, np.ndarray]:
        """offsets, id, split and cluster, from all sequences."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        groups = grouping.groups(residue, offsets, self.names, self.keys, notes)
        split = self.splits or clusters.split(residue, offsets, groups, self.names)
        names = np.array([name.encode() for name in self.names])
        self._arrays = {
            "offsets": offsets,
            "id": names.view(np.uint8).reshape(len(names), -1),
            "split": np.array(split, np.uint8),
            "cluster": groups.astype(np.int32),
        }
        return self._arrays

    def counts(self) -> dict[str, Any]:
        lengths, cluster = np.array(self.lengths), self._arrays["cluster"]
        splits = {}
        for number, name in enumerate(SPLITS):
            chosen = self._arrays["split"] == number
            splits[name] = {
                "chains": int(chosen.sum()),
                "clusters": len(np.unique(cluster[chosen])),
                "residues": int(lengths[chosen].sum()),
            }
        return {
            "chains": len(lengths),
            "clusters": len(np.unique(cluster)),
            "residues": int(lengths.sum()),
            "splits": splits,
        }


def _blocks(chains: Iterable[Chain]) -> Iterator[list[Chain]]:
    block, residues = [], 0
    for chain in chains:
        block.append(chain)
        residues += len(chain.sequence)
        if residues >= BLOCK:
            yield block
            block, residues = [], 0
    if block:
        yield block


def _starts(block: list[Chain]) -> np.ndarray:
    """True at the first residue of each chain."""
    lengths = [len(chain.sequence) for chain in block]
    starts = np.zeros(sum(lengths), bool)
    starts[np.cumsum([0, *lengths[:-1]])] = True
    return starts


def _segments(block: list[Chain], xyz: np.ndarray, atoms: tuple[str, ...]) -> np.ndarray:
    """(residues,) int32: 0, 1, ... inside each chain, one more after every break."""
    starts = _starts(block)
    broken = np.zeros(len(xyz), bool)
    if atoms == ATOMS:
        broken[1:] = ~bonded(xyz[:-1, 2], xyz[1:, 0])
    count = np.cumsum(broken & ~starts)
    lengths = [len(chain.sequence) for chain in block]
    segments = (count - np.repeat(count[starts], lengths)).astype(np.int32)
    place = 0
    for chain, length in zip(block, lengths, strict=True):
        if chain.segment is not None:
            segments[place : place + length] = chain.segment
        place += length
    return segments


def _checked(chains: Iterable[Chain], atoms: tuple[str, ...]) -> Iterator[Chain]:
    """The chains, none of which can spoil a store.

    Raises:
        SourceError: names the first chain that would, and how.
    """
    first = None
    for chain in chains:
        first = first or chain
        if fault := _fault(chain, first, atoms):
            raise SourceError(f"chain {chain.id}: {fault}; correct the source or leave it out")
        yield chain


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
        if chain.segment.shape != (length,) or not np.isin(steps, (0, 1)).all():
            return f"segment must hold {length} numbers that go 0, ..., one more after each break"
        if chain.segment[0] != 0:
            return "segment must begin at 0"
    kinds = {name: (x.dtype, x.shape[1:]) for name, x in chain.extra.items()}
    if kinds != {name: (x.dtype, x.shape[1:]) for name, x in first.extra.items()}:
        return f"its extra arrays are {kinds}, those of {first.id} are others"
    for name, array in chain.extra.items():
        if name in OWN or array.dtype.kind not in "fiu" or len(array) != length:
            return f"extra array {name} must hold numbers, {length} rows, under a name of its own"
        if not np.isfinite(array).all():
            return f"extra array {name} holds NaN or infinity"
    return ""
