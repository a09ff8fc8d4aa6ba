"""What the data pipeline costs, each beside its alternative in the same run.

The store is made for the measurement: random walks, no proteins. Reads are of cold caches of ours
and warm caches of the operating system, on both sides.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
import zarr

from data_pipeline.chains import Chain, Notes
from data_pipeline.store.build import build
from data_pipeline.store.reader import Store
from data_pipeline.stream.stream import Stream
from data_pipeline.tasks.denoising import Denoising
from data_pipeline.tasks.packed import PackedBodies, Pieces
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count
from scaling.observe.memory import peak_bytes, reset_peak
from scaling.runs.rows import Row

ARRAYS = ("xyz", "residue", "segment")
ATOMS = 3
"""Tokens of a residue: N, CA, C."""


@dataclass
class Data(Experiment):
    """
    Args:
        chains: in the larger store; the smaller has half as many.
        tokens: of the packed sample.
        sp: ranks that share it.
    """

    chains: Count = 9400
    tokens: Count = 1 << 20
    sp: Count = 8

    def points(self) -> list[Point]:
        return [Point("stores")]

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """Builds stores and measures reading them; times are ours, ratios how many times as fast as
        the alternative that the case names."""
        with TemporaryDirectory() as place:
            large, small = Path(place, "large"), Path(place, "small")
            began = perf_counter()
            manifest = build(large, WalkSource(self.chains))
            rate = manifest["counts"]["residues"] / (perf_counter() - began)
            yield row("write", rate, "residues/s")
            build(small, WalkSource(self.chains // 2))
            yield from _slices(large, self.tokens, self.sp)
            yield _random_chains(large)
            for path in (small, large):
                # Of a process of its own, beyond that of its libraries.
                with get_context("spawn").Pool(1) as pool:
                    peak = pool.apply(_streaming_peak, (str(path),))
                case = f"memory to stream from {Store(path).lengths.sum():,} residues"
                yield row(case, peak / 1e6, "MB")


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


def _slices(path: Path, tokens: int, sp: int) -> Iterator[Row]:
    """One rank's part of a packed sample: the same rows from the store and from numpy.memmap."""
    layout = PackedBodies(Store(path), "train", ATOMS, tokens)
    task, maps = Denoising(str(path), packed_length=tokens), _memory_maps(path)
    length = int(layout.lengths[0])
    parts = [(length * rank // sp, length * (rank + 1) // sp) for rank in range(sp)]
    seconds = [_slice(path, layout.pieces(0, 1, *part), maps) for part in parts]
    own, chain_by_chain, in_one_run = map(median, zip(*seconds, strict=True))
    sample = median(
        _timed(lambda part: task.sample("train", [0], [1], *part), [p])[0] for p in parts
    )
    what = f"1/{sp} of a packed sample of {length:,} tokens"
    for other, theirs in (
        ("the same chains", chain_by_chain),
        ("one run of as many rows", in_one_run),
    ):
        case = f"{what}, beside {other} of numpy.memmap"
        yield row(case, own * 1e3, "ms", theirs / own, sp=sp, length=length)
    speed = length / sp / sample
    yield row(f"{what}, made into inputs", speed, "tokens/s", sp=sp, length=length)


def _slice(path: Path, pieces: Pieces, maps: list[np.ndarray]) -> tuple[float, float, float]:
    """Seconds to read it from the store, chain by chain from numpy.memmap, and in one run there."""
    chains, first, last = pieces.chains, pieces.starts // ATOMS, -(-pieces.stops // ATOMS)
    stores = [Store(path) for _ in range(2)]  # nothing decoded is kept
    offsets = stores[0].offsets[chains]
    rows = [slice(*each) for each in np.stack([offsets + first, offsets + last], 1).tolist()]
    ours, read = _timed(lambda s: [s.gather(name, chains, first, last) for name in ARRAYS], stores)
    chain_by_chain, wanted = _timed(
        lambda maps: [np.concatenate([x[some] for some in rows]) for x in maps], [maps] * 3
    )
    for x, y in zip(read, wanted, strict=True):
        np.testing.assert_array_equal(x, y)
    run = slice(min(some.start for some in rows), max(some.stop for some in rows))
    in_one_run, _ = _timed(lambda maps: [np.array(x[run]) for x in maps], [maps] * 3)
    return ours, chain_by_chain, in_one_run


def _random_chains(path: Path, count: int = 600) -> Row:
    """Coordinates of random chains: by chunk, and one zarr slice after another."""
    xyz, stores = _array(path, "xyz"), [Store(path) for _ in range(3)]
    offsets, lengths = stores[0].offsets, stores[0].lengths
    chosen = np.random.default_rng(0).choice(len(lengths) // 2, count, replace=False)
    zeros = np.zeros_like(chosen)
    own, _ = _timed(lambda store: store.gather("xyz", chosen, zeros, lengths[chosen]), stores)
    loop, _ = _timed(lambda xyz: [xyz[offsets[c] : offsets[c + 1]] for c in chosen], [xyz])
    what = f"{count} random chains of {len(lengths) // 2:,}, beside a slice for each"
    return row(what, own * 1e3, "ms", loop / own)


def _streaming_peak(path: str) -> float:
    device = torch.device("cpu")
    base = reset_peak(device)
    task = Denoising(path)
    stream = Stream(task, "train", batch_size=8, micro_batch_size=8, seed=0, max_length=1 << 20)
    for _ in range(100):
        next(stream)
    stream.close()
    return peak_bytes(device) - base


def _memory_maps(path: Path) -> list[np.ndarray]:
    maps = []
    for name in ARRAYS:
        file = path.parent / f"{name}.npy"
        np.save(file, _array(path, name)[:])
        maps.append(np.load(file, mmap_mode="r"))
    return maps


def _array(path: Path, name: str) -> Any:
    return zarr.open_array(path / name, mode="r")


def _timed(read: Callable[[Any], Any], sources: list[Any]) -> tuple[float, Any]:
    """Reads from one source after the other: the median time in s, and what the last gave."""
    times, result = [], None
    for source in sources:
        began = perf_counter()
        result = read(source)
        times.append(perf_counter() - began)
    return median(times), result
