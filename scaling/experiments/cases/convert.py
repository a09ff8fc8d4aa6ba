"""How fast sources become stores; the file lies where TMPDIR says.

Grows synthetic backbones on random sequences, writes them as SideChainNet would (624 bytes a
residue), and times plain unpickling and the conversion of that file in turn.
"""

import pickle
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from data_pipeline.chains import RESIDUES
from data_pipeline.sources.sidechainnet import SideChainNetSource
from data_pipeline.sources.synthetic import grow
from data_pipeline.store.build import build
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.options import Checked, Count
from scaling.parallel.collectives import Group
from scaling.runs.rows import Row

_UNPICKLE = """
import pickle, sys, time
with open(sys.argv[1], "rb") as file:
    began = time.perf_counter()
    data = pickle.load(file)
    print(time.perf_counter() - began)
"""


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
    fields = ("seq", "ids", "msk", "crd", "ang", "evo", "sec", "res")
    data: dict = {split: {key: [] for key in fields} for split in ("train", "valid-10", "test")}
    began, growing = time.perf_counter(), 0.0
    for number, chain in enumerate(grow(entries, seed=0)):
        growing += time.perf_counter() - began
        length = len(chain.sequence)
        crd = np.full((length, 15, 3), np.nan)
        crd[:, :4] = chain.xyz
        values = (chain.sequence, chain.id, "+" * length, crd, random.random((length, 12)),
                  random.random((length, 21)), entries[number][2], 2.0)  # fmt: skip
        split = data["train" if number % 20 else ("valid-10", "test")[number // 20 % 2]]
        for key, value in zip(fields, values, strict=True):
            split[key].append(value)
        began = time.perf_counter()
    with open(path, "wb") as file:
        pickle.dump(data, file)
    return sum(len(sequence) for _, sequence, _ in entries) / growing


@dataclass
class ConvertOptions(Checked):
    residues: Count = 1_000_000
    """About so many; 624 bytes each on disk."""
    turns: Count = 3


def convert_rows(options: ConvertOptions, _group: Group, _device: torch.device) -> list[Row]:
    """Rates, the conversion's time beside plain unpickling's, and memory."""
    with TemporaryDirectory() as place:
        path = Path(place, "made.pkl")
        # In a process of its own, whose memory is gone afterwards.
        with ProcessPoolExecutor(1, get_context("spawn")) as writer:
            rate = writer.submit(write_pickle, path, options.residues).result()
        rows = [row("synthetic backbones", 1, 0, rate, "residues/s")]
        for turn in range(options.turns):
            run = [sys.executable, "-c", _UNPICKLE, str(path)]
            plain = float(subprocess.run(run, capture_output=True, check=True).stdout)
            began = time.perf_counter()
            build(Path(place, str(turn)), SideChainNetSource(path))
            took = time.perf_counter() - began
            rows.append(row("conversion: time / unpickling", 1, 0, took, "s", took / plain))
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(row("conversion: memory of the process", 1, 0, own, "B"))
        rows.append(row("conversion: size of the file", 1, 0, path.stat().st_size, "B"))
    return rows


GOALS = {"conversion: time / unpickling": ("<=", 2.0)}
BENCH = Experiment(ConvertOptions, lambda options: [Point("made", 0, options)], convert_rows, GOALS)
