"""A user's own numpy arrays as samples: RNA, trajectories, any points with an order.

All samples lie behind each other, n tokens in all, in one .npz file or a folder of .npy files
(read through memory maps, so that it may be larger than memory):

    points    (n, 3) or, for tokens of a points each, (n, a, 3); missing points are NaN
    offsets   (samples + 1,)   sample i is [offsets[i], offsets[i + 1])
    vectors   (n, v, 3)        free vectors: velocities, dipoles
    scalars   (n, s)           what no rotation changes: charges, temperatures
    kinds     (n,) integers    what a token is (nucleotide, bead); becomes one-hot scalars
    segments  (n,) integers    another number where a body or chain ends inside a sample
    groups    (samples,)       samples of one group (frames of one trajectory) share a split
    split     (samples,)       train, validation or test; without it, by group
    ids       (samples,)       names in messages
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.chains import SPLITS, Chain, Notes
from data_pipeline.errors import SourceError
from data_pipeline.sources.protein import file_sha256

MOST_KINDS = 256

# What each array holds: kind of dtype, axes, and how many rows: of tokens, samples or ends.
_ARRAYS = {
    "points": ("f", (2, 3), "tokens"),
    "offsets": ("iu", (1,), "ends"),
    "vectors": ("f", (3,), "tokens"),
    "scalars": ("f", (2,), "tokens"),
    "kinds": ("iu", (1,), "tokens"),
    "segments": ("iu", (1,), "tokens"),
    "groups": ("iuUS", (1,), "samples"),
    "split": ("US", (1,), "samples"),
    "ids": ("US", (1,), "samples"),
}


@dataclass
class ArraySource:
    """The samples in one .npz file or a folder of .npy files."""

    path: Path

    @property
    def atoms(self) -> tuple[str, ...]:
        """Names for the points of a token."""
        points = self._arrays["points"]
        count = 1 if points.ndim == 2 else points.shape[1]
        return ("point",) if count == 1 else tuple(f"point{i}" for i in range(count))

    def identity(self) -> dict[str, Any]:
        """Names and sha256 of the files."""
        assert "points" in self._arrays  # or it raised
        files = {file.name: file_sha256(file) for file in self._files()}
        return {"kind": "arrays", "files": files}

    def chains(self, notes: Notes) -> Iterator[Chain]:
        """One sample a time, in the arrays' order.

        Raises:
            SourceError: names the array or sample, what it has and what it needs.
        """
        arrays = self._arrays
        offsets = np.asarray(arrays["offsets"], np.int64)
        kinds = int(arrays["kinds"].max()) + 1 if "kinds" in arrays else 0
        for sample, (first, last) in enumerate(pairwise(offsets.tolist())):
            here = {
                name: array[first:last]
                for name, array in arrays.items()
                if _ARRAYS[name][2] == "tokens"
            }
            own = {
                name: str(_text(array[sample]))
                for name, array in arrays.items()
                if _ARRAYS[name][2] == "samples"
            }
            name = own.get("ids", f"{self.path.stem}/{sample}")
            xyz = self._finite(name, "points", here["points"]).reshape(last - first, -1, 3)
            extra = {key: self._finite(name, key, here[key]) for key in ("vectors", "scalars")
                     if key in here}  # fmt: skip
            if kinds:
                one_hot = np.eye(kinds, dtype=np.float32)[here["kinds"]]
                extra["scalars"] = np.concatenate(
                    [extra.get("scalars", one_hot[:, :0]), one_hot], 1
                )
            segments = np.asarray(here.get("segments", np.zeros(last - first, np.int64)), np.int64)
            yield Chain(
                name,
                "X" * (last - first),
                xyz,
                cluster=own.get("groups", name),
                split=own.get("split"),
                segment=np.cumsum(np.diff(segments, prepend=segments[:1]) != 0),
                extra=extra,
            )

    def _finite(self, name: str, key: str, values: np.ndarray) -> np.ndarray:
        """As float32. Points may be missing as a whole, nothing else may be NaN."""
        with np.errstate(over="ignore"):
            values = np.asarray(values, np.float32)
        wrong = ~np.isfinite(values)
        if key == "points":
            wrong &= ~np.isnan(values).all(-1, keepdims=True)
        if wrong.any():
            token, *_ = np.argwhere(wrong)[0]
            raise SourceError(
                f"{self.path}: {key} of sample {name}, token {token}, hold a number that is not "
                f"finite, {values[token].tolist()}; correct it (a missing point is NaN in x, y, z)"
            )
        if key == "points" and not np.isfinite(values).any():
            raise SourceError(
                f"{self.path}: sample {name} has no point that is not NaN; leave it out"
            )
        return values

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*.npy")) if self.path.is_dir() else [self.path]

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """All arrays, by name, whose shapes fit each other."""
        try:
            if self.path.is_dir():
                arrays = {f.stem: np.load(f, mmap_mode="r") for f in self._files()}
            else:
                with open(self.path, "rb") as file:
                    found = np.load(file)
                    if not isinstance(found, Mapping):
                        raise ValueError("it is one array")
                    arrays = {name: found[name] for name in found}
        except MemoryError:  # the file may be sound
            raise
        except Exception as error:  # zip, header and pickled objects have each their own
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise SourceError(
                f"cannot read path={self.path}: {reason}; give an .npz file of plain "
                "arrays, or a folder of .npy files"
            ) from error
        if fault := _fault(arrays):
            raise SourceError(f"{self.path}: {fault}")
        return arrays


def _fault(arrays: dict[str, np.ndarray]) -> str:
    for name in ("points", "offsets"):
        if name not in arrays:
            return f"there is no array {name}; it has {', '.join(arrays) or 'nothing'}"
    tokens = len(arrays["points"]) if arrays["points"].ndim else 0
    samples = max(arrays["offsets"].size - 1, 0)
    rows = {"tokens": tokens, "samples": samples, "ends": samples + 1}
    for name, array in arrays.items():
        if name not in _ARRAYS:
            return f"there is an array {name}; known ones are {', '.join(_ARRAYS)}"
        dtypes, axes, counted = _ARRAYS[name]
        if array.dtype.kind not in dtypes or array.ndim not in axes:
            return f"{name} is {array.dtype} of shape {array.shape}; see docs/data.md for its form"
        if len(array) != rows[counted]:
            return f"{name} has {len(array)} rows, but there are {rows[counted]} {counted}"
        if name in ("points", "vectors") and (array.shape[-1] != 3 or 0 in array.shape):
            return f"{name} has shape {array.shape}; its last axis must be x, y, z, and none empty"
    checks: dict[str, Callable[[np.ndarray], str]] = {
        "offsets": lambda x: "" if x[0] == 0 and x[-1] == tokens and (np.diff(x) > 0).all() else
        f"offsets must rise from 0 to the {tokens} tokens, every sample one or more",
        "kinds": lambda x: "" if x.min() >= 0 and x.max() < MOST_KINDS else
        f"kinds must lie in 0 ... {MOST_KINDS - 1}, not {x.min()} ... {x.max()}",
        "split": lambda x: "" if not (odd := {_text(s) for s in x} - set(SPLITS)) else
        f"split holds {min(odd)!r}; it may be {', '.join(SPLITS)}",
        "ids": lambda x: "" if len(np.unique(x)) == len(x) else "ids holds a name twice",
    }  # fmt: skip
    faults = [check(arrays[name]) for name, check in checks.items() if name in arrays]
    return next(filter(None, faults), "")


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
