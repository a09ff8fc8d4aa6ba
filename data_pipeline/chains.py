"""What sources give and stores hold: chains of residues, each with a fixed set of atoms."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, UInt8

ATOMS = ("N", "CA", "C", "O")
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
"""One-letter codes in the order of their numbers; whatever else is X, number 20."""
SHORTEST_BOND, LONGEST_BOND = 1.0, 2.5
"""Å between which two atoms of a backbone, such as C and the next N, count as bonded."""
SPLITS = ("train", "validation", "test")
IMPOSSIBLE = (
    f"residues with impossible bonds (N-CA or CA-C not {SHORTEST_BOND} to {LONGEST_BOND} Å), "
    "read as missing"
)
"""The reason, among those for which something is left out."""


class Notes(defaultdict[str, list[str]]):
    """What was left out or changed while reading: reason -> names of files, chains, residues."""

    def __init__(self) -> None:
        super().__init__(list)
        self.residues: Counter[str] = Counter()
        """Residues left out for each reason that leaves some out."""

    def leave_out(self, reason: str, name: str, residues: int) -> None:
        self[reason].append(name)
        self.residues[reason] += residues

    def add(self, other: "Notes") -> None:
        """Takes over the notes about a part."""
        for reason, names in other.items():
            self[reason] += names
        self.residues += other.residues


@dataclass(frozen=True)
class Chain:
    """One sample of a store: a protein chain as it was observed, or another sequence of points."""

    id: str
    """File and author's chain name, `mmcif_6zu5/LA0`; the segment where the chain is blank."""
    sequence: str
    """One letter a residue: the parent's where it is modified, X where there is none."""
    xyz: Float32[np.ndarray, "length atoms 3"]
    """N, CA, C, O in Å, or the atoms that the source's identity names; NaN where one is missing."""
    cluster: str | None = None
    """Chains of one key, and they alone, are a cluster: frames of a trajectory, models of an
    ensemble. Their sequences are then not compared with others. None: the sequences tell."""
    split: str | None = None
    """train, validation or test, where the source decides; then it does so for every chain."""
    segment: Integer[np.ndarray, " length"] | None = None
    """Unbroken stretch of each residue: 0, ..., one more after every break. None: a break is where
    C-N is no bond."""
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further arrays with a row for each residue: the same names, dtypes and shapes behind the
    first axis in all chains. Tasks know `vectors` (length, v, 3) and `scalars` (length, s)."""

    @property
    def complete(self) -> Bool[np.ndarray, " length"]:
        """Residues with all four atoms."""
        return np.all(np.isfinite(self.xyz), axis=(1, 2))

    @property
    def breaks(self) -> Bool[np.ndarray, " length"]:
        """True where a residue is not bonded to the one before."""
        if self.segment is not None:
            return np.concatenate([[False], np.diff(self.segment) != 0])
        return np.concatenate([[False], ~bonded(self.xyz[:-1, 2], self.xyz[1:, 0])])


def encode(sequence: str) -> np.ndarray:
    """Numbers of one-letter residues; 20 for X and whatever else is none of the twenty."""
    return _NUMBERS[np.frombuffer(sequence.encode("ascii", "replace"), np.uint8)]


def decode(numbers: np.ndarray) -> str:
    return _LETTERS[numbers].tobytes().decode()


def fasta(name: str, residue: UInt8[np.ndarray, " length"]) -> str:
    """A chain's entry in a FASTA file; blanks in its name, which would end it, are `_`."""
    return f">{'_'.join(name.split())}\n{decode(residue)}\n"


_LETTERS = np.frombuffer((RESIDUES + "X").encode(), np.uint8)
_NUMBERS = np.full(256, len(RESIDUES), np.uint8)
_NUMBERS[_LETTERS] = np.arange(len(_LETTERS))


def norms(x: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n"]:
    """Lengths of vectors; reductions over three numbers are slow in numpy."""
    return np.sqrt(x[..., 0] * x[..., 0] + x[..., 1] * x[..., 1] + x[..., 2] * x[..., 2])


def bonded(x: Float[np.ndarray, "*n 3"], y: Float[np.ndarray, "*n 3"]) -> np.ndarray:
    """(*n,) bool: whether two atoms are a bond's length apart; not if one is missing."""
    length = norms(x - y)
    return (length >= SHORTEST_BOND) & (length <= LONGEST_BOND)


def impossible(xyz: Float32[np.ndarray, "length 4 3"]) -> Bool[np.ndarray, " length"]:
    """Residues whose N-CA or CA-C is no bond's length; a missing atom has no bond."""
    x, y = xyz[:, :2], xyz[:, 1:3]  # N and CA, CA and C
    return np.any(np.isfinite(x + y).all(2) & ~bonded(x, y), axis=1)


def bond_lengths(chains: Iterable[Chain]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation in Å of the bonds of the backbone and of CA-CA; no breaks."""
    bonds = Bonds()
    for chain in chains:
        bonds.add(chain.xyz, chain.breaks)
    return bonds.result()


class Bonds:
    """Bond lengths of backbones that come piece by piece."""

    def __init__(self) -> None:
        self._moments: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))

    def add(
        self, xyz: Float32[np.ndarray, "length 4 3"], breaks: Bool[np.ndarray, " length"]
    ) -> None:
        """breaks: True where a residue is not bonded to the one before."""
        n, ca, c, o = xyz.swapaxes(0, 1)
        bonded = ~breaks[1:]
        for name, first, second in (
            ("N-CA", n, ca),
            ("CA-C", ca, c),
            ("C-O", c, o),
            ("C-N", c[:-1][bonded], n[1:][bonded]),
            ("CA-CA", ca[:-1][bonded], ca[1:][bonded]),
        ):
            found = norms(first - second).astype(np.float64)
            found = found[np.isfinite(found)]
            self._moments[name] += len(found), found.sum(), np.square(found).sum()

    def result(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each kind that was found."""
        return {
            name: (float(total / n), float(np.sqrt(max(squares / n - (total / n) ** 2, 0))))
            for name, (n, total, squares) in self._moments.items()
            if n
        }


def describe(notes: Mapping[str, list[str]]) -> str:
    """One line: how many of each kind, with the first three names."""
    parts = [
        f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for reason, names in notes.items()
    ]
    return "; ".join(parts) or "nothing"
