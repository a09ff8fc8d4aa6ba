"""Several stores as one."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from data_pipeline.errors import ConfigError
from data_pipeline.store.reader import Store


class StoreMixture:
    """Stores one after another: chain numbers run through all of them.

    Raises:
        ConfigError: none given, or their arrays are not of one kind (names both).
        StoreError: see Store.
    """

    def __init__(self, paths: Sequence[str]):
        if not paths:
            raise ConfigError("task.store names no store; give one, or a list of them")
        self.parts = [Store(path) for path in paths]
        first = self.parts[0]
        self.atoms = first.atoms
        for part in self.parts[1:]:
            if (part.atoms, part.kinds) != (first.atoms, first.kinds):
                raise ConfigError(
                    f"{part.path} holds {', '.join(part.atoms)} and {part.kinds}, but {first.path} "
                    f"{', '.join(first.atoms)} and {first.kinds}: a mixture needs one kind"
                )
        self.kinds = first.kinds
        self.lengths = np.concatenate([part.lengths for part in self.parts])
        self.bases = np.cumsum([0, *(len(part.lengths) for part in self.parts)])
        """Number of each store's first chain, and of all."""
        digests = [part.digest for part in self.parts]
        self.digest = digests[0]
        if len(digests) > 1:
            self.digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def chains(self, split: str) -> list[Int[np.ndarray, " n"]]:
        """Numbers of the chains of a split, of each store."""
        return [
            part.chains(split) + base for part, base in zip(self.parts, self.bases, strict=False)
        ]

    def name(self, chain: int) -> str:
        part = self._part(chain)
        return self.parts[part].name(chain - int(self.bases[part]))

    def pages(self, chains: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """For chains of one store: the chunk of xyz in which each begins, and that of its end."""
        part = self._part(int(chains[0]))
        store = self.parts[part]
        chains = chains - self.bases[part]
        rows = store.chunk_rows("xyz")
        return store.offsets[chains] // rows, (store.offsets[chains + 1] - 1) // rows

    def gather(
        self, array: str, chains: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> np.ndarray:
        """Rows [start, stop) of each chain, one after another; every chunk is decoded once."""
        if len(self.parts) == 1:
            return self.parts[0].gather(array, chains, starts, stops)
        owner = np.searchsorted(self.bases, chains, side="right") - 1
        rows = np.repeat(owner, stops - starts)
        out = None
        for number in np.unique(owner):
            mine = owner == number
            found = self.parts[number].gather(
                array, chains[mine] - self.bases[number], starts[mine], stops[mine]
            )
            out = np.empty((len(rows), *found.shape[1:]), found.dtype) if out is None else out
            out[rows == number] = found
        return self.parts[0].gather(array, chains, starts, stops) if out is None else out

    def _part(self, chain: int) -> int:
        return int(np.searchsorted(self.bases, chain, side="right")) - 1
