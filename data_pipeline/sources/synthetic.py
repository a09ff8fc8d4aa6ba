"""Synthetic backbones on real sequences and secondary structures, for tests of throughput.

sidechainnet's package holds 159,026 proteins' sequences with DSSP strings, and no coordinates.
Here each residue gets torsions of its DSSP class, ideal bonds and angles, and chains are grown
many at a time. Bonds and the Ramachandran plot are a protein's; folds, contacts and clashes are
not, and predicting the DSSP letter from such a chain would be circular.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from jaxtyping import Float64

from data_pipeline.chains import RESIDUES, Chain, Notes
from data_pipeline.counter_rng import hash64, normals, uniforms
from data_pipeline.errors import ConfigError, SourceError
from data_pipeline.sources.batches import batches
from data_pipeline.sources.protein import ProteinSource, file_sha256

ANNOTATIONS = Path("resources", "full_protein_dssp_annotations.json")
"""In the folder of the sidechainnet package: id -> {"Sequence": letters, "DSSP": letters}."""
TOGETHER = 1 << 18
"""Residues grown at a time; 60 MB."""

CLASSES = "HGIEBTSL"
"""DSSP's letters; L is neither of the others."""
# Share, phi, psi and their standard deviation, in degrees, of each class: centres of the regions
# of the Ramachandran plot (Hovmöller, Zhou and Ohlson, Acta Cryst. D58, 768, 2002).
_REGIONS = {
    "H": [(1.00, -63, -42, 6)],
    "G": [(1.00, -60, -25, 10)],
    "I": [(1.00, -70, -45, 8)],
    "E": [(0.75, -115, 132, 16), (0.25, -80, 128, 14)],
    "B": [(0.60, -110, 135, 20), (0.40, -75, 140, 15)],
    "T": [(0.55, -63, -28, 12), (0.20, -95, 2, 12), (0.15, 58, 38, 9), (0.10, -62, 135, 12)],
    "S": [(0.40, -72, 148, 14), (0.35, -85, -15, 16), (0.20, -110, 125, 20), (0.05, 60, 40, 10)],
    "L": [(0.50, -70, 145, 12), (0.30, -105, 128, 20), (0.17, -80, -20, 16), (0.03, 58, 42, 10)],
}
_GLYCINE = [(0.45, 82, 8, 14), (0.25, -70, -30, 14), (0.20, 85, -170, 18), (0.10, -75, 160, 18)]
"""Outside helices and strands: half of its plot is closed to all others."""
_PROLINE_PHI = -65.0
_OMEGA = (180.0, 5.0)

# Å and degrees: Engh and Huber, International Tables F (2001), 18.3.
_N_CA, _CA_C, _C_N, _C_O = 1.459, 1.525, 1.336, 1.229
_N_CA_C, _CA_C_N, _C_N_CA, _CA_C_O = 111.0, 117.2, 121.7, 120.1


@dataclass
class SyntheticSource(ProteinSource):
    """One synthetic backbone on each distinct sequence."""

    path: Path | None = None
    """A file like sidechainnet's; None: the one in the installed package."""
    proteins: Annotated[int, Ge(1)] | None = None
    """Entries to read, the first ones; None: all."""
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """Name and sha256 of the annotations, and the rule."""
        file = self.file()
        return {
            "kind": "synthetic",
            "files": {file.name: file_sha256(file)},
            "proteins": self.proteins,
            "seed": self.seed,
            **self.rule(),
        }

    def chains(self, notes: Notes) -> Iterator[Chain]:
        """Chains named `synthetic/<entry>`, in the file's order.

        Raises:
            SourceError: the file cannot be read, is of another form, or holds an unknown letter.
            ConfigError: neither path nor package.
        """
        grown = grow(self._distinct(notes), self.seed)
        return self.chosen(grown, notes, self.file())

    def file(self) -> Path:
        """The annotations; the package is found, not imported."""
        if self.path is not None:
            return self.path
        spec = find_spec("sidechainnet")
        if spec is None or spec.origin is None:
            raise ConfigError(
                "source=synthetic needs the file that the package sidechainnet holds: "
                "pip install --no-deps sidechainnet==1.0.1, or give path"
            )
        return Path(spec.origin).parent / ANNOTATIONS

    def _distinct(self, notes: Notes) -> Iterator[tuple[str, str, str]]:
        """Id, sequence and DSSP string of the first entry of each sequence."""
        seen: set[str] = set()
        for name, sequence, dssp in islice(read_annotations(self.file()), self.proteins):
            if sequence in seen:
                notes["copies of another entry's sequence"].append(name)
                continue
            seen.add(sequence)
            yield name, sequence, dssp


def read_annotations(file: Path) -> Iterator[tuple[str, str, str]]:
    """Id, sequence and DSSP string of each entry.

    Raises:
        SourceError: names the file or the entry, and what is wrong.
    """
    try:
        entries = json.loads(file.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot read path={file}: {error.strerror}") from error
    except ValueError as error:
        raise SourceError(f"{file} is no JSON ({error}); give sidechainnet's annotations") from None
    if not isinstance(entries, dict):
        raise SourceError(f'{file} must map ids to {{"Sequence": ..., "DSSP": ...}}')
    for name, entry in entries.items():
        try:
            sequence, dssp = entry["Sequence"], entry["DSSP"]
            length, other = len(sequence), len(dssp)
            unknown = set(sequence) - set(RESIDUES + "X") | set(dssp) - set(CLASSES)
        except (KeyError, TypeError):
            raise SourceError(f"{file}: entry {name} has no Sequence and DSSP of text") from None
        if length != other:
            raise SourceError(f"{file}: entry {name}: {length} residues, {other} DSSP letters")
        if unknown:
            raise SourceError(
                f"{file}: entry {name} has the letter {min(unknown)!r}; residues are {RESIDUES}X, "
                f"DSSP's letters {CLASSES}"
            )
        if length:
            yield name, sequence, dssp


def grow(entries: Iterable[tuple[str, str, str]], seed: int) -> Iterator[Chain]:
    """The backbone of each (id, sequence, DSSP); it follows from these and the seed alone."""
    for batch in batches(entries, TOGETHER, letters=1):
        yield from _grow_batch(batch, seed)


def _grow_batch(batch: list[tuple[str, str, str]], seed: int) -> Iterator[Chain]:
    lengths = np.array([len(sequence) for _, sequence, _ in batch])
    keys = [(hash64("synthetic", seed, sequence, d), len(d)) for _, sequence, d in batch]
    gauss = np.concatenate([normals(key, 0, length) for key, length in keys])
    choice = [uniforms(key ^ 1, 0, length)[:, 0] for key, length in keys]
    sequences = "".join(sequence for _, sequence, _ in batch)
    dssp = "".join(dssp for _, _, dssp in batch)
    torsions = _torsions(sequences, dssp, np.concatenate(choice), gauss)
    xyz = backbones(torsions, lengths).astype(np.float32)
    ends = np.cumsum(lengths)
    for (name, sequence, _), length, end in zip(batch, lengths, ends, strict=True):
        yield Chain(f"synthetic/{name}", sequence, xyz[end - length : end])


def _torsions(
    sequence: str, dssp: str, choice: Float64[np.ndarray, " n"], gauss: Float64[np.ndarray, "n 4"]
) -> Float64[np.ndarray, "n 3"]:
    """phi, psi, omega in radians; omega turns about the bond to the next residue."""
    kind = _CODES[np.frombuffer(dssp.encode(), np.uint8)]
    letter = np.frombuffer(sequence.encode(), np.uint8)
    kind[(letter == ord("G")) & (kind >= CLASSES.index("B"))] = len(CLASSES)
    region = (choice[:, None] > _SHARES[kind]).sum(1)
    phi, psi, spread = _CENTRES[kind, region].T
    phi = np.where(letter == ord("P"), _PROLINE_PHI, phi) + spread * gauss[:, 0]
    psi = psi + spread * gauss[:, 1]
    omega = _OMEGA[0] + _OMEGA[1] * gauss[:, 2]
    return np.radians(np.stack([phi, psi, omega], 1))


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of each DSSP letter; cumulative shares and (phi, psi, spread) of its regions."""
    codes = np.zeros(256, np.int64)
    codes[[ord(letter) for letter in CLASSES]] = np.arange(len(CLASSES))
    rows = [*(_REGIONS[letter] for letter in CLASSES), _GLYCINE]
    most = max(map(len, rows))
    table = np.array([row + [(0.0, 0, 0, 0)] * (most - len(row)) for row in rows], float)
    return codes, np.cumsum(table[:, :-1, 0], 1), table[..., 1:]


_CODES, _SHARES, _CENTRES = _tables()


def backbones(
    torsions: Float64[np.ndarray, "n 3"], lengths: np.ndarray
) -> Float64[np.ndarray, "n 4 3"]:
    """N, CA, C, O in Å of chains that lie behind each other, each with its CA around the origin.

    Every residue is a turn of the frame at C (x along CA-C): about psi, then omega, then the next
    phi. The turns are made for all residues at once and multiplied along all chains together.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    phi, psi, omega = torsions.T
    # The first residue's frame is the identity; every other one follows from the one before it.
    before = np.arange(len(phi)) - 1
    to_n = _turn(psi[before], _CA_C_N)
    to_ca = to_n @ _turn(omega[before], _C_N_CA)
    turn = to_ca @ _turn(phi, _N_CA_C)
    steps = np.stack([_C_N * to_n[:, :, 0], _N_CA * to_ca[:, :, 0], _CA_C * turn[:, :, 0]], 1)
    turn[starts] = np.eye(3)
    frame = np.empty_like(turn)
    order = np.argsort(-lengths, kind="stable")
    places, longest = starts[order], lengths[order]
    current = turn[places]
    frame[places] = current
    for step in range(1, int(longest[0])):
        alive = int(np.searchsorted(-longest, -step))  # chains longer than `step`
        here = places[:alive] + step
        current = current[:alive] @ turn[here]
        frame[here] = current
    # Steps are in the frame before; the first residue's lead from the C before it, wherever it is.
    steps = np.matmul(steps, frame[before].swapaxes(1, 2))
    angle = np.radians(_N_CA_C)
    ca, n = np.array([-_CA_C, 0, 0]), _N_CA * np.array([np.cos(angle), np.sin(angle), 0])
    steps[starts] = np.stack([ca + n, -n, -ca])
    path = np.cumsum(steps.reshape(-1, 3), axis=0).reshape(-1, 3, 3)
    centre = np.add.reduceat(path[:, 1], starts) / lengths[:, None]
    path -= np.repeat(centre, lengths, axis=0)[:, None]
    oxygen = _C_O * _turn(psi + np.pi, _CA_C_O)[:, None, :, 0] @ frame.swapaxes(1, 2)
    return np.concatenate([path, path[:, 2:] + oxygen], axis=1)


def _turn(torsion: Float64[np.ndarray, " n"], angle: float) -> Float64[np.ndarray, "n 3 3"]:
    """Rx(torsion) Rz(180° - angle): from one bond's frame to the next; y lies in the plane."""
    c, s = np.cos(torsion), np.sin(torsion)
    a, b = -np.cos(np.radians(angle)), np.sin(np.radians(angle))
    out = np.zeros((len(torsion), 3, 3))
    out[:, 0, 0], out[:, 0, 1] = a, -b
    out[:, 1, 0], out[:, 1, 1], out[:, 1, 2] = b * c, a * c, -s
    out[:, 2, 0], out[:, 2, 1], out[:, 2, 2] = b * s, a * s, c
    return out
