"""What people's structure files hold beside proteins: nothing is lost, and what cannot is named."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.chains import Notes, bonded
from data_pipeline.errors import SourceError, StructureError
from data_pipeline.sources.structures import StructureSource, read_chains
from tests.unit.data_pipeline.test_structures import line, residue

NAMES = ["ALA", "GLY", "TRP", "LYS", "SER", "VAL", "MET", "PHE", "CYS", "HIS"]
LETTERS = "AGWKSVMFCH"


def run(first: int, count: int, place: float | None = None, **more) -> str:
    """Residues of one bonded chain; their places follow from their numbers, if none is given."""
    start = 3 * first if place is None else place
    return "".join(
        residue(NAMES[n % 10], n, start + 3 * (n - first), **more)
        for n in range(first, first + count)
    )


def letters(first: int, count: int) -> str:
    return "".join(LETTERS[n % 10] for n in range(first, first + count))


def water(count: int, number: int = 900, name: str = "HOH", record: str = "HETATM") -> str:
    return "".join(line("O", name, number + n, 300 + n, record=record) for n in range(count))


def cif(text: str, drop: tuple[str, ...] = (), block: str = "one") -> str:
    """PDB records as mmCIF, without some of its columns."""
    columns = [
        *("group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id", "label_comp_id"),
        *("label_asym_id", "label_entity_id", "label_seq_id", "Cartn_x", "Cartn_y", "Cartn_z"),
        *("occupancy", "auth_seq_id", "auth_asym_id", "pdbx_PDB_model_num"),
    ]
    rows = []
    model = "1"
    for record in text.splitlines():
        if record.startswith("MODEL"):
            model = record.split()[1]
        elif record.startswith(("ATOM", "HETATM")):
            atom, number = record[12:16].strip(), record[22:26].strip()
            sequence = number if record.startswith("ATOM") else "."
            x, y, z = record[30:38].strip(), record[38:46].strip(), record[46:54].strip()
            rows.append([record[:6].strip(), str(len(rows) + 1), atom[0], atom, ".",
                         record[17:20], record[21], "1", sequence, x, y, z, "1.0", number,
                         record[21], model])  # fmt: skip
    kept = [i for i, column in enumerate(columns) if column not in drop]
    header = "".join(f"_atom_site.{columns[i]}\n" for i in kept)
    return f"data_{block}\nloop_\n{header}" + "".join(
        " ".join(row[i] for i in kept) + "\n" for row in rows
    )


def put(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def amino_acids(text: str, every: bool) -> int:
    """Places with an alpha carbon in the models that are read; all of these files' have one."""
    models = [m for m in re.split(r"^(?:END|MODEL).*$", text, flags=re.MULTILINE) if "CA" in m]
    atoms = re.findall(r"^(?:ATOM|HETATM).* CA [^B]", "".join(models if every else models[:1]),
                       re.MULTILINE)  # fmt: skip
    return len(atoms)


def chains_of(folder: Path, text: str | bytes, name: str = "m.pdb", **reading):
    """The chains and notes of a file; every amino acid in it is in one of them."""
    notes = Notes()
    chains = read_chains(put(folder, name, text), notes, **reading)
    if isinstance(text, str):
        counted = amino_acids(text, every=bool(reading) or name.endswith("1"))
        assert sum(len(c.sequence) for c in chains) + notes.residues.total() == counted
    return chains, notes


@pytest.mark.parametrize("chain", [" A", "  "])
def test_a_ter_in_a_chain_is_a_break_and_ends_nothing(tmp_path, chain):
    """At a gap, and between bonded residues too."""
    for place in (60.0, 30.0):
        text = run(1, 9, 3.0, chain=chain) + "TER\n" + run(10, 20, place, chain=chain) + "TER\n"
        (made,), notes = chains_of(tmp_path, text + "END\n")
        assert made.sequence == letters(1, 29) and np.flatnonzero(made.breaks).tolist() == [9]
        assert not notes and made.id == ("m/A" if chain.strip() else "m/_")


@pytest.mark.parametrize("name", ["HOH", "SOL", "POP", "CLA", "XYZ"])
@pytest.mark.parametrize("record", ["ATOM", "HETATM"])
def test_residues_stay_whatever_stands_around_them(tmp_path, name, record):
    """Water, ions, lipids and unknown names before, between and behind, more than the protein."""
    other = water(50, 500, name, record)
    text = other + run(1, 9) + other.replace(" A 5", " A 6") + run(10, 20) + other.replace(
        " A 5", " A 7"
    )  # fmt: skip
    (made,), notes = chains_of(tmp_path, text)
    assert made.sequence == letters(1, 29) and not made.breaks.any() and not notes.residues


def test_modified_residues_and_ligands_are_told_by_bonds(tmp_path):
    """HETATM stays if it is bonded or named by SEQRES, where its number says; else a ligand."""
    whole = run(1, 9) + residue("MSE", 10, 30, record="HETATM") + run(11, 9)
    late = run(1, 9) + run(11, 9) + "TER\n" + residue("MSE", 10, 30, record="HETATM")
    ligand = residue("GLU", 90, 200, record="HETATM") + residue("MSE", 91, 220, record="HETATM")
    for text in (whole, late):
        (made,), notes = chains_of(tmp_path, text + water(3) + ligand)
        assert made.sequence == letters(1, 9) + "M" + letters(11, 9) and not made.breaks.any()
        assert notes["amino acids that are ligands"] == ["m/A/GLU 90", "m/A/MSE 91"]
        assert notes.residues == {"amino acids that are ligands": 2}
    apart = run(1, 8) + run(12, 8) + "TER\n" + residue("MSE", 10, 30, record="HETATM")
    (made,), notes = chains_of(tmp_path, apart)
    assert len(made.sequence) == 16 and notes.residues.total() == 1
    (made,), notes = chains_of(tmp_path, "SEQRES   1 A    3  ALA MSE GLY\n" + apart)
    assert made.sequence == letters(1, 8) + "M" + letters(12, 8) and not notes.residues
    (made,), notes = chains_of(tmp_path, cif(whole + ligand), "m.cif")
    assert made.sequence[9] == "M" and notes.residues.total() == 2


def test_numbers_that_begin_anew_are_blank_or_stars_merge_nothing(tmp_path):
    """Two molecules of one chain are two samples; bonded residues are one, whatever the numbers."""
    for between in ("TER\n", ""):
        two, notes = chains_of(tmp_path, run(1, 20) + between + run(1, 20, 200))
        assert [c.id for c in two] == ["m/A", "m/A-2"] and not notes
        assert [c.sequence for c in two] == [letters(1, 20)] * 2
        assert not any(c.breaks.any() for c in two)
    (made,), _ = chains_of(tmp_path, run(1, 20) + run(1, 20, 63))
    assert made.sequence == letters(1, 20) * 2 and not made.breaks.any()
    for number in ("****", "    "):
        same = "".join(residue("ALA", number, 3 * n) for n in range(20))
        (made,), notes = chains_of(tmp_path, same)
        assert made.sequence == "A" * 20 and not made.breaks.any() and not notes
    (made,), _ = chains_of(tmp_path, run(1, 20) + run(20, 10, 200))
    assert made.sequence == letters(1, 20) + letters(20, 10) and made.breaks.sum() == 1
    put(tmp_path, "store/m.pdb", run(1, 30) + "TER\n" + run(1, 30, 200))
    notes = Notes()
    (kept,) = StructureSource(tmp_path / "store").chains(notes)
    assert notes == {"copies of another chain's sequence": ["m/A-2 = m/A"]}
    assert kept.id == "m/A" and notes.residues.total() == 30


def test_alternatives_listed_apart_are_one_residue(tmp_path):
    """By their location, or as atoms that are not there yet; the count is of places."""
    other = residue("SER", 5, 15.4, alt="B", occupancy=0.3)
    text = run(1, 4) + residue("SER", 5, 15, alt="A", occupancy=0.7) + run(6, 4)
    (made,), _ = chains_of(tmp_path, text + other)
    assert made.sequence == letters(1, 4) + "S" + letters(6, 4)
    np.testing.assert_allclose(made.xyz[4, 0, 0], 1.2 * 15, atol=1e-3)
    parts = run(1, 9, atoms=("N", "CA")) + run(1, 9, 5.0, atoms=("C", "O"))
    (made,), _ = chains_of(tmp_path, parts)
    assert made.sequence == letters(1, 9) and made.complete.all()


def test_one_name_in_several_files_is_told_apart(tmp_path):
    """Ids are unique: folders always, suffixes where two files share the rest."""
    sequences = {"a.pdb": 1, "a.cif": 2, "a.pdb.gz": 3, "sub/a.pdb": 4, "b.PDB": 5, "c.ent.GZ": 6,
                 "d.pdb1": 7}  # fmt: skip
    for name, first in sequences.items():
        text = run(first, 30)
        text = cif(text) if name.endswith("cif") else text
        put(tmp_path, name, gzip.compress(text.encode()) if name[-2:] in ("gz", "GZ") else text)
    put(tmp_path, "notes.txt", "mine")
    put(tmp_path, "e.cif.bak", "old")
    notes = Notes()
    ids = {chain.id: chain.sequence for chain in StructureSource(tmp_path).chains(notes)}
    assert ids == {
        "a.pdb/A": letters(1, 30), "a.cif/A": letters(2, 30), "a.pdb.gz/A": letters(3, 30),
        "sub/a/A": letters(4, 30), "b/A": letters(5, 30), "c/A": letters(6, 30),
        "d/A": letters(7, 30),
    }  # fmt: skip
    assert notes == {"files of other kinds": ["e.cif.bak", "notes.txt"]}


def test_files_of_other_days_and_programs_are_read(tmp_path):
    """Before 1996; four-letter names; byte-order marks; frames behind END; copies in models."""
    old = "".join(f"{text[:66]}      9ZZZ{n:4d}\n" for n, text in enumerate(run(1, 9).splitlines()))
    assert chains_of(tmp_path, old)[0][0].sequence == letters(1, 9)
    assert chains_of(tmp_path, old.replace(" A ", "   "))[0][0].id == "m/_"
    for chain in ("A", " "):
        text = run(1, 9, chain=" " + chain)
        for name, four in (("LYS", "LYSH"), ("CYS", "CYS2"), ("ALA", "NALA"), ("HIS", "HISB")):
            text = text.replace(f"{name}  {chain}", f"{four} {chain}").replace(
                f"{four} {chain}", f"{four}{chain}"
            )  # fmt: skip
        (made,), notes = chains_of(tmp_path, text)
        assert made.sequence == letters(1, 9) and not notes, text
    (made,), _ = chains_of(tmp_path, run(1, 9, chain="HA"))  # LYS of chain HA is no LYSH
    assert made.id == "m/HA" and made.sequence == letters(1, 9)
    for coding in ("utf-8-sig", "utf-16"):
        for text, name in ((run(1, 9), "m.pdb"), (cif(run(1, 9)), "m.cif")):
            assert chains_of(tmp_path, text.encode(coding), name)[0][0].sequence == letters(1, 9)
    frames = (run(1, 9) + "END\n") * 3
    assert len(chains_of(tmp_path, frames)[0]) == 1
    every, _ = chains_of(tmp_path, frames, models="all")
    assert [c.id for c in every] == ["m/A/model-1", "m/A/model-2", "m/A/model-3"]
    copies = "".join(f"MODEL {n}\n{run(1, 9)}ENDMDL\n" for n in (1, 2))
    whole, notes = chains_of(tmp_path, copies, "m.pdb1")
    assert [c.id for c in whole] == ["m/A", "m/A-2"] and not notes
    (whole,), _ = chains_of(tmp_path, copies, "m.pdb1", assembly="deposited")
    assert whole.sequence == letters(1, 9) * 2 and whole.breaks.sum() == 1


def test_mmcif_needs_only_what_is_needed(tmp_path):
    """Atoms in any block, without locations or elements; what lacks is named with its block."""
    text = run(1, 9)
    for drop in ("label_alt_id", "type_symbol", "occupancy", "auth_asym_id", "label_entity_id"):
        (made,), _ = chains_of(tmp_path, cif(text, (drop,)), "m.cif")
        assert made.sequence == letters(1, 9), drop
    (made,), _ = chains_of(tmp_path, "data_meta\n_x.y z\n" + cif(text), "m.cif")
    assert made.sequence == letters(1, 9)
    faults = {
        "": "is empty",
        cif(text, ("Cartn_y",)): r"block one has no column _atom_site\.Cartn_y",
        cif(text, ("label_comp_id",)): r"block one has no column _atom_site\.label_comp_id",
        cif(text) + cif(text, block="two"): r"more than one block with atoms \(one, two\)",
        "data_x\n_a.b c\n": r"no atoms in its blocks \(x\)",
        "data_x\nloop_\n_a.b\n_a.c\n1 2 3\n": "cannot be read as mmCIF",
        "whatever": "holds no atoms",
        cif(text).replace(" 1.200 ", " 1e40 ").replace(" 3.600 ", " 1e40 "): "no number below",
    }
    for content, message in faults.items():
        with pytest.raises(StructureError, match=message) as caught:
            chains_of(tmp_path, content, "m.cif")
        assert "m.cif" in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_read_is_named_or_skipped(tmp_path):
    """Damaged archives, dead links, bad numbers in a later model; folders are no files."""
    good = run(1, 30)
    packed = gzip.compress(good.encode())
    put(tmp_path, "good.pdb", good)
    put(tmp_path, "folder.pdb/inner.txt", "")
    later = f"MODEL 1\n{good}ENDMDL\nMODEL 2\n{good}ENDMDL\n"
    at = later.rindex("   3.600")
    bad = {
        "cut.pdb.gz": (packed[:60], "damaged"),
        "sum.pdb.gz": (packed[:-8] + bytes(4) + packed[-4:], "damaged"),
        "later.pdb": (later[:at] + "     nan" + later[at + 8 :], "no number"),
        "later.cif": (cif(later).replace(" 3.600 ", " ? "), "no number"),
    }
    for name, (content, message) in bad.items():
        path = put(tmp_path, name, content)
        with pytest.raises(StructureError, match=message) as caught:
            list(StructureSource(tmp_path, models="all").chains(Notes()))
        assert name in str(caught.value)
        path.unlink()
    (tmp_path / "dead.pdb").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StructureError, match=r"dead\.pdb cannot be read"):
        list(StructureSource(tmp_path, models="all").chains(Notes()))
    for name, (content, _) in bad.items():
        put(tmp_path, name, content)
    notes = Notes()
    source = StructureSource(tmp_path, skip_unreadable=True, models="all")
    assert [chain.id for chain in source.chains(notes)] == ["good/A"]
    assert sorted(notes["unreadable files"]) == sorted([*bad, "dead.pdb"])
    assert notes["files of other kinds"] == ["folder.pdb/inner.txt"]
    assert source.identity()["files"]["dead.pdb"] == "unreadable"


def test_chains_of_unknown_residues_are_no_copies_and_a_bond_has_a_length(tmp_path):
    unknown = "".join(residue("UNK", n, 3 * n) for n in range(1, 31))
    put(tmp_path, "x.pdb", unknown + "TER\n" + unknown.replace(" A ", " B "))
    chains = list(StructureSource(tmp_path).chains(Notes()))
    assert [c.sequence for c in chains] == ["X" * 30] * 2 and chains[0].cluster != chains[1].cluster
    x = np.zeros((3, 3), np.float32)
    y = np.array([[0, 0, 0], [1.3, 0, 0], [np.nan, 0, 0]], np.float32)
    assert bonded(x, y).tolist() == [False, True, False]


def test_every_amino_acid_is_read_or_left_out_by_name(tmp_path):
    """Counted from the records alone: read and left out are all there are in the models read."""
    put(tmp_path, "a.pdb", water(9) + run(1, 40) + "TER\n" + run(41, 9, 300) + water(5))
    put(tmp_path, "b.pdb", run(1, 40) + "TER\n" + run(1, 40, 300) + residue(
        "GLU", 90, 900, record="HETATM"))  # fmt: skip
    put(tmp_path, "c.cif", cif(run(3, 35) + residue("ALA", 77, 800, record="HETATM")))
    put(tmp_path, "d.pdb", f"MODEL 1\n{run(5, 33)}{run(1, 5, 300, chain=' B')}ENDMDL\n" * 2)
    put(tmp_path, "e.pdb", run(2, 31, atoms=("CA",)))
    counted = sum(amino_acids(file.read_text(), False) for file in tmp_path.iterdir())
    notes = Notes()
    read = sum(len(c.sequence) for c in StructureSource(tmp_path).chains(notes))
    assert read + notes.residues.total() == counted
    assert set(notes.residues) == {
        "amino acids that are ligands", "copies of another chain's sequence",
        "chains shorter than 30 residues", "chains with less than 90% complete residues",
    }  # fmt: skip
    with pytest.raises(SourceError, match="no usable protein chain"):
        list(StructureSource(tmp_path, min_length=500).chains(Notes()))
