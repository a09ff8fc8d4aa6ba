"""Tasks whose samples follow from their number, written into a store and read from there."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import Sample
from data_pipeline.chains import SPLITS, Chain, Notes
from data_pipeline.counter_rng import evaluation_key
from data_pipeline.errors import OptionError
from data_pipeline.store.reader import Store
from data_pipeline.tasks.nbody import NBody
from data_pipeline.tasks.recall import Recall
from data_pipeline.tasks.window import Window

PROCEDURAL = {"recall": Recall, "nbody": NBody}
_TOGETHER = 64
"""Samples made at a time."""


@dataclass(frozen=True)
class ProceduralSource:
    """All samples of a generated task as it gives them in evaluation."""

    task: Recall | NBody

    atoms = ("point",)

    def identity(self) -> dict[str, Any]:
        """The task and its options; there are no files."""
        return {"kind": self.task.name, "files": {}, "task": self.task.options()}

    def chains(self, notes: Notes) -> Iterator[Chain]:
        """Samples with `vectors`, `scalars` and `target`, one for a sequence in all its rows."""
        for split in SPLITS:
            size = self.task.size(split)
            for first in range(0, size, _TOGETHER):
                items = range(first, min(first + _TOGETHER, size))
                keys = [evaluation_key(split, item) for item in items]
                length = max(self.task.length(split, item) for item in items)
                sample = self.task.sample(split, items, keys, 0, length)
                for row, item in enumerate(items):
                    yield _chain(f"{split}/{item}", split, sample, row)


def _chain(name: str, split: str, sample: Sample, row: int) -> Chain:
    inputs, target = sample.inputs, sample.target[row]
    length = int(inputs.mask[row].sum())
    if not sample.per_token:
        target = target[:, None].expand(3, length)

    def tokens_first(x: torch.Tensor) -> np.ndarray:
        return np.ascontiguousarray(x[..., :length].movedim(-1, 0).numpy())

    return Chain(
        name,
        "X" * length,
        tokens_first(inputs.points[row])[:, None],
        cluster=name,
        split=split,
        segment=np.zeros(length, np.int64),
        extra={
            "vectors": tokens_first(inputs.vectors[row]),
            "scalars": tokens_first(inputs.scalars[row]),
            "target": tokens_first(target),
        },
    )


@dataclass
class Materialised:
    """A generated task's samples out of the store that `prepare source=<task>` wrote."""

    store: str

    name = "materialised"

    def __post_init__(self) -> None:
        self._store = Store(self.store)
        source = self._store.manifest["source"]
        if source["kind"] not in PROCEDURAL:
            rule = f"holds {source['kind']}, not samples of {' or '.join(PROCEDURAL)}"
            raise OptionError("store", self.store, f"{rule}; choose task=denoising for it")
        self._made = PROCEDURAL[source["kind"]](**source["task"])
        self._chains = {split: self._store.chains(split) for split in SPLITS}
        self.vectors, self.scalars = self._made.vectors, self._made.scalars
        self.unit = self._made.unit
        options = [self.name, self._store.digest]
        self.digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()

    def size(self, split: str) -> int:
        return len(self._chains[split])

    def parts(self, split: str) -> list[tuple[int, int]]:
        return [(self.size(split), 1)]

    def length(self, split: str, item: int) -> int:
        return int(self._store.lengths[self._chains[split][item]])

    def longest(self, split: str) -> int:
        return int(np.argmax(self._store.lengths[self._chains[split]]))

    def describe(self, split: str, item: int) -> str:
        return self._store.name(int(self._chains[split][item]))

    def baselines(self, split: str) -> dict[str, float]:
        """Those of the task that made the samples."""
        return self._made.baselines(split)

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        """See Task. Keys do nothing."""
        window, made = Window(self, split, items, start, stop), self._made
        arrays = {"xyz": window.zeros(1, 3), "vectors": window.zeros(self.vectors, 3)}
        arrays |= {"scalars": window.zeros(self.scalars), "target": window.zeros(3)}
        answer = np.zeros((len(items), 3), np.float32)
        for row, item in enumerate(items):
            if item is None:
                continue
            chain, end = int(self._chains[split][item]), min(stop, window.lengths[row])
            answer[row] = self._store.read("target", chain, 0, 1)[0]
            for name, array in arrays.items() if end > start else ():
                values = self._store.read(name, chain, start, end)
                array[row, ..., : end - start] = np.moveaxis(values, 0, -1)
        xyz, target = arrays.pop("xyz"), arrays.pop("target")
        target = target if isinstance(made, NBody) else answer
        read_out = made.read_out(arrays["scalars"])
        return window.sample(target, points=xyz[:, 0], **arrays, **read_out)
