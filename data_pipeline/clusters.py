"""Groups of similar sequences, and the split that never parts a group.

Homologues and copies in train and test leak; so chains are grouped by shared 4-mers and groups
are dealt out whole. The result follows from the sequences alone, on every machine.

Sequences come as one flat array of residue numbers (20 unknown) and offsets, which may be a file
mapped to memory: what is held at once does not grow with their number, but for 30 bytes a chain.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from data_pipeline.chains import RESIDUES, decode
from data_pipeline.errors import SourceError

SPLITS = ("train", "validation", "test")
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
_HITS = 1 << 20
"""Shared 4-mers counted at once."""


def cluster(
    residue: UInt8[np.ndarray, " residues"],
    offsets: Int[np.ndarray, " ends"],
    keys: Sequence[str | None] = (),
) -> Int[np.ndarray, " chains"]:
    """Group number of each sequence: single linkage over 4-mer containment above 0.25.

    Equal sequences are together, and so are chains of one key. Groups are numbered in the order
    of their first member. Half a minute for 10^5 sequences of 260 residues; the time grows with
    the square of their number.
    """
    first = _first_equal(residue, offsets)
    group = first.copy()
    known: dict[str, int] = {}
    for number, key in enumerate(keys):
        if key is not None:
            _join(group, known.setdefault(key, number), number)
    distinct = np.flatnonzero(first == np.arange(len(first)))
    lengths = np.diff(offsets)
    for columns in _blocks(distinct, lengths):
        table = _Table(residue, offsets, columns)
        for rows in _blocks(distinct[distinct >= columns[0]], lengths):
            for left, right in table.similar(residue, offsets, rows):
                _join_pairs(group, left, right)
    return np.unique(group, return_inverse=True)[1]


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
            f"{len(groups)} chains form {count} group(s) of similar sequences; splitting them "
            f"into {', '.join(SPLITS)} needs {len(SPLITS)}: add other structures"
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


def _first_equal(residue: np.ndarray, offsets: np.ndarray) -> Int[np.ndarray, " chains"]:
    """The first chain of each chain's sequence; a sequence without a known residue has no equal."""
    hashes = np.zeros(len(offsets) - 1, np.uint64)
    for chain in range(len(hashes)):
        codes = residue[offsets[chain] : offsets[chain + 1]]
        known = bool((codes < len(RESIDUES)).any())
        text = codes.tobytes() if known else f"chain {chain}".encode()
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
        self.chains = chains
        owner, kmer = _kmers(residue, offsets, chains)
        self.sizes = np.bincount(owner, minlength=len(chains))
        self.owner = owner[np.argsort(kmer, kind="stable")].astype(np.int64)
        self.start = np.concatenate([[0], np.cumsum(np.bincount(kmer, minlength=KINDS))])

    def similar(
        self, residue: np.ndarray, offsets: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of similar chains, one of `rows` and one of these, each pair once."""
        owner, kmer = _kmers(residue, offsets, rows)
        sizes = np.bincount(owner, minlength=len(rows))
        hits = self.start[kmer + 1] - self.start[kmer]
        ends = np.cumsum(np.bincount(owner, hits, minlength=len(rows)).astype(np.int64))
        last_kmer = np.cumsum(sizes)
        row = 0
        while row < len(rows):
            done = ends[row - 1] if row else 0
            stop = max(int(np.searchsorted(ends, done + _HITS, side="right")), row + 1)
            here = slice(last_kmer[row - 1] if row else 0, last_kmer[stop - 1])
            shared = self._shared(owner[here] - row, kmer[here], hits[here], stop - row)
            smaller = np.minimum(sizes[row:stop, None], self.sizes)
            left, right = np.nonzero(shared > CONTAINMENT * smaller)
            left, right = rows[row + left], self.chains[right]
            yield left[left > right], right[left > right]
            row = stop

    def _shared(
        self, owner: np.ndarray, kmer: np.ndarray, hits: np.ndarray, rows: int
    ) -> Int[np.ndarray, "rows chains"]:
        """Number of 4-mers that each row has in common with each of these chains."""
        ends = np.cumsum(hits)
        total = int(ends[-1]) if len(ends) else 0
        place = np.repeat(self.start[kmer] - ends + hits, hits) + np.arange(total)
        pair = np.repeat(owner * len(self.chains), hits) + self.owner[place]
        counts = np.bincount(pair, minlength=rows * len(self.chains))
        return counts.reshape(rows, len(self.chains))


def _kmers(
    residue: np.ndarray, offsets: np.ndarray, chains: np.ndarray
) -> tuple[Int[np.ndarray, " kmers"], Int[np.ndarray, " kmers"]]:
    """Distinct 4-mers of each chain, none that holds an X: place of the chain in `chains`, in
    order, and the 4-mer as a number."""
    parts = []
    for place, chain in enumerate(chains):
        codes = np.asarray(residue[offsets[chain] : offsets[chain + 1]], np.int64)
        windows = len(codes) - KMER + 1
        if windows < 1:
            continue
        number = np.zeros(windows, np.int64)
        known = np.ones(windows, bool)
        for i in range(KMER):
            letter = codes[i : i + windows]
            number += letter * len(RESIDUES) ** i
            known &= letter < len(RESIDUES)
        parts.append(np.unique(number[known]) + place * KINDS)
    joined = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return joined // KINDS, joined % KINDS


def _join_pairs(group: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    new = group[left] != group[right]
    left, right = left[new], right[new]
    # One pair of chains for each pair of groups is enough.
    _, chosen = np.unique(np.stack([group[left], group[right]]), axis=1, return_index=True)
    for pair in chosen:
        _join(group, int(left[pair]), int(right[pair]))


def _join(group: np.ndarray, one: int, other: int) -> None:
    """Two chains' groups become one, under the number of its first chain."""
    a, b = group[one], group[other]
    if a != b:
        group[group == max(a, b)] = min(a, b)
