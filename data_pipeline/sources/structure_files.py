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
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from operator import itemgetter
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
_PARENTS: dict[str, str] = _THREE_LETTERS | _FOUR_LETTERS


class Site(NamedTuple):
    """What a record says about the residue of its atom."""

    model: str | int
    author: str
    """The author's name of the chain; the segment, or `_`, where that is blank."""
    label: str
    """mmCIF's own name of the chain."""
    number: str
    """The author's, with insertion code; nothing where it is blank or no number fits."""
    piece: str | int
    """TER records of the chain before it; in mmCIF the label of its chain."""
    name: str
    """Its parent's, if a force field gave it another."""
    hetero: bool
    in_sequence: bool
    """The file's sequence of the molecule names it: SEQRES, or mmCIF's entity."""


Row = tuple[Site, Sequence[str], int]
"""An atom's record: name, location, occupancy, x, y and z as texts, and the record's number."""


class Atom(NamedTuple):
    """One location of an atom."""

    name: str
    location: str
    """The letter of an alternate location, or nothing."""
    occupancy: float
    xyz: tuple[float, float, float]
    record: int
    """Line of a PDB file, row of mmCIF's table of atoms, from 1."""


class Residue(NamedTuple):
    """The atoms under one name at one place of a chain."""

    site: Site
    """Of the first of them."""
    atoms: list[Atom]
    """Those of N, CA, C and O that the file has."""


Place = list[Residue]
"""One place of a chain: the residues that are alternatives there."""


class Kind(NamedTuple):
    """What the dictionaries say about a residue's name."""

    amino: bool
    known: bool
    letter: str
    """Upper case for the twenty, lower case for the parent of a modified one, else X."""


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
        """mmCIF's; None of a PDB file."""
        if re.match(r"(\s|#.*\n)*data_", self._text, re.IGNORECASE):
            self._block = self._block_with_atoms()

    def models(self, every: bool) -> list[list[Place]]:
        """The places of each model that has an atom, in file order; or of the first model alone.

        Raises:
            StructureError: names the first coordinate that is no number.
        """
        models: list[list[Place]] = []
        for _, model in groupby(self.rows(), lambda row: row[0].model):
            if models and not every:
                self.unread_models = True
                break
            models.append(_places((row[0], self._atom(*row)) for row in model))
        if not models:
            raise StructureError(
                f"{self.path} holds no atoms; is it a PDB or mmCIF file? {WAY_OUT}"
            )
        return models

    def rows(self) -> Iterator[Row]:
        """The records of all atoms of all models, in file order."""
        return self._mmcif_rows() if self._block else self._pdb_rows()

    @property
    def is_mmcif(self) -> bool:
        return self._block is not None

    def assemblies(self) -> dict[str, Any]:
        """gemmi's description of each by its name."""
        if self._block:
            structure = self._gemmi.make_structure_from_block(self._block)
        else:
            header = [line for line in self._text.splitlines() if line.startswith("REMARK 350")]
            structure = self._gemmi.read_pdb_string("\n".join([*header, "END", ""]))
        return {assembly.name: assembly for assembly in structure.assemblies}

    def _atom(self, site: Site, texts: Sequence[str], row: int) -> Atom:
        name, location, *numbers = texts
        occupancy, x, y, z = map(self._gemmi.cif.as_number, map(str.strip, numbers))
        if not (abs(x) < FAR and abs(y) < FAR and abs(z) < FAR):
            raise StructureError(
                f"{self.path} {'row' if self._block else 'line'} {row}: atom {name} of "
                f"{site.author}/{site.number}({site.name}) has a coordinate that is no number "
                f"below {FAR:.0e} Å, ({', '.join(numbers[1:])}); {WAY_OUT}"
            )
        occupancy = 1.0 if math.isnan(occupancy) else occupancy
        return Atom(name, location, occupancy, (x, y, z), row)

    def _pdb_rows(self) -> Iterator[Row]:
        """END, too, ends a model: what VMD writes behind it is another frame."""
        lines = self._text.splitlines()
        spilled = _spilled_names(lines)
        sequences: dict[str, set[str]] = defaultdict(set)
        pieces: Counter[str] = Counter()
        model, ended, residue, site = 0, False, "", None
        for row, line in enumerate(lines, 1):
            record = line[:6].upper().rstrip()
            if record[:4] == "ATOM" or record == "HETATM":
                if ended:
                    model, ended, site, pieces = model + 1, False, None, Counter()
                same = record[:4] + line[17:27] + line[72:80].rstrip("0123456789+-")
                if site is None or same != residue:
                    name, letters = line[17:20].strip(), line[20:22]
                    if letters in spilled:
                        name, letters = line[17:21].strip(), letters[1:]
                    chain, number = letters.strip(), line[22:27].strip()
                    named = name not in _STANDARD and name in sequences[chain]
                    # Before 1996 columns 73 to 80 held the entry's name and the line's number.
                    segment = "" if line[76:80].strip().isdigit() else line[72:76].strip()
                    chain, number = chain or segment or "_", "" if "*" in number else number
                    name, piece = _PARENTS.get(name, name), pieces[chain]
                    hetero, residue = record[:4] != "ATOM", same
                    site = Site(model, chain, chain, number, piece, name, hetero, named)
                numbers = line[54:60], line[30:38], line[38:46], line[46:54]
                yield site, (line[12:16].strip(), line[16:17].strip(), *numbers), row
            elif record == "SEQRES":
                sequences[line[10:12].strip()].update(line[19:70].split())
            elif record in ("END", "ENDMDL", "MODEL"):
                ended = True
            elif record[:3] == "TER" and site:
                pieces[site.author] += 1
                site = None

    def _block_with_atoms(self) -> Any:
        try:
            document = self._gemmi.cif.read_string(self._text)
        except (RuntimeError, ValueError) as error:  # gemmi raises both
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
                return list(map(self._gemmi.cif.as_string, values))
        if default is None:
            raise StructureError(
                f"{self.path}: block {self._block.name} has no column _atom_site.{names[0]}; "
                f"{WAY_OUT}"
            )
        return [default] * len(self._block.find_mmcif_category("_atom_site."))

    def _mmcif_rows(self) -> Iterator[Row]:
        items = ["entity_id", "num", "mon_id"]
        sequence = set(map(tuple, self._block.find("_entity_poly_seq.", items)))
        groups = self._column("group_PDB", default="ATOM")
        labels = self._column("label_asym_id", "auth_asym_id", default="_")
        polymers = {label for label, group in zip(labels, groups, strict=True) if group == "ATOM"}
        columns = (
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
        )
        site, residue = None, ("",)
        for row, values in enumerate(zip(*columns, strict=True), 1):
            if site is None or values[:9] != residue:
                residue = values[:9]
                model, author, label, number, code, nth, entity, name, group = residue
                named = bool(nth) and label in polymers
                if sequence and entity:
                    named = (entity, nth, name) in sequence
                number, hetero = number + code, group == "HETATM"
                name = _PARENTS.get(name) or name
                site = Site(model, author or "_", label, number, label, name, hetero, named)
            yield site, values[9:], row


def _places(rows: Iterable[tuple[Site, Atom]]) -> list[Place]:
    """Those of one model, gathered from runs of atoms under one name and number."""
    places: list[Place] = []
    last: dict[tuple[str, str], Place] = {}
    for site, run in groupby(rows, itemgetter(0)):
        atoms, residue = [atom for _, atom in run], None
        key, before = (site.author, site.number), places[-1][0].site if places else None
        if before and (*key, site.piece) == (before.author, before.number, before.piece):
            residue = _residue_for(site, atoms[0], places[-1], follows=True)
        elif site.number and key in last:
            residue = _residue_for(site, atoms[0], last[key], follows=False)
        for atom in atoms:
            if residue is None or _repeats(atom, residue.atoms):
                residue = Residue(site, [])
                places.append([residue])
                last[key] = places[-1]
            if atom.name in ATOMS:
                residue.atoms.append(atom)
    return places


def _residue_for(site: Site, atom: Atom, place: Place, follows: bool) -> Residue | None:
    """The residue of a place that an atom of its chain and number belongs to; None: another's.

    An atom that follows the place's others is one of the residue of that name, if it is not
    there already. Another name, or an atom that stands elsewhere in the file, must lie near; of
    another name it is an alternative only if its location says so.
    """
    residue = next((residue for residue in place if residue.site.name == site.name), None)
    if residue and follows:
        return None if _repeats(atom, residue.atoms) else residue
    atoms = [a for residue in place for a in residue.atoms]
    reach = 4 if atom.name in ATOMS else 12
    near = any(math.dist(a.xyz, atom.xyz) < reach for a in atoms)
    clash = any(a.name == atom.name and a.location in ("", atom.location) for a in atoms)
    if clash or not near or not (residue or atom.location):
        return None
    if residue is None:
        residue = Residue(site, [])
        place.append(residue)
    return residue


def _repeats(atom: Atom, atoms: list[Atom]) -> bool:
    """Whether a residue has this atom already, elsewhere: then another residue begins."""
    return atom.name in ("N", "CA") and any(
        (a.name, a.location) == (atom.name, atom.location) and math.dist(a.xyz, atom.xyz) >= 1
        for a in atoms
    )


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
