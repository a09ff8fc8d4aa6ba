"""A training state in shards: what each rank gives, and what any other number of ranks takes.

A shard is some consecutive elements of a tensor that lies flat. Every rank gives the shards that
it owns, each element once; together they are the state, however an engine cuts it.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

PARAMETER = "parameter"
"""What the values themselves are called, beside an optimiser's names for what it keeps of them."""


class Shard(NamedTuple):
    """Elements [start, start + len(values)) of a flat tensor; all of a tensor without axes."""

    start: int
    values: Shaped[Tensor, "*n"]


Shards = dict[str, dict[str, Shard]]
"""Name of a parameter or buffer -> PARAMETER or an optimiser's name -> shard."""


def shard_of(x: Tensor, rank: int, ranks: int) -> Shard:
    """A rank's equal part of what every rank has whole; the first rank's, of one without axes."""
    if not x.ndim:
        return Shard(0, on_cpu(x) if rank == 0 else on_cpu(x.new_empty(0)))
    start, stop = (x.numel() * each // ranks for each in (rank, rank + 1))
    return Shard(start, on_cpu(x.detach().reshape(-1)[start:stop]))


def on_cpu(x: Tensor) -> Tensor:
    """A copy that later steps do not change."""
    return x.detach().to("cpu", copy=True)


class SavedState:
    """All shards of a state, which may lie in files that are mapped into memory."""

    def __init__(self, shards: Iterable[Mapping[str, Mapping[str, tuple[int, Tensor]]]]) -> None:
        self._shards: dict[str, dict[str, list[Shard]]] = {}
        for each in shards:
            for name, kinds in each.items():
                for kind, (start, values) in kinds.items():
                    pieces = self._shards.setdefault(name, {}).setdefault(kind, [])
                    if values.numel():
                        pieces.append(Shard(start, values))
        for kinds in self._shards.values():
            for pieces in kinds.values():
                pieces.sort(key=lambda piece: piece.start)

    def names(self) -> list[str]:
        """Of parameters and buffers."""
        return list(self._shards)

    def kinds(self, name: str) -> list[str]:
        """What the optimiser keeps of a parameter."""
        return [kind for kind in self._shards.get(name, {}) if kind != PARAMETER]

    def numel(self, name: str, kind: str) -> int:
        """Elements of a tensor.

        Raises:
            ValueError: some are missing, or there more than once.
        """
        stop = 0
        for start, values in self._shards[name][kind]:
            if start != stop:
                raise ValueError(f"{name} ({kind}) has a shard at {start}, not at {stop}")
            stop += values.numel()
        return stop

    def read(
        self, name: str, kind: str, start: int = 0, stop: int | None = None
    ) -> Shaped[Tensor, "*n"]:
        """Elements [start, stop) of a flat tensor, or a whole one without axes; mapped, not
        copied, where one shard has them all."""
        parts = []
        for first, values in self._shards[name][kind]:
            if not values.ndim:
                return values
            last = first + len(values) if stop is None else min(stop, first + len(values))
            if max(start, first) < last:
                parts.append(values[max(start - first, 0) : last - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)
