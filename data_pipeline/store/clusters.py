"""Groups of similar sequences, and the split that never parts a group.

Copies in train and test leak; so chains are grouped by shared 4-mers, which finds sequences of
about 75 % identity and more, and groups are dealt out whole. `grouping` has rules that see farther.
The result follows from the sequences alone, on every machine.

Sequences come as one flat array of residue numbers (20 unknown) and offsets.
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


def cluster(
    residue: UInt8[np.ndarray, " residues"],
    offsets: Int[np.ndarray, " ends"],
    keys: Sequence[str | None] = (),
) -> Int[np.ndarray, " chains"]:
    """Group number of each sequence: single linkage over 4-mer containment above 0.25.

    Equal sequences are together. A chain with a key is in the group of that key, whatever its
    sequence. Groups are numbered in the order of their first member. The time grows with the
    square of the number of sequences; memory is some 20 bytes a residue.
    """
    first = _first_equal(residue, offsets, keys)
    compared = first == np.arange(len(first))
    compared[[number for number, key in enumerate(keys) if key is not None]] = False
    chains = np.flatnonzero(compared)
    sets = [_kmers(residue[offsets[chain] : offsets[chain + 1]]) for chain in chains]
    sizes = np.array([len(kmers) for kmers in sets], np.int64)
    kmer = np.concatenate([np.zeros(0, np.int32), *sets])
    # Which chains hold each 4-mer: a run of `holder` for each, of `count`, that ends at `end`.
    holder = np.repeat(np.arange(len(chains), dtype=np.int32), sizes)
    holder = holder[np.argsort(kmer, kind="stable")]
    count = np.bincount(kmer, minlength=KINDS)
    end = np.cumsum(count)
    group = np.arange(len(first))
    for chain, kmers in zip(chains, sets, strict=True):
        # The places of all holders of all its 4-mers, run after run.
        held = count[kmers]
        place = np.repeat(end[kmers] - np.cumsum(held), held) + np.arange(held.sum())
        shared = np.bincount(holder[place], minlength=len(chains))
        similar = shared > CONTAINMENT * np.minimum(sizes, len(kmers))
        join(group, int(chain), chains[similar])
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
    first, seen = np.arange(len(offsets) - 1), {}
    for chain in range(len(first)):
        codes = residue[offsets[chain] : offsets[chain + 1]]
        name = chain
        if keys and keys[chain] is not None:
            name = keys[chain]
        elif (codes < len(RESIDUES)).any():
            name = hashlib.blake2b(codes.tobytes(), digest_size=16).digest()
        first[chain] = seen.setdefault(name, chain)
    return first


def _kmers(codes: UInt8[np.ndarray, " length"]) -> Int[np.ndarray, " kmers"]:
    """Distinct 4-mers of a sequence as numbers; none that holds an X."""
    if len(codes) < KMER:
        return np.zeros(0, np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(codes, KMER)
    known = windows[windows.max(1) < len(RESIDUES)]
    return np.unique(known @ len(RESIDUES) ** np.arange(KMER, dtype=np.int32))


def join(group: np.ndarray, one: int, others: np.ndarray) -> None:
    """The chains' groups become one, under the number of its first chain."""
    numbers = np.unique(np.append(group[others], group[one]))
    if len(numbers) > 1:
        group[np.isin(group, numbers)] = numbers[0]
