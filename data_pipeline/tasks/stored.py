"""Tasks whose samples follow from their number, written into a store and read from there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.batch import Sample
from data_pipeline.chains import SPLITS, Chain, Notes
from data_pipeline.counter_rng import evaluation_key
from data_pipeline.errors import OptionError
from data_pipeline.store.reader import Store
from data_pipeline.tasks.nbody import NBody
from data_pipeline.tasks.protocol import Task
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
            for first in range(0, self.task.size(split), _TOGETHER):
                items = range(first, min(first + _TOGETHER, self.task.size(split)))
                keys = [evaluation_key(split, item) for item in items]
                sample = self.task.sample(split, items, keys, 0, self.task.tokens)
                for row, item in enumerate(items):
                    yield _chain(f"{split}/{item}", split, sample, row)


def _chain(name: str, split: str, sample: Sample, row: int) -> Chain:
    inputs, length = sample.inputs, sample.length
    target = sample.target if sample.per_token else sample.target[..., None].expand(-1, -1, length)
    arrays = {"vectors": inputs.vectors, "scalars": inputs.scalars, "target": target}
    extra = {name: x[row].movedim(-1, 0).contiguous().numpy() for name, x in arrays.items()}
    points = inputs.points[row].T[:, None].contiguous().numpy()
    none = np.zeros(length, np.int64)
    return Chain(name, "X" * length, points, cluster=name, split=split, segment=none, extra=extra)


@dataclass
class Materialised(Task):
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
        self.digest = self.hash(self._store.digest)

    def lengths(self, split: str) -> np.ndarray:
        return self._store.lengths[self._chains[split]]

    def describe(self, split: str, item: int) -> str:
        return self._store.name(int(self._chains[split][item]))

    def baselines(self, split: str) -> dict[str, float]:
        """Those of the task that made the samples."""
        return self._made.baselines(split)

    def sample(
        self, split: str, items: Sequence[int | None], keys: Sequence[int], start: int, stop: int
    ) -> Sample:
        """See Task. Keys do nothing."""
        window, made = Window(self.row_lengths(split, items), start, stop), self._made
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
