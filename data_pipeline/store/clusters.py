"""Groups of similar sequences, and the split that never parts a group.

Copies in train and test leak; so chains are grouped by shared 4-mers, which finds sequences of
about 75 % identity and more, and groups are dealt out whole. `grouping` has rules that see farther.
The result follows from the sequences alone, on every machine.

Sequences come as one flat array of residue numbers (20 unknown) and offsets, which may be a file
mapped to memory: what is held at once does not grow with their number, but for 30 bytes a chain.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from data_pipeline.chains import RESIDUES, SPLITS, decode
from data_pipeline.errors import SourceError

KMER = 4
KINDS = len(RESIDUES) ** KMER
CONTAINMENT = 0.25
"""Share of the smaller set of 4-mers found in the other above which two sequences are similar."""
HELD_OUT = 0.1
"""Share of all residues in each of validation and test."""
LARGEST_HELD_OUT = 0.25
"""Largest part of a held-out split that one group may be; larger groups train."""

_AT_ONCE = 1 << 22
"""Residues that others are compared with at once: some 200 MB of tables."""


def cluster(
    residue: UInt8[np.ndarray, " residues"],
    offsets: Int[np.ndarray, " ends"],
    keys: Sequence[str | None] = (),
) -> Int[np.ndarray, " chains"]:
    """Group number of each sequence: single linkage over 4-mer containment above 0.25.

    Equal sequences are together. A chain with a key is in the group of that key, whatever its
    sequence. Groups are numbered in the order of their first member. The time grows with the
    square of the number of sequences: 105 s and 450 MB for 10^5 of 260 residues on one core.
    """
    lengths = np.diff(offsets)
    first = _first_equal(residue, offsets, keys)
    compared = first == np.arange(len(first))
    compared[[number for number, key in enumerate(keys) if key is not None]] = False
    blocks = _blocks(np.flatnonzero(compared), lengths)
    group = np.arange(len(first))
    for number, columns in enumerate(blocks):
        table = _Table(residue, offsets, columns)
        for rows in blocks[number:]:
            for row, similar in table.similar(residue, offsets, rows):
                join(group, row, similar)
    return np.unique(group[first], return_inverse=True)[1]


def split(
    residue: UInt8[np.ndarray, " residues"],
    offsets: Int[np.ndarray, " ends"],
    groups: Int[np.ndarray, " chains"],
    names: Sequence[str] = (),
) -> Int[np.ndarray, " chains"]:
    """Place in SPLITS of each sequence.

    Groups come in the order of a hash of their distinct sequences; validation is filled first,
    then test, up to a tenth of the residues each, from groups of at most a quarter of that; the
    rest trains. Where no group is that small, the smallest ones are held out.

    Args:
        names: of the chains; they stand for sequences that have no known residue.

    Raises:
        SourceError: fewer than three groups.
    """
    count = int(groups.max()) + 1
    if count < len(SPLITS):
        raise SourceError(
            f"{len(groups)} sample(s) form {count} group(s) of like sequences; splitting them "
            f"into {', '.join(SPLITS)} needs {len(SPLITS)}: add others to the source"
        )
    residues = np.bincount(groups, weights=np.diff(offsets))
    target = HELD_OUT * residues.sum()
    keys = list(_group_keys(residue, offsets, groups, names))
    order = sorted(range(count), key=keys.__getitem__)
    place = np.zeros(count, np.int64)
    for number in (1, 2):
        free = [n for n in order if place[n] == 0]
        small = [n for n in free if residues[n] <= LARGEST_HELD_OUT * target]
        filled = 0.0
        for n in small or [min(free, key=lambda n: residues[n])]:
            if filled + residues[n] <= target or filled == 0:
                place[n], filled = number, filled + residues[n]
    return place[groups]


def _group_keys(
    residue: np.ndarray, offsets: np.ndarray, groups: np.ndarray, names: Sequence[str]
) -> Iterator[bytes]:
    """Of each group, the hash of its distinct sequences in alphabetical order."""
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        texts = set()
        for chain in members:
            codes = residue[offsets[chain] : offsets[chain + 1]]
            blank = len(names) > 0 and bool((codes == len(RESIDUES)).all())
            texts.add(names[chain] if blank else decode(codes))
        yield hashlib.sha256("\n".join(sorted(texts)).encode()).digest()


def _first_equal(
    residue: np.ndarray, offsets: np.ndarray, keys: Sequence[str | None]
) -> Int[np.ndarray, " chains"]:
    """The first chain of each chain's key, else of its sequence; a sequence without a known
    residue has no equal."""
    hashes = np.zeros(len(offsets) - 1, np.uint64)
    for chain in range(len(hashes)):
        codes = residue[offsets[chain] : offsets[chain + 1]]
        text = b"sequence" + codes.tobytes()
        if keys and keys[chain] is not None:
            text = f"key {keys[chain]}".encode()
        elif not (codes < len(RESIDUES)).any():
            text = f"chain {chain}".encode()
        hashes[chain] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


def _blocks(chains: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Runs of chains of about _AT_ONCE residues."""
    ends = np.cumsum(lengths[chains])
    cuts = np.flatnonzero(np.diff(ends // _AT_ONCE)) + 1
    return [block for block in np.split(chains, cuts) if len(block)]


class _Table:
    """Which of some chains hold each 4-mer."""

    def __init__(self, residue: np.ndarray, offsets: np.ndarray, chains: np.ndarray):
        sets = list(_kmers(residue, offsets, chains))
        self.chains = chains
        self.sizes = np.array([len(kmers) for kmers in sets])
        kmer = np.concatenate(sets)
        owner = np.repeat(np.arange(len(chains), dtype=np.int32), self.sizes)
        self.owner = owner[np.argsort(kmer, kind="stable")]
        self.count = np.bincount(kmer, minlength=KINDS)
        self.end = np.cumsum(self.count)

    def similar(
        self, residue: np.ndarray, offsets: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[int, Int[np.ndarray, " n"]]]:
        """Each of `rows` with those of these chains that are similar to it."""
        smallest = self.sizes.min()
        for row, kmers in zip(rows, _kmers(residue, offsets, rows), strict=True):
            if not len(kmers):
                continue
            # The places of all holders of all its 4-mers, run after run.
            count = self.count[kmers]
            ends = np.cumsum(count)
            place = np.repeat(self.end[kmers] - ends, count)
            place += np.arange(len(place))
            shared = np.bincount(self.owner[place])
            # One cheap pass over all; few are left for the exact one.
            near = np.flatnonzero(shared > CONTAINMENT * min(smallest, len(kmers)))
            smaller = np.minimum(self.sizes[near], len(kmers))
            near = near[shared[near] > CONTAINMENT * smaller]
            if len(near):
                yield int(row), self.chains[near]


def _kmers(
    residue: np.ndarray, offsets: np.ndarray, chains: np.ndarray
) -> Iterator[Int[np.ndarray, " kmers"]]:
    """Distinct 4-mers of each chain as numbers; none that holds an X."""
    for chain in chains:
        codes = np.asarray(residue[offsets[chain] : offsets[chain + 1]], np.int64)
        if len(codes) < KMER:
            yield codes[:0]
            continue
        shifted = [codes[i : len(codes) - KMER + 1 + i] for i in range(KMER)]
        numbers = len(RESIDUES) ** np.arange(KMER) @ np.stack(shifted)
        yield np.unique(numbers[np.max(shifted, axis=0) < len(RESIDUES)])


def join(group: np.ndarray, one: int, others: np.ndarray) -> None:
    """The chains' groups become one, under the number of its first chain."""
    numbers = np.unique(np.append(group[others], group[one]))
    if len(numbers) > 1:
        group[np.isin(group, numbers)] = numbers[0]
