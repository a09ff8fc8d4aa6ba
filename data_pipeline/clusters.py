"""Groups of similar sequences, and the split that never parts a group.

Homologues and copies in train and test leak; so chains are grouped by shared 4-mers and groups
are dealt out whole. The result follows from the sequences alone, on every machine.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from data_pipeline.errors import StructureError
from data_pipeline.structures import RESIDUES

SPLITS = ("train", "validation", "test")
KMER = 4
CONTAINMENT = 0.25
"""Share of the smaller set of 4-mers found in the other above which two sequences are similar."""
HELD_OUT = 0.1
"""Share of all residues in each of validation and test."""
LARGEST_HELD_OUT = 0.25
"""Largest part of a held-out split that one group may be; larger groups train."""


def cluster(sequences: Sequence[str]) -> Int[np.ndarray, " chains"]:
    """Group number of each sequence: single linkage over 4-mer containment above 0.25.

    Groups are numbered in the order of their first member.
    """
    kmers = [_kmers(sequence) for sequence in sequences]
    sizes = np.array([len(k) for k in kmers])
    owner = np.repeat(np.arange(len(sequences)), sizes)
    flat = np.concatenate(kmers)
    order = np.argsort(flat, kind="stable")
    owner, flat = owner[order], flat[order]
    group = np.arange(len(sequences))
    for i, mine in enumerate(kmers):
        if len(mine):
            first, last = np.searchsorted(flat, mine), np.searchsorted(flat, mine, side="right")
            holders = [owner[a:b] for a, b in zip(first, last, strict=True)]
            shared = np.bincount(np.concatenate(holders), minlength=len(sequences))
            similar = group[shared > CONTAINMENT * np.minimum(sizes, sizes[i])]
            group[np.isin(group, similar)] = similar.min()
    return np.unique(group, return_inverse=True)[1]


def split(
    sequences: Sequence[str], groups: Int[np.ndarray, " chains"]
) -> Int[np.ndarray, " chains"]:
    """Place in SPLITS of each sequence.

    Groups come in the order of a hash of their sequences; validation is filled first, then test,
    up to a tenth of the residues each, from groups of at most a quarter of that; the rest trains.
    Where no group is that small, the smallest ones are held out.

    Raises:
        StructureError: fewer than three groups.
    """
    count = int(groups.max()) + 1
    if count < len(SPLITS):
        raise StructureError(
            f"{len(sequences)} chains form {count} group(s) of similar sequences; splitting them "
            f"into {', '.join(SPLITS)} needs {len(SPLITS)}: add other structures"
        )
    residues = np.bincount(groups, weights=[len(s) for s in sequences])
    target = HELD_OUT * residues.sum()
    members: list[list[str]] = [[] for _ in range(count)]
    for sequence, group in sorted(zip(sequences, groups.tolist(), strict=True)):
        members[group].append(sequence)
    keys = [hashlib.sha256("\n".join(m).encode()).digest() for m in members]
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


def _kmers(sequence: str) -> Int[np.ndarray, " kmers"]:
    """Distinct 4-mers as numbers; none that holds an X."""
    letters = np.array([RESIDUES.find(letter) for letter in sequence], np.int64)
    if len(letters) < KMER:
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(letters, KMER)
    windows = windows[(windows >= 0).all(1)]
    return np.unique(windows @ (len(RESIDUES) ** np.arange(KMER)))
