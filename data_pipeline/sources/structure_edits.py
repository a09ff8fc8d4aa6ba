"""A structure file with other coordinates at some of its atoms, and otherwise byte by byte itself.

Columns and values are exchanged in the text, so that nothing is lost that a program which writes
structures anew would not know of.
"""

import gzip
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from data_pipeline.chains import ATOMS, Notes, norms
from data_pipeline.errors import StructureError
from data_pipeline.sources.structure_files import StructureFile
from data_pipeline.sources.structures import placed_chains

B_FACTOR = "_atom_site.b_iso_or_equiv"
_CARTESIAN = {f"_atom_site.cartn_{axis}": number for number, axis in enumerate("xyz")}
_MARKS = {"utf-8": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}
"""What a text may begin with, and how it is encoded then."""
# A text between lines that begin with ;, a quoted one, a comment, or a word.
_TOKENS = re.compile(
    r"""^;(?s:.*?)^;|'(?:[^'\r\n]|'(?=\S))*'(?=\s|\Z)|"(?:[^"\r\n]|"(?=\S))*"(?=\s|\Z)"""
    r"""|\#[^\r\n]*|\S+""",
    re.MULTILINE,
)


class Moved(NamedTuple):
    """What an atom's record says from now on."""

    xyz: tuple[float, ...]
    """Å."""
    b_factor: float


class Edit(NamedTuple):
    """A file's new content, and what was done to it."""

    content: bytes
    displacements: Float32[np.ndarray, " atoms"]
    """Å, of the atoms that moved."""
    left_alone: Counter[str]
    """How many of what stayed as they were."""


class EditableStructure:
    """The chains of a structure file, whose atoms may be put elsewhere.

    Raises:
        StructureError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file, self.notes = StructureFile(path), Notes()
        placed = placed_chains(self._file, self.notes)
        self.chains = [chain for chain, _ in placed]
        self._records = [records for _, records in placed]

    def with_atoms(
        self, atoms: Sequence[str], xyz: Sequence[Float32[np.ndarray, "length atoms 3"]]
    ) -> Edit:
        """The file with these atoms of each chain at other places, and their displacements, Å, as
        B factors. Residues that lack one of them stay as they are.

        Raises:
            StructureError: a coordinate is too large for its column.
        """
        columns = [ATOMS.index(atom) for atom in atoms]
        left, moved, displacements = Counter[str](), {}, [np.empty(0, np.float32)]
        for chain, records, new in zip(self.chains, self._records, xyz, strict=True):
            whole = (records[:, columns] > 0).all(1)
            left[f"residues without all of {', '.join(atoms)}"] += int((~whole).sum())
            numbers, places = records[whole][:, columns].ravel(), new[whole].reshape(-1, 3)
            steps = norms(places - chain.xyz[whole][:, columns].reshape(-1, 3))
            displacements.append(steps)
            values = zip(numbers.tolist(), places.tolist(), steps.tolist(), strict=True)
            moved |= {number: Moved(tuple(xyz), step) for number, xyz, step in values}
        content, with_b = _edited(self._file, moved)
        left += _left_alone(self._file, moved, atoms)
        left["displacements, for which there is no column of B factors"] += not with_b
        return Edit(content, np.concatenate(displacements), +left)


def _left_alone(
    file: StructureFile, moved: Mapping[int, Moved], atoms: Sequence[str]
) -> Counter[str]:
    """How many atoms of what kind are not among those that moved."""
    rows = list(file.rows())
    models, left = {site.model for site, _, record in rows if record in moved}, Counter[str]()
    for site, (name, location, *_), record in rows:
        if record in moved:
            continue
        if models and site.model not in models:
            kind = "atoms of other models"
        elif name in atoms and location:
            kind = f"{', '.join(atoms)} at other locations"
        elif site.hetero:
            kind = "hetero atoms"
        else:
            rest = f"{', '.join(atoms)} of such residues or of no chain"
            kind = rest if name in atoms else "other atoms"
        left[kind] += 1
    return left


def _edited(file: StructureFile, moved: Mapping[int, Moved]) -> tuple[bytes, bool]:
    """The content of the file with these atoms, by the number of their record; and whether it has
    a column for B factors. What is compressed stays so.

    Raises:
        StructureError: it cannot be read, or a coordinate is too large for its column.
    """
    try:
        data = file.path.read_bytes()
    except OSError as error:  # it was read before
        raise StructureError(f"{file.path} cannot be read: {error.strerror}") from error
    compressed = data.startswith(b"\x1f\x8b")
    data = gzip.decompress(data) if compressed else data
    codec = next((name for name, mark in _MARKS.items() if data.startswith(mark)), "utf-8")
    mark = _MARKS[codec] if data.startswith(_MARKS[codec]) else b""
    # Bytes that are no text come back as they were.
    text = data.removeprefix(mark).decode(codec, "surrogateescape")
    text, with_b = _edited_mmcif(text, moved) if file.is_mmcif else _edited_pdb(file, text, moved)
    data = mark + text.encode(codec, "surrogateescape")
    return (gzip.compress(data, mtime=0) if compressed else data), with_b


def _edited_pdb(file: StructureFile, text: str, moved: Mapping[int, Moved]) -> tuple[str, bool]:
    lines = text.splitlines(keepends=True)
    for number, (xyz, b_factor) in moved.items():
        content = (line := lines[number - 1]).splitlines()[0]
        columns = [f"{x:8.3f}" for x in xyz]
        if any(len(column) > 8 for column in columns):
            raise StructureError(
                f"{file.path} line {number}: ({', '.join(columns)}) does not fit the 8 columns of "
                "a PDB coordinate; convert the file to mmCIF"
            )
        new = f"{content[:30]}{''.join(columns)}{content[54:60]:<6}{min(b_factor, 999.99):6.2f}"
        lines[number - 1] = new + content[66:] + line[len(content) :]
    return "".join(lines), True


def _edited_mmcif(text: str, moved: Mapping[int, Moved]) -> tuple[str, bool]:
    parts, end, with_b = [], 0, False
    for tag, row, token in _atom_values(text):
        with_b = with_b or tag == B_FACTOR
        if row in moved:
            xyz, b_factor = moved[row]
            new = f"{b_factor:.2f}" if tag == B_FACTOR else f"{xyz[_CARTESIAN[tag]]:.3f}"
            # Columns stay in line as long as they can.
            parts += [text[end : token.start()], new.ljust(token.end() - token.start())]
            end = token.end()
    return "".join([*parts, text[end:]]), with_b


def _atom_values(text: str) -> Iterator[tuple[str, int, re.Match[str]]]:
    """The coordinates and B factors of mmCIF's atoms: tag in lower case, row from 1, value."""
    tags: list[str] = []
    wanted: dict[int, str] = {}
    in_header, count = False, 0
    for token in _TOKENS.finditer(text):
        first = text[token.start()]
        if first == "#":
            continue
        if first == "_":
            tags, count = [*tags, token[0].lower()] if in_header else [token[0].lower()], 0
            wanted = {n: t for n, t in enumerate(tags) if t in _CARTESIAN or t == B_FACTOR}
        elif first in "lL" and token[0].lower() == "loop_":
            tags, wanted, in_header, count = [], {}, True, 0
        elif first in "dDsSgG" and re.match(r"(data_|save_|global_|stop_)", token[0], re.I):
            tags, wanted, in_header = [], {}, False
        else:
            in_header = False
            if wanted:
                row, column = divmod(count, len(tags))
                count += 1
                if column in wanted:
                    yield wanted[column], row + 1, token
