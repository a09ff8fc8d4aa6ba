"""Whose chains the split never parts: groups of other programs, and MMseqs2 itself."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.chains import RESIDUES, Chain, Notes, encode
from data_pipeline.errors import OptionError, SourceError
from data_pipeline.prepare import make_source
from data_pipeline.store.build import build
from data_pipeline.store.grouping import SHARED_4MERS, GroupedSource
from data_pipeline.store.reader import Store

LENGTH = 120


class Family:
    """Six unlike sequences, of which the second is the first with 55 % of its letters replaced."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        letters = random.choice(list(RESIDUES), (6, LENGTH))
        changed = random.permutation(LENGTH)[: LENGTH * 55 // 100]
        letters[1] = letters[0]
        letters[1, changed] = random.choice(list(RESIDUES), len(changed))
        self.names = ["a b/A", "sub/b/A", "c/A/model-2", "d/A", "e/A", "f/A"]
        self.sequences = ["".join(row) for row in letters]

    def identity(self) -> dict:
        return {"kind": "made", "files": {}}

    def chains(self, notes: Notes) -> list[Chain]:
        xyz = np.zeros((LENGTH, 4, 3), np.float32)
        return [Chain(n, s, xyz) for n, s in zip(self.names, self.sequences, strict=True)]


def groups_of(folder: Path, **rule) -> tuple[list[int], dict]:
    source = GroupedSource(Family(), **rule)
    manifest = build(folder, source)
    store = Store(folder)
    return store.whole("cluster").tolist(), manifest


def test_groups_of_a_file_are_never_parted(tmp_path):
    """Under a chain's name, a FASTA's, or Foldseek's; names missing on either side are counted."""
    file = tmp_path / "clusters.tsv"
    file.write_text("a_b/A\ta_b/A\na_b/A\tb.pdb_A\nc.cif.gz_A\tc.cif.gz_A\nc.cif.gz_A d/A\nx x\n")
    clusters, manifest = groups_of(tmp_path / "store", clusters=file)
    assert clusters == [0, 0, 1, 1, 2, 3]
    assert manifest["split"].startswith(f"groups of {file}")
    assert manifest["left_out"] == {
        f"chains that {file} does not name": ["e/A", "f/A"],
        f"names in {file} that no chain has": ["x"],
    }
    _, other = groups_of(tmp_path / "plain")
    assert other["split"] == SHARED_4MERS and other["source"] != manifest["source"]
    for text, message in (("a b c\n", "line 1 has 3 columns"), ("a x\nb x\n", "in two groups")):
        file.write_text(text)
        with pytest.raises(SourceError, match=message):
            groups_of(tmp_path / "bad", clusters=file)
    with pytest.raises(OptionError, match=r"clusters=.*none\.tsv: cannot be read: No such file"):
        groups_of(tmp_path / "bad", clusters=tmp_path / "none.tsv")


@pytest.mark.mmseqs
def test_mmseqs_finds_relatives_that_shared_4mers_do_not(tmp_path):
    """Two sequences of 45 to 50 % identity: apart by default, together at max_identity=0.3."""
    first, second = (encode(s) for s in Family().sequences[:2])
    assert 0.4 < (first == second).mean() < 0.5
    apart, _ = groups_of(tmp_path / "apart")
    assert apart == [0, 1, 2, 3, 4, 5]
    together, manifest = groups_of(tmp_path / "together", max_identity=0.3)
    assert together == [0, 0, 1, 2, 3, 4] and "at 30% identity" in manifest["split"]
    assert manifest["source"]["max_identity"] == 0.3


def test_rules_that_cannot_be_are_named(tmp_path, monkeypatch):
    for value in (0.0, 1.0, 30.0):
        with pytest.raises(OptionError, match=f"max_identity={value}: must be"):
            GroupedSource(Family(), max_identity=value)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(OptionError, match="needs the program mmseqs: apt-get install mmseqs2"):
        GroupedSource(Family(), max_identity=0.3)
    with pytest.raises(OptionError, match="add official_split=false"):
        make_source("sidechainnet", clusters="x.tsv")
    with pytest.raises(OptionError, match="not both"):
        GroupedSource(Family(), Path("x.tsv"), 0.3)
    assert make_source("bundled").identity() == make_source("bundled", clusters=None).identity()
    (tmp_path / "x.tsv").write_text("a b\n")
    assert isinstance(make_source("bundled", clusters=f"{tmp_path}/x.tsv"), GroupedSource)
