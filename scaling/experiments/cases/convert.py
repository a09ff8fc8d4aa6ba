"""How fast sources become stores; the file lies where TMPDIR says.

Grows synthetic backbones on random sequences, writes them as SideChainNet would (624 bytes a
residue), and times plain unpickling and the conversion of that file in turn.
"""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import ClassVar

import numpy as np
import torch

from data_pipeline.chains import RESIDUES
from data_pipeline.sources.sidechainnet import SideChainNetSource
from data_pipeline.sources.synthetic import grow
from data_pipeline.store.build import build
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Count
from scaling.observe.memory import peak_bytes
from scaling.runs.rows import Row

_UNPICKLE = """
import pickle, sys, time
with open(sys.argv[1], "rb") as file:
    began = time.perf_counter()
    data = pickle.load(file)
    print(time.perf_counter() - began)
"""


@dataclass
class Convert(Experiment):
    residues: Count = 1_000_000
    """About so many; 624 bytes each on disk."""
    turns: Count = 3

    goals: ClassVar = {"conversion: time / unpickling": ("<=", 2.0)}

    def points(self) -> list[Point]:
        return [Point("made")]

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """Rates, the conversion's time beside plain unpickling's, and memory."""
        with TemporaryDirectory() as place:
            path = Path(place, "made.pkl")
            # In a process of its own, whose memory is gone afterwards.
            with ProcessPoolExecutor(1, get_context("spawn")) as writer:
                rate = writer.submit(write_pickle, path, self.residues).result()
            yield row("synthetic backbones", rate, "residues/s")
            for turn in range(self.turns):
                run = [sys.executable, "-c", _UNPICKLE, str(path)]
                plain = float(subprocess.run(run, capture_output=True, check=True).stdout)
                began = perf_counter()
                build(Path(place, str(turn)), SideChainNetSource(path))
                took = perf_counter() - began
                yield row("conversion: time / unpickling", took, "s", took / plain)
            yield row("conversion: memory of the process", peak_bytes(device), "B")
            yield row("conversion: size of the file", path.stat().st_size, "B")


def write_pickle(path: Path, residues: int) -> float:
    """A data set of about so many residues; the residues a second at which chains were grown."""
    random = np.random.default_rng(0)
    letters, classes = np.array(list(RESIDUES)), np.array(list("HHHEEETSL"))
    entries = []
    while residues > 0:
        length = int(random.integers(30, 480))
        # Helices and strands of four residues each.
        dssp = np.repeat(random.choice(classes, -(-length // 4)), 4)[:length]
        sequence = "".join(random.choice(letters, length))
        entries.append((f"{len(entries)}ABC_1_A", sequence, "".join(dssp)))
        residues -= length
    began = perf_counter()
    chains = list(grow(entries, seed=0))
    rate = sum(len(chain.sequence) for chain in chains) / (perf_counter() - began)
    fields = ("seq", "ids", "msk", "crd", "ang", "evo", "sec", "res")
    data: dict = {split: {key: [] for key in fields} for split in ("train", "valid-10", "test")}
    for number, (chain, (_, _, dssp)) in enumerate(zip(chains, entries, strict=True)):
        length = len(chain.sequence)
        crd = np.full((length, 15, 3), np.nan)
        crd[:, :4] = chain.xyz
        values = (chain.sequence, chain.id, "+" * length, crd, random.random((length, 12)),
                  random.random((length, 21)), dssp, 2.0)  # fmt: skip
        split = data["train" if number % 20 else ("valid-10", "test")[number // 20 % 2]]
        for key, value in zip(fields, values, strict=True):
            split[key].append(value)
    with path.open("wb") as file:
        pickle.dump(data, file)
    return rate
