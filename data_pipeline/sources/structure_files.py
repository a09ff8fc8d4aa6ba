"""PDB and mmCIF files to the residues that stand in them, in file order.

Columns and items are read here, so that whatever a program or a person made of the formats is
seen as it is; gemmi (extra `proteins`) reads mmCIF's syntax. What a residue is part of, a chain, a
ligand or water, is decided in `polymers`.
"""

import gzip
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from data_pipeline.chains import ATOMS, RESIDUES
from data_pipeline.errors import ConfigError, StructureError

FAR = 1e6
"""Å; a coordinate from here on is no atom's."""
WAY_OUT = "correct it, or leave such files out with skip_unreadable=true"

# Protonation states and ends of chains under the names that force fields give them; the PDB's
# dictionary has none. The marks are GROMOS's and CHARMM's fourth letters.
_STANDARD = (
    *("ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE"),
    *("LEU", "LYS", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL"),
)
_THREE_LETTERS = {name: name for name in _STANDARD} | {
    **dict.fromkeys(("HSD", "HSE", "HSP", "HID", "HIE", "HIP"), "HIS"),
    **dict.fromkeys(("CYX", "CYM"), "CYS"),
    **{"ASH": "ASP", "GLH": "GLU", "LYN": "LYS", "LSN": "LYS"},
}
_MARKS = {"ARG": "N", "ASP": "HP", "CYS": "12HNX", "GLU": "HP", "HIS": "12ABDEHPX", "LYS": "HNP"}
_FOUR_LETTERS = {name + mark: name for name, marks in _MARKS.items() for mark in marks}
_FOUR_LETTERS |= {end + name: parent for end in "NC" for name, parent in _THREE_LETTERS.items()}
_PARENTS = _THREE_LETTERS | _FOUR_LETTERS

_NUMBER = re.compile(r" *[+-]?(\d+\.?\d*|\.\d+) *").fullmatch


class Atom(NamedTuple):
    """One location of an atom."""

    name: str
    location: str
    """The letter of an alternate location, or nothing."""
    occupancy: float
    xyz: tuple[float, float, float]


class Kind(NamedTuple):
    """What the dictionaries say about a residue's name."""

    amino: bool
    known: bool
    letter: str
    """Upper case for the twenty, lower case for the parent of a modified one, else X."""


@dataclass
class Residue:
    """The atoms under one name at one place of a chain."""

    name: str
    hetero: bool
    in_sequence: bool
    """The file's sequence of the molecule names it: SEQRES, or mmCIF's entity."""
    atoms: list[Atom] = field(default_factory=list)
    """Those of N, CA, C and O that the file has."""


@dataclass
class Place:
    """One place of a chain, and the residues that are alternatives there."""

    chain: str
    """The author's name; the segment, or `_`, where that is blank."""
    label: str
    """mmCIF's own name of the chain."""
    number: str
    """The author's, with insertion code; nothing where it is blank or no number fits."""
    piece: str | int
    """TER records of the chain before it; in mmCIF the label of its chain."""
    residues: list[Residue] = field(default_factory=list)

    def residue_for(self, name: str, atom: Atom, follows: bool) -> Residue | None:
        """The residue of this place that such an atom belongs to; None: another place's.

        An atom that follows the place's others is one of the residue of that name, if it is not
        there already. Another name, or an atom that stands elsewhere in the file, must lie near; of
        another name it is an alternative only if its location says so.
        """
        residue = next((residue for residue in self.residues if residue.name == name), None)
        if residue and follows:
            return None if repeats(atom, residue.atoms) else residue
        atoms = [a for residue in self.residues for a in residue.atoms]
        reach = 4 if atom.name in ATOMS else 12
        near = any(math.dist(a.xyz, atom.xyz) < reach for a in atoms)
        clash = any(a.name == atom.name and a.location in ("", atom.location) for a in atoms)
        if clash or not near or not (residue or atom.location):
            return None
        if residue is None:
            residue = Residue(name, True, False)
            self.residues.append(residue)
        return residue


def repeats(atom: Atom, atoms: list[Atom]) -> bool:
    """Whether a residue has this atom already, elsewhere: then another residue begins."""
    return atom.name in ("N", "CA") and any(
        (a.name, a.location) == (atom.name, atom.location) and math.dist(a.xyz, atom.xyz) >= 1
        for a in atoms
    )


class Model:
    """The residues of one model, gathered from runs of atoms."""

    def __init__(self, number: str) -> None:
        self.number = number
        self.places: list[Place] = []
        self.pieces: Counter[str] = Counter()
        """TER records of each chain so far."""
        self._last: dict[tuple[str, str], Place] = {}

    def add(
        self, place: Place, name: str, hetero: bool, in_sequence: bool, atoms: list[Atom]
    ) -> None:
        """Atoms that stand one behind the other under one name and number."""
        name, residue = _PARENTS.get(name, name), None
        key, last = (place.chain, place.number), self.places[-1] if self.places else None
        if last and (*key, place.piece) == (last.chain, last.number, last.piece):
            residue = last.residue_for(name, atoms[0], follows=True)
        elif place.number and key in self._last:
            residue = self._last[key].residue_for(name, atoms[0], follows=False)
        for i, atom in enumerate(atoms):
            if residue is None or (i and atom.name in ("N", "CA") and repeats(atom, residue.atoms)):
                residue = Residue(name, hetero, in_sequence)
                self.places.append(replace(place, residues=[]) if place.residues else place)
                self.places[-1].residues.append(residue)
                self._last[key] = self.places[-1]
            if atom.name in ATOMS:
                residue.atoms.append(atom)
        if residue:
            residue.hetero &= hetero
            residue.in_sequence |= in_sequence


class StructureFile:
    """A structure file: its models, and the assemblies that its header describes.

    Raises:
        StructureError: it is damaged, empty, in no known format or without an atom.
    """

    def __init__(self, path: Path):
        self.path, self._gemmi = path, gemmi_module()
        self.unread_models = False
        """There are more than were asked for."""
        self._text = _text(path)
        self._block: Any = None
        if re.match(r"(\s|#.*\n)*data_", self._text, re.IGNORECASE):
            self._block = self._block_with_atoms()

    @property
    def is_mmcif(self) -> bool:
        return self._block is not None

    def models(self, every: bool) -> list[Model]:
        """Those that have an atom, or the first of them; the others are then not looked at.

        Raises:
            StructureError: names the first coordinate that is no number.
        """
        read = self._mmcif_models() if self.is_mmcif else self._pdb_models()
        models = list(read if every else islice(read, 1))
        if not models:
            raise StructureError(
                f"{self.path} holds no atoms; is it a PDB or mmCIF file? {WAY_OUT}"
            )
        return models

    def assemblies(self) -> dict[str, Any]:
        """gemmi's description of each by its name."""
        if self.is_mmcif:
            structure = self._gemmi.make_structure_from_block(self._block)
        else:
            header = [line for line in self._text.splitlines() if line.startswith("REMARK 350")]
            structure = self._gemmi.read_pdb_string("\n".join([*header, "END", ""]))
        return {assembly.name: assembly for assembly in structure.assemblies}

    def _with_more(self, model: Model) -> Iterator[Model]:
        self.unread_models = True
        yield model
        self.unread_models = False  # for now it is asked for the next one

    def _pdb_models(self) -> Iterator[Model]:
        """END, too, ends a model: what VMD writes behind it is another frame."""
        lines = self._text.splitlines()
        spilled = _spilled_names(lines)
        sequences: dict[str, set[str]] = defaultdict(set)
        model, number, ended, atoms, last = None, "", False, [], ""
        for row, line in enumerate([*lines, "END"], 1):
            record = line[:6].upper().rstrip()
            known = record[:4] == "ATOM" or record == "HETATM"
            key = record[:4] + line[17:27] + line[72:80].rstrip("0123456789+-")
            if model and atoms and (not known or key != last or ended):
                self._add_pdb_atoms(model, atoms, lines[row - 2], spilled, sequences)
                atoms = []
            if known:
                if model is None or ended:
                    if model:
                        yield from self._with_more(model)
                    model, ended = Model(number), False
                x, y, z = line[30:38], line[38:46], line[46:54]
                if not (_NUMBER(x) and _NUMBER(y) and _NUMBER(z)):
                    raise self._no_number(row, x, y, z)
                occupancy = float(line[54:60]) if _NUMBER(line[54:60]) else 1.0
                xyz = float(x), float(y), float(z)
                atoms.append(Atom(line[12:16].strip(), line[16:17].strip(), occupancy, xyz))
                last = key
            elif record == "SEQRES":
                sequences[line[10:12].strip()].update(line[19:70].split())
            elif record in ("END", "ENDMDL", "MODEL"):
                ended, number = True, line[6:].strip() if record == "MODEL" else ""
            elif record[:3] == "TER" and model:
                model.pieces[model.places[-1].chain] += 1
        if model:
            yield model

    def _add_pdb_atoms(
        self,
        model: Model,
        atoms: list[Atom],
        line: str,
        spilled: set[str],
        sequences: dict[str, set[str]],
    ) -> None:
        name, letters = line[17:20].strip(), line[20:22]
        if letters in spilled:
            name, letters = line[17:21].strip(), letters[1:]
        chain, number = letters.strip(), line[22:27].strip()
        in_sequence = name not in _STANDARD and name in sequences[chain]
        # Before 1996 columns 73 to 80 held the entry's name and the line's number.
        segment = "" if line[76:80].strip().isdigit() else line[72:76].strip()
        chain = chain or segment or "_"
        place = Place(chain, chain, "" if "*" in number else number, model.pieces[chain])
        model.add(place, name, line[:4].upper() != "ATOM", in_sequence, atoms)

    def _no_number(self, row: int, *columns: str) -> StructureError:
        axis = next(i for i, column in enumerate(columns) if not _NUMBER(column))
        first = 31 + 8 * axis
        return StructureError(
            f"{self.path} line {row}: {'xyz'[axis]} in columns {first}-{first + 7} is "
            f"'{columns[axis]}', no number; {WAY_OUT}"
        )

    def _block_with_atoms(self) -> Any:
        try:
            document = self._gemmi.cif.read_string(self._text)
        except Exception as error:  # gemmi raises RuntimeError and ValueError alike
            reason = str(error).splitlines()[0].rstrip(".").removeprefix("string:")
            raise StructureError(
                f"{self.path} cannot be read as mmCIF: {reason}; {WAY_OUT}"
            ) from error
        blocks = [block for block in document if len(block.find_mmcif_category("_atom_site."))]
        if len(blocks) != 1:
            names = ", ".join(block.name for block in blocks or document)
            what = "more than one block with atoms" if blocks else "no atoms in its blocks"
            raise StructureError(f"{self.path} has {what} ({names}); {WAY_OUT}")
        return blocks[0]

    def _column(self, *names: str, default: str | None = None) -> list[str]:
        """Of the first of these items of _atom_site that the block has."""
        for name in names:
            if values := self._block.find_values(f"_atom_site.{name}"):
                return ["" if v in ("?", ".") else v.strip("'\"") for v in values]
        if default is None:
            raise StructureError(
                f"{self.path}: block {self._block.name} has no column _atom_site.{names[0]}; "
                f"{WAY_OUT}"
            )
        return [default] * len(self._block.find_mmcif_category("_atom_site."))

    def _mmcif_models(self) -> Iterator[Model]:
        as_number = self._gemmi.cif.as_number
        sequence = set(map(tuple, self._block.find("_entity_poly_seq.", ["entity_id", "num",
                                                                        "mon_id"])))  # fmt: skip
        groups = self._column("group_PDB", default="ATOM")
        labels = self._column("label_asym_id", "auth_asym_id", default="_")
        polymers = {label for label, group in zip(labels, groups, strict=True) if group == "ATOM"}
        rows = zip(
            self._column("pdbx_PDB_model_num", default="1"),
            self._column("auth_asym_id", "label_asym_id", default="_"),
            labels,
            self._column("auth_seq_id", "label_seq_id", default=""),
            self._column("pdbx_PDB_ins_code", default=""),
            self._column("label_seq_id", default=""),
            self._column("label_entity_id", default=""),
            self._column("label_comp_id", "auth_comp_id"),
            groups,
            self._column("label_atom_id", "auth_atom_id"),
            self._column("label_alt_id", default=""),
            self._column("occupancy", default="1"),
            self._column("Cartn_x"),
            self._column("Cartn_y"),
            self._column("Cartn_z"),
            strict=True,
        )
        model = None
        for (at, *key, group), run in groupby(rows, lambda row: row[:9]):
            chain, label, number, code, nth, entity, name = key
            atoms = []
            for atom, location, *rest in (row[9:] for row in run):
                occupancy, x, y, z = map(as_number, rest)
                if not (abs(x) < FAR and abs(y) < FAR and abs(z) < FAR):
                    raise StructureError(
                        f"{self.path}: atom {atom} of {chain}/{number}{code}({name}) has a "
                        f"coordinate that is no number below {FAR:.0e} Å, ({', '.join(rest[1:])}); "
                        f"{WAY_OUT}"
                    )
                occupancy = 1.0 if math.isnan(occupancy) else occupancy
                atoms.append(Atom(atom, location, occupancy, (x, y, z)))
            if model is None or model.number != at:
                if model:
                    yield from self._with_more(model)
                model = Model(at)
            named = bool(nth) and label in polymers
            if sequence and entity:
                named = (entity, nth, name) in sequence
            place = Place(chain or "_", label, number + code, label)
            model.add(place, name, group == "HETATM", named, atoms)
        if model:
            yield model


def _text(path: Path) -> str:
    """Raises StructureError where the file cannot be read, is damaged or empty."""
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StructureError(f"{path} is damaged: {error}; get it again, or {WAY_OUT}") from error
    except OSError as error:
        raise StructureError(f"{path} cannot be read: {error.strerror}; {WAY_OUT}") from error
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if wide else "utf-8-sig", errors="replace")
    if not text.strip("\0 \t\r\n"):
        raise StructureError(f"{path} is empty; {WAY_OUT}")
    return text


def _spilled_names(lines: list[str]) -> set[str]:
    """Columns 21 and 22 where the first is the end of a residue's name, not of a chain's.

    LYSH of chain A looks like LYS of chain HA: it is a chain if other residues lie in it.
    """
    records = ("ATOM  ", "HETATM")
    seen = {line[17:22] for line in lines if line[20:21].strip() and line[:6] in records}
    names = {text for text in seen if text[:4] in _FOUR_LETTERS}
    others = {text[3:] for text in seen - names if kind_of(text[:3].strip()).amino}
    return {text[3:] for text in names} - others


@cache
def kind_of(name: str) -> Kind:
    """Of a residue's name, where a force field's has been replaced by its parent's."""
    gemmi = gemmi_module()
    kind = gemmi.find_tabulated_residue(name)
    code = kind.one_letter_code
    letter = code if code.strip() and code.upper() in RESIDUES else "X"
    return Kind(kind.is_amino_acid(), kind.kind != gemmi.ResidueKind.UNKNOWN, letter)


def gemmi_module() -> ModuleType:
    try:
        import gemmi
    except ImportError as error:
        raise ConfigError(
            "reading structures needs gemmi: install the extra longfold[proteins]"
        ) from error
    return gemmi
