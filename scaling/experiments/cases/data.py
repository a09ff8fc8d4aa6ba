"""What the data pipeline costs, each beside its alternative in the same run.

The store is made for the measurement: random walks, no proteins. Reads are of cold caches of ours
and warm caches of the operating system, on both sides.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch

from data_pipeline.chains import Chain, Notes
from data_pipeline.store.build import build
from data_pipeline.store.reader import Store
from data_pipeline.stream.stream import Stream
from data_pipeline.tasks.denoising import Denoising
from data_pipeline.tasks.packed import PackedBodies
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Checked, Count
from scaling.observe.memory import peak_bytes, reset_peak
from scaling.parallel.collectives import Group
from scaling.runs.rows import Row

ARRAYS = ("xyz", "residue", "segment")
ATOMS = 3
"""Tokens of a residue: N, CA, C."""


class WalkSource:
    """Chains of 60 to 390 residues, made as they are asked for."""

    def __init__(self, chains: int):
        self._chains = chains

    def identity(self) -> dict[str, Any]:
        return {"kind": "walks for a measurement", "files": {}, "chains": self._chains}

    def chains(self, notes: Notes) -> Iterator[Chain]:
        random = np.random.default_rng(0)
        walk = np.cumsum(random.normal(size=(4 * 1500, 3)), 0).astype(np.float32)
        walk = walk.reshape(1500, 4, 3)
        for i in range(self._chains):
            length, first = int(random.integers(60, 390)), int(random.integers(0, 1100))
            # A cluster each: comparing sequences is not what is measured here.
            yield Chain(f"{i}", "A" * length, walk[first : first + length], cluster=f"{i}")


@dataclass
class DataOptions(Checked):
    """
    Args:
        chains: in the larger store; the smaller has half as many.
        tokens: of the packed sample.
        sp: ranks that share it.
    """

    chains: Count = 9400
    tokens: Count = 1 << 20
    sp: Count = 8


def data_rows(options: DataOptions, _group: Group, _device: torch.device) -> list[Row]:
    """Builds stores and measures reading them; times are ours, ratios how many times as fast as
    the alternative that the case names."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        began = perf_counter()
        manifest = build(folder / "large", WalkSource(options.chains))
        seconds = perf_counter() - began
        build(folder / "small", WalkSource(options.chains // 2))
        return [
            row("write", 1, 0, manifest["counts"]["residues"] / seconds, "residues/s"),
            *_slices(folder / "large", options.tokens, options.sp),
            _random_chains(folder / "large"),
            *_memory(folder),
        ]


def _slices(path: Path, tokens: int, sp: int) -> list[Row]:
    """One rank's part of a packed sample: the same rows from the store and from numpy.memmap."""
    store, flat = Store(path), _memory_maps(path)
    layout = PackedBodies(store, "train", ATOMS, tokens)
    task = Denoising(str(path), packed_length=tokens)
    length = int(layout.lengths[0])
    ours, mapped, runs, samples = [], [], [], []
    for rank in range(sp):
        start, stop = length * rank // sp, length * (rank + 1) // sp
        pieces = layout.pieces(0, 1, start, stop)
        chains, first, last = pieces.chains, pieces.starts // ATOMS, -(-pieces.stops // ATOMS)
        low, high = store.offsets[chains] + first, store.offsets[chains] + last
        rows = list(zip(low.tolist(), high.tolist(), strict=True))

        def gather(chains=chains, first=first, last=last) -> list[np.ndarray]:
            fresh = Store(path)  # nothing decoded is kept
            began = perf_counter()
            found = [fresh.gather(name, chains, first, last) for name in ARRAYS]
            ours.append(perf_counter() - began)
            return found

        def by_chain(rows=rows) -> list[np.ndarray]:
            return [np.concatenate([each[a:b] for a, b in rows]) for each in flat.values()]

        for found, wanted in zip(gather(), by_chain(), strict=True):
            np.testing.assert_array_equal(found, wanted)
        gather()
        mapped.append(_seconds(by_chain))
        runs.append(_seconds(lambda: [np.array(x[low.min() : high.max()]) for x in flat.values()]))  # noqa: B023
        samples.append(_seconds(lambda: task.sample("train", [0], [1], start, stop), times=1))  # noqa: B023
    own, each = statistics.median(ours) * 1e3, statistics.median(mapped) * 1e3
    run, sample = statistics.median(runs) * 1e3, statistics.median(samples)
    what = f"1/{sp} of a packed sample of {length:,} tokens"
    beside = (("the same chains", each), ("one run of as many rows", run))
    return [
        *(
            row(f"{what}, beside {other} of numpy.memmap", sp, length, own, "ms", theirs / own)
            for other, theirs in beside
        ),
        row(f"{what}, made into inputs", sp, length, length / sp / sample, "tokens/s"),
    ]


def _random_chains(path: Path, count: int = 600) -> Row:
    """Coordinates of random chains: by chunk, and one zarr slice after another."""
    import zarr

    group: Any = zarr.open_group(path, mode="r")
    xyz, stores = group["xyz"], [Store(path) for _ in range(3)]
    offsets, lengths = stores[0].offsets, stores[0].lengths
    chosen = np.random.default_rng(0).choice(len(lengths) // 2, count, replace=False)
    zeros = np.zeros_like(chosen)
    ours = [
        _seconds(lambda s=s: s.gather("xyz", chosen, zeros, lengths[chosen]), 1) for s in stores
    ]
    loop = _seconds(lambda: [xyz[offsets[c] : offsets[c + 1]] for c in chosen], 1)
    what = f"{count} random chains of {len(lengths) // 2:,}, beside a slice for each"
    own = statistics.median(ours)
    return row(what, 1, 0, own * 1e3, "ms", loop / own)


def _memory(folder: Path) -> list[Row]:
    """Peak memory of a rank that streams chains, beyond that of its libraries."""
    rows = []
    for name in ("small", "large"):
        with get_context("spawn").Pool(1) as pool:
            peak = pool.apply(_streaming_peak, (str(folder / name),))
        residues = Store(folder / name).lengths.sum()
        what = f"memory to stream from {residues:,} residues"
        rows.append(row(what, 1, 0, peak / 1e6, "MB"))
    return rows


def _streaming_peak(path: str) -> float:
    device = torch.device("cpu")
    base = reset_peak(device)
    task = Denoising(path)
    stream = Stream(task, "train", batch_size=8, micro_batch_size=8, seed=0, max_length=1 << 20)
    for _ in range(100):
        next(stream)
    stream.close()
    return peak_bytes(device) - base


def _memory_maps(path: Path) -> dict[str, np.ndarray]:
    import zarr

    group: Any = zarr.open_group(path, mode="r")
    maps = {}
    for name in ARRAYS:
        file = path.parent / f"{name}.npy"
        np.save(file, group[name][:])
        maps[name] = np.load(file, mmap_mode="r")
    return maps


def _seconds(function: Callable[[], object], times: int = 3) -> float:
    """The median of some calls."""
    found = []
    for _ in range(times):
        began = perf_counter()
        function()
        found.append(perf_counter() - began)
    return statistics.median(found)


BENCH = Experiment(DataOptions, lambda options: [Point("stores", 0, options)], data_rows)
