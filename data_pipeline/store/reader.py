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

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data_pipeline.chains import SPLITS, fasta
from data_pipeline.errors import ConfigError, OptionError, StoreError, damaged, unreadable
from data_pipeline.store.manifest import OWN, open_arrays, read_manifest

CACHED_CHUNKS = 64
"""Decoded chunks that a reader keeps: at most 50 MB."""


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
        self.atoms: tuple[str, ...] = tuple(self.manifest["atoms"])
        """Names of the second axis of xyz."""
        self._arrays = open_arrays(self.path, self.manifest)
        extra = sorted(self._arrays.keys() - set(OWN))
        self.kinds = {
            name: (str(self._arrays[name].dtype), self._arrays[name].shape[1:]) for name in extra
        }
        """dtype and shape of a row of the arrays that the source gave beyond those of all."""
        self._chunk = lru_cache(CACHED_CHUNKS)(self._decode)
        self.offsets: np.ndarray = self.whole("offsets")
        self.lengths = np.diff(self.offsets)
        """Residues of each chain."""
        self._split = self.whole("split")

    def chains(self, split: str) -> np.ndarray:
        """Numbers of the chains of a split."""
        return np.flatnonzero(self._split == SPLITS.index(split))

    def name(self, chain: int) -> str:
        number, row = divmod(chain, self.chunk_rows("id"))
        return self._chunk("id", number)[row].tobytes().rstrip(b"\0").decode()

    def fasta(self) -> Iterator[str]:
        """The sequence of each chain, under its name."""
        for chain, length in enumerate(self.lengths):
            yield fasta(self.name(chain), self.read("residue", chain, 0, int(length)))

    def chunks_of(self, chains: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """The chunk of xyz in which each chain begins, and that of its end."""
        rows = self.chunk_rows("xyz")
        return self.offsets[chains] // rows, (self.offsets[chains + 1] - 1) // rows

    def chunk_rows(self, array: str) -> int:
        return self._arrays[array].chunks[0]

    def whole(self, array: str) -> np.ndarray:
        """All rows of an array."""
        chunks = -(-self._arrays[array].shape[0] // self.chunk_rows(array))
        return np.concatenate([self._decode(array, number) for number in range(chunks)])

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
        source, rows = self._arrays[array], self.chunk_rows(array)
        first, last, lengths = (
            self.offsets[chains] + starts,
            self.offsets[chains] + stops,
            stops - starts,
        )
        places = np.cumsum(lengths) - lengths
        out = np.empty((int(lengths.sum()), *source.shape[1:]), source.dtype)
        for i in np.argsort(first):  # in the order of the chunks, so that the cache suffices
            place, low, end = int(places[i]), int(first[i]), int(last[i])
            while low < end:
                number, skipped = divmod(low, rows)
                found = self._chunk(array, number)[skipped : skipped + end - low]
                out[place : place + len(found)] = found
                place, low = place + len(found), low + len(found)
        return out

    def _decode(self, array: str, number: int) -> np.ndarray:
        """One chunk of an array."""
        source, rows = self._arrays[array], self.chunk_rows(array)
        try:
            return source[number * rows : (number + 1) * rows]
        except (StoreError, MemoryError):  # a full memory damages no store
            raise
        except OSError as error:  # nor do too many open files, or a disk that is away
            file = str(error.filename or f"{self.path}/{array}")
            raise StoreError(unreadable(file, error)) from error
        except Exception as error:  # every codec has its own
            name = source.metadata.encode_chunk_key((number, *[0] * (source.ndim - 1)))
            raise damaged(self.path, f"{array}/{name} is damaged: {error}") from error


def open_alike(paths: Sequence[str]) -> list[Store]:
    """Stores that make a mixture.

    Raises:
        ConfigError: none given, or their arrays are not of one kind (names both).
        StoreError: see Store.
    """
    if not paths:
        raise OptionError("store", paths, "names no store; give one, or a list of them")
    first, *others = stores = [Store(path) for path in paths]
    for other in others:
        if (other.atoms, other.kinds) != (first.atoms, first.kinds):
            raise ConfigError(
                f"{other.path} holds {', '.join(other.atoms)} and {other.kinds}, but {first.path} "
                f"{', '.join(first.atoms)} and {first.kinds}: a mixture needs one kind"
            )
    return stores
