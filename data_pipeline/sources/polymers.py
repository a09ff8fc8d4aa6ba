"""Residues of a structure file to protein chains.

A residue belongs to a chain if it is ATOM, in the entity's sequence, or bonded (C-N) to a
neighbour, whatever stands around it: water, ions and lipids in between, TER records, numbers that
begin anew. A HETATM amino acid without any of that is a ligand.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, pairwise

import numpy as np

from data_pipeline.chains import (
    ATOMS,
    IMPOSSIBLE,
    LONGEST_BOND,
    SHORTEST_BOND,
    Chain,
    Notes,
    impossible,
)
from data_pipeline.sources.structure_files import Atom, Place, Residue, kind_of

LIGANDS = "amino acids that are ligands"
MISSING = (math.nan,) * 3


class Link:
    """One residue of a chain: of a place's alternatives the one that counts.

    It is the one with the most backbone atoms, then the highest occupancy, then the first; all of
    its atoms are of one location, never a mixture.
    """

    def __init__(self, place: Place):
        residues = [residue for residue in place if _may_link(residue)]
        self.site, self.number, self.piece = (
            place[0].site,
            place[0].site.number,
            place[0].site.piece,
        )
        self.hetero = all(residue.site.hetero for residue in residues)
        self.in_sequence = any(residue.site.in_sequence for residue in residues)
        options = [
            (residue, [a for a in residue.atoms if a.location in ("", location)])
            for residue in residues
            for location in sorted({a.location for a in residue.atoms} - {""}) or [""]
        ]
        residue, chosen = max(options, key=lambda option: _score(option[1]))
        atoms = {a.name: a for a in reversed(chosen)}
        self.name, self.kind = residue.site.name, kind_of(residue.site.name)
        self.repeated = len(chosen) > len(atoms)
        """An atom is there twice at the same location."""
        self.xyz = [atoms[name].xyz if name in atoms else MISSING for name in ATOMS]
        self.records = [atoms[name].record if name in atoms else 0 for name in ATOMS]
        """Where these atoms stand in the file; 0: nowhere."""

    @property
    def order(self) -> tuple[float, str]:
        """What numbers are compared by; what is no number is neither below nor above another."""
        digits = re.fullmatch(r"(-?\d+)(\D?)", self.number)
        return (float(digits[1]), digits[2]) if digits else (float("nan"), "")

    def bonds(self, following: "Link | None") -> bool:
        """Whether the following residue's N is bonded to this one's C."""
        if following is None:
            return False
        return SHORTEST_BOND <= math.dist(self.xyz[2], following.xyz[0]) <= LONGEST_BOND

    @property
    def stays(self) -> bool:
        """Whether it is part of a chain without any bond."""
        return self.in_sequence or (not self.hetero and (self.kind.amino or not self.kind.known))


def _score(atoms: list[Atom]) -> tuple[int, float]:
    first = {a.name: a.occupancy for a in reversed(atoms)}
    return len(first), sum(first.values(), 0.0)


def _may_link(residue: Residue) -> bool:
    """An amino acid of the dictionary, or what has a backbone."""
    return kind_of(residue.site.name).amino or {a.name for a in residue.atoms} >= set(ATOMS[:3])


def molecules(
    model: list[Place], names: str, file: str, taken: set[str], notes: Notes
) -> Iterator[tuple[str, list[Link]]]:
    """The chains of a model with their names, in file order; ligands go to `notes`.

    A second molecule under the name of a first one, whose numbers begin anew, is `A-2`.

    Args:
        names: whose they are, `author` or `label`.
        taken: those that molecules before have; it gains these.
    """
    chains: dict[str, list[Link]] = {}
    for place in model:
        if any(map(_may_link, place)):
            chains.setdefault(getattr(place[0].site, names), []).append(Link(place))
    for name, links in chains.items():
        placed = _in_order(links)
        kept = []
        neighbours = zip([None, *placed[:-1]], placed, [*placed[1:], None], strict=True)
        for before, link, after in neighbours:
            if link.stays or link.bonds(after) or (before and before.bonds(link)):
                kept.append(link)
            elif link.kind.amino:
                notes.leave_out(LIGANDS, f"{file}/{name}/{link.name} {link.number}", 1)
        for molecule in _apart(kept):
            yield _unused(name, taken), molecule


def _in_order(links: list[Link]) -> list[Link]:
    """Modified residues that are listed behind their chain go where their number says."""
    placed: list[Link] = []
    for link, after in zip(links, [*links[1:], None], strict=True):
        at, before = len(placed), placed[-1] if placed else None
        if before and link.hetero:
            if before.bonds(link):
                link.piece = before.piece
            elif (fitting := _place_by_number(placed, link, after)) is not None:
                at, link.piece = fitting, placed[fitting].piece
        placed.insert(at, link)
    return placed


def _place_by_number(placed: list[Link], link: Link, after: Link | None) -> int | None:
    """Before which of those placed the link's number lies, behind a lower one.

    It is bonded there, or the file's sequence names it and it is not bonded to the one after.
    """
    lower = [(-math.inf, ""), *(other.order for other in placed)]
    options = [i for i, other in enumerate(placed) if lower[i] < link.order < other.order]
    fitting = [i for i in options if (i and placed[i - 1].bonds(link)) or link.bonds(placed[i])]
    if link.in_sequence and not link.bonds(after):
        fitting += options
    return fitting[0] if fitting else None


def _apart(links: list[Link]) -> Iterator[list[Link]]:
    """One list for each molecule: a new one begins where numbers begin anew without a bond."""
    molecule, numbers = [], set()
    for link in links:
        if molecule and not molecule[-1].bonds(link) and _begins(link, molecule, numbers):
            yield molecule
            molecule, numbers = [], set()
        molecule.append(link)
        numbers.add(link.number)
    if molecule:
        yield molecule


def _begins(link: Link, molecule: list[Link], numbers: set[str]) -> bool:
    """Whether a link begins another molecule: by mmCIF's label, or by a number that was there.

    Where two segments of one chain meet, the last number may be the next one's first.
    """
    first, last = molecule[0], molecule[-1]
    if last.site.label != link.site.label and last.in_sequence and link.in_sequence:
        return True
    if not link.number or link.number not in numbers:
        return False
    if link.number == last.number:
        return last is first
    return not link.order >= last.order


def _unused(name: str, taken: set[str]) -> str:
    """The name, `name-2`, or the next number that is free; taken from now on."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    free = next(name for name in names if name not in taken)
    taken.add(free)
    return free


def chain_of(name: str, links: list[Link], notes: Notes) -> Chain:
    """The sample of one molecule; what was changed in it goes to `notes`."""
    letters = "".join(link.kind.letter for link in links)
    if not letters.isupper():
        notes["chains with residues read as their parent"].append(name)
    if any(link.repeated for link in links):
        notes["chains that repeat atoms, of which the first was read"].append(name)
    xyz = np.array([link.xyz for link in links], np.float32)
    for link in links:
        if link.kind.letter == "X":
            notes["residues that are none of the twenty, read as X"].append(
                f"{name}/{link.name} {link.number}"
            )
    for wrong in np.flatnonzero(impossible(xyz)):
        notes[IMPOSSIBLE].append(f"{name}/{links[wrong].number}")
        xyz[wrong] = np.nan
    made = Chain(name, letters.upper(), xyz)
    ends = np.array([False, *(a.piece != b.piece for a, b in pairwise(links))])
    if (ends & ~made.breaks).any():  # a TER, bonded or not
        made = replace(made, segment=np.cumsum(made.breaks | ends))
    return made


def joined(name: str, chains: list[Chain]) -> Chain:
    """One sample of several chains; each begins a segment."""
    starts = np.cumsum([0, *(len(chain.sequence) for chain in chains[:-1])])
    breaks = np.concatenate([chain.breaks for chain in chains])
    breaks[starts[1:]] = True
    return Chain(
        name,
        "".join(chain.sequence for chain in chains),
        np.concatenate([chain.xyz for chain in chains]),
        segment=np.cumsum(breaks),
    )
