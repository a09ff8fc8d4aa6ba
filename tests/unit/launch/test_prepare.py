"""The prepare command: what it prints, reuses and refuses."""

import gzip
import json
import re
import subprocess
import sys

import gemmi
import numpy as np
import pytest

from data_pipeline.errors import ConfigError, StoreError
from data_pipeline.store.reader import Store
from data_pipeline.stream.stream import check_lengths
from data_pipeline.tasks.registry import build_task
from launch.prepare import main


def run(capsys, *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def test_builds_reuses_verifies_and_shows(tmp_path, capsys, monkeypatch):
    """Counts, split and bond lengths are printed; the second time nothing is built."""
    store = f"store={tmp_path / 'new' / 'store'}"
    built = run(capsys, store)
    for text in (
        "115 in 96 groups",
        "25,199",
        "N-CA 1.46",
        "CA-C 1.52",
        "C-N 1.33",
        "CA-CA 3.80",
    ):
        assert text in built
    rows = {row[0]: row for row in re.findall(r"^  (\w+) +(\d+) +(\d+) +([\d,]+) ", built, re.M)}
    assert list(rows) == ["train", "validation", "test"]
    assert sum(int(row[1]) for row in rows.values()) == 115
    again = run(capsys, store)
    assert "reused" in again and built.split("\n", 1)[1] == again.split("\n", 1)[1]
    assert "verified" in run(capsys, store, "action=verify")
    address = f"store=file://{tmp_path}/new/store"
    assert "verified" in run(capsys, address, "action=verify")
    monkeypatch.chdir(tmp_path)
    assert " store.inspect/lengths.png" in run(capsys, address, "action=inspect")
    assert "its sequences are in store.fasta" in run(capsys, address, "action=fasta")
    entries = (tmp_path / "store.fasta").read_text().split(">")[1:]
    assert len(entries) == 115 and sum(len(e.split("\n")[1]) for e in entries) == 25_199
    assert entries[0].startswith("mmcif_6zu5/")


def test_structures_become_a_store_of_their_own(tmp_path, capsys):
    """Files of one folder; a changed file, or other options, is another source."""
    folder, random = tmp_path / "files", np.random.default_rng(0)
    folder.mkdir()
    for file in range(4):
        chain = gemmi.Chain("A")
        for number in range(30):
            residue = gemmi.Residue()
            residue.name = str(random.choice(["ALA", "GLY", "TRP", "LYS", "SER", "VAL"]))
            residue.seqid = gemmi.SeqId(number + 1, " ")
            for i, name in enumerate(("N", "CA", "C", "O")):
                atom = gemmi.Atom()
                atom.name, atom.element = name, gemmi.Element(name[0])
                atom.pos = gemmi.Position(1.4 * (3 * number + i), file, 0)
                residue.add_atom(atom)
            chain.add_residue(residue)
        structure, model = gemmi.Structure(), gemmi.Model(1)
        model.add_chain(chain)
        structure.add_model(model)
        structure.setup_entities()
        structure.write_pdb(str(folder / f"{file}.pdb"))
    arguments = ["source=structures", f"source.path={folder}", f"store={tmp_path / 'store'}"]
    (folder / "copy.PDB.gz").write_bytes(gzip.compress((folder / "0.pdb").read_bytes()))
    (folder / "short.pdb").write_text("".join((folder / "1.pdb").read_text().splitlines(True)[:9]))
    (folder / "readme.txt").write_text("mine")
    built = run(capsys, *arguments)
    assert "4 in 4 groups" in built and "1 files of other kinds (readme.txt)" in built
    assert "split by    more than 25% of the smaller sequence's 4-mers shared (about 75 %" in built
    lines = (folder / "short.pdb").read_text().count(" CA ")
    assert built.splitlines()[-1] == (
        f"  amino acids {150 + lines} in what was read = 120 stored + {30 + lines} left out "
        f"(30 in copies of another chain's sequence, {lines} in chains shorter than 30 residues)"
    )
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert sum(manifest["residues_left_out"].values()) == 30 + lines
    assert manifest["left_out"]["copies of another chain's sequence"] == ["copy/A = 0/A"]
    assert Store(tmp_path / "store").name(2) == "2/A"
    assert "reused" in run(capsys, *arguments)
    with pytest.raises(StoreError, match="differs in min_length"):
        run(capsys, *arguments, "source.min_length=20")
    with (folder / "3.pdb").open("a") as file:
        file.write("REMARK\n")
    with pytest.raises(StoreError, match="differs in files"):
        run(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["source=sidechain"], "did you mean sidechainnet.*bundled, .*structures, synthetic"),
        (["source=sidechainnet", "source.casp=13"], r"source\.casp=13: no such edition"),
        (["source=nbody", "source.particles=1"], r"^source\.particles=1: "),
        (["source=synthetic", "source.proteins=0"], r"source\.proteins=0"),
        (["source=structures", "source.path=x", "source.max_length=9"], "no chain is both"),
        (["source=structures"], r"source\.path is missing"),
        (["source.path=files"], "source=structures"),
        (
            ["source=structures", "source.path=files", "source.min_lenght=9"],
            r"source\.min_length\?",
        ),
        (["source=structures", "source.path=files", "source.min_complete=2.0"], "min_complete=2"),
        (["action=check"], "action='check'"),
        (["stroe=x"], "did you mean store"),
        (["store=memory://x"], "store=memory://x is a URL"),
        (["source.max_identity=30.0"], r"^source\.max_identity=30\.0: must be less than 1"),
        (["source.clusters=none.tsv"], r"^source\.clusters=none\.tsv: cannot be read: No such"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, arguments, message):
    """One line that says what to change."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_command_line_reports_errors_in_one_line(tmp_path):
    """As a process: exit code 2, one line, no traceback."""
    command = [sys.executable, "-m", "launch", "prepare", "action=inspect", f"store={tmp_path}/no"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.startswith("error: there is no store at") and result.stderr.count("\n") == 1
    )


def test_every_source_becomes_a_store_of_its_own_kind(tmp_path, capsys):
    """Through the command, with options of the command line; the default takes under 10 s."""
    entries = {
        f"{i}ABC_1_A": {"Sequence": sequence, "DSSP": "HET" * 12}
        for i, sequence in enumerate(
            "".join(np.random.default_rng(i).choice(list("ACDEFGHIKLMNPQRSTVWY"), 36))
            for i in range(20)
        )
    }
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(entries))
    made = [
        ("synthetic", [f"source.path={annotations}", "source.proteins=9"], "chains      9 in 9"),
        ("nbody", ["source.train_size=30", "source.held_out_size=2", "source.steps=5"], "34 in 34"),
        ("recall", ["source.train_size=30", "source.held_out_size=2"], "not of protein backbones"),
    ]
    for name, options, text in made:
        printed = run(capsys, f"source={name}", f"store={tmp_path / name}", *options)
        assert f"source      {name}" in printed and text in printed
    manifest = json.loads((tmp_path / "synthetic" / "manifest.json").read_text())
    assert manifest["source"]["kind"] == "synthetic"
    assert Store(tmp_path / "synthetic").name(0) == "synthetic/0ABC_1_A"


def test_a_chain_over_the_limit_is_named_by_training(tmp_path, capsys):
    """And left out by the option that the message leads to."""
    run(capsys, f"store={tmp_path / 'bundled'}")
    task = build_task("denoising", store=str(tmp_path / "bundled"))
    with pytest.raises(ConfigError, match=r"max_length=1000: chain \S+/\S+ has 1611 tokens; raise"):
        check_lengths(task, "train", 1000)
