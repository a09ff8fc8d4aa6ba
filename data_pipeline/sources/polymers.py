"""Residues of a structure file to protein chains.

A residue belongs to a chain if it is ATOM, in the entity's sequence, or bonded (C-N) to a
neighbour, whatever stands around it: water, ions and lipids in between, TER records, numbers that
begin anew. A HETATM amino acid without any of that is a ligand.
"""

import math
import re
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from itertools import pairwise

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
from data_pipeline.sources.structure_files import Atom, Model, Place, kind_of

LIGANDS = "amino acids that are ligands"
MISSING = (math.nan,) * 3


class Link:
    """One residue of a chain: of a place's alternatives the one that counts.

    It is the one with the most backbone atoms, then the highest occupancy, then the first; all of
    its atoms are of one location, never a mixture.
    """

    def __init__(self, place: Place):
        residues = [residue for residue in place.residues if _may_link(residue.name, residue.atoms)]
        self.place, self.number, self.piece = place, place.number, place.piece
        self.hetero = all(residue.hetero for residue in residues)
        self.in_sequence = any(residue.in_sequence for residue in residues)
        options = [
            (residue, [a for a in residue.atoms if a.location in ("", location)])
            for residue in residues
            for location in sorted({a.location for a in residue.atoms} - {""}) or [""]
        ]
        residue, chosen = max(options, key=lambda option: _score(option[1]))
        atoms = {a.name: a.xyz for a in reversed(chosen)}
        self.name, self.kind = residue.name, kind_of(residue.name)
        self.repeated = len(chosen) > len(atoms)
        """An atom is there twice at the same location."""
        self.xyz = [atoms.get(name, MISSING) for name in ATOMS]

    @property
    def order(self) -> tuple[int, str] | None:
        """What numbers are compared by; None where it is no number."""
        digits = re.fullmatch(r"(-?\d+)(\D?)", self.number)
        return (int(digits[1]), digits[2]) if digits else None

    def moved(self, rotation: np.ndarray, shift: np.ndarray) -> "Link":
        """Its copy after a rotation (3, 3) and a translation (3,)."""
        other = copy(self)
        other.xyz = list(self.xyz @ rotation.T + shift)
        return other

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
    here = {a.name: a.occupancy for a in reversed(atoms)}
    return len(here), sum(here.values(), 0.0)


def _may_link(name: str, atoms: list[Atom]) -> bool:
    """An amino acid of the dictionary, or what has a backbone."""
    return kind_of(name).amino or {a.name for a in atoms} >= set(ATOMS[:3])


def molecules(model: Model, file: str, notes: Notes) -> Iterator[tuple[str, list[Link]]]:
    """The chains of a model with their author's names, in file order; ligands go to `notes`.

    A second molecule under the name of a first one, whose numbers begin anew, is `A-2`.
    """
    chains: dict[str, list[Link]] = {}
    for place in model.places:
        if any(_may_link(residue.name, residue.atoms) for residue in place.residues):
            chains.setdefault(place.chain, []).append(Link(place))
    taken = set(chains)
    for name, links in chains.items():
        placed = _in_order(links)
        before, after = [None, *placed[:-1]], [*placed[1:], None]
        kept = [
            link
            for previous, link, following in zip(before, placed, after, strict=True)
            if link.stays or link.bonds(following) or (previous and previous.bonds(link))
        ]
        left_out = set(placed) - set(kept)
        for link in placed:
            if link in left_out and link.kind.amino:
                notes.leave_out(LIGANDS, f"{file}/{name}/{link.name} {link.number}", 1)
        for number, molecule in enumerate(_apart(kept)):
            yield (unused(name, taken) if number else name), molecule


def _in_order(links: list[Link]) -> list[Link]:
    """Modified residues that are listed behind their chain go where their number says."""
    placed: list[Link] = []
    for link, after in zip(links, [*links[1:], None], strict=True):
        before = placed[-1] if placed else None
        at = len(placed)
        if before and link.hetero and not before.bonds(link):
            options = list(_places_by_number(placed, link))
            fitting = [
                i for i in options if (i and placed[i - 1].bonds(link)) or link.bonds(placed[i])
            ]
            if not fitting and link.in_sequence and not link.bonds(after):
                fitting = options
            if fitting:
                at = fitting[0]
                link.piece = placed[at].piece
        elif before and link.hetero:
            link.piece = before.piece
        placed.insert(at, link)
    return placed


def _places_by_number(placed: list[Link], link: Link) -> Iterator[int]:
    """Before which of those placed the link's number lies, behind a lower one."""
    if link.order is None:
        return
    for i, following in enumerate(placed):
        low = placed[i - 1].order if i else (-(10**9), "")
        if low is not None and following.order is not None and low < link.order < following.order:
            yield i


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
    if last.place.label != link.place.label and last.in_sequence and link.in_sequence:
        return True
    if not link.number or link.number not in numbers:
        return False
    if link.number == last.number:
        return last is first
    return link.order is None or last.order is None or link.order < last.order


def unused(name: str, taken: set[str]) -> str:
    """`name-2`, or the next number that is free; taken from now on."""
    number = 2
    while f"{name}-{number}" in taken:
        number += 1
    taken.add(f"{name}-{number}")
    return f"{name}-{number}"


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
    chain = Chain(name, letters.upper(), xyz)
    pieces = [link.piece for link in links]
    ends = np.array([False, *(a != b for a, b in pairwise(pieces))])
    if (ends & ~chain.breaks).any():  # a TER, bonded or not
        chain = replace(chain, segment=np.cumsum(chain.breaks | ends))
    return chain


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
