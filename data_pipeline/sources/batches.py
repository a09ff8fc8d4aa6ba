"""Chains taken together, so that what is done to each costs no call of its own."""

from collections.abc import Iterable, Iterator


def batches(entries: Iterable[tuple], residues: int, letters: int) -> Iterator[list[tuple]]:
    """Lists of entries with so many residues, and those of the last one; entry[letters] says how
    many an entry has by its length."""
    batch, count = [], 0
    for entry in entries:
        batch.append(entry)
        count += len(entry[letters])
        if count >= residues:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch
