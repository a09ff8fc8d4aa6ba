"""Memory that live tensors hold, by what they are for."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaling.parallel.telemetry import innermost_range

KEPT, TILE = "kept activations", "tile workspace"
PURPOSES = {"transforms": "FFT workspace and spectra", "comm": "exchange buffers"}
"""Of what is made inside these timed ranges. All else is kept where it has every token, and
part of a tile where it has not: tokens are the last axis."""


class LiveTensors(TorchDispatchMode):
    """While it is entered, counts the bytes of all tensors that operators make and nobody has freed
    yet; `peak` is what was held, by purpose, when it was most.

    Args:
        tokens: of this process.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.peak: Counter[str] = Counter()
        self._tokens = tokens
        self._held: Counter[str] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._count(x)
        if self._held.total() > self.peak.total():
            self.peak = self._held.copy()
        return result

    def _count(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._known:
            return
        whole = x.ndim > 0 and x.shape[-1] % self._tokens == 0
        purpose = PURPOSES.get(innermost_range() or "", KEPT if whole else TILE)
        self._known.add(key)
        self._held[purpose] += size

        def freed() -> None:
            self._known.discard(key)
            self._held[purpose] -= size

        weakref.finalize(storage, freed)
