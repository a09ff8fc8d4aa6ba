"""Synthetic backbones: a protein's bonds, angles and torsions, from the seed and entry alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.chains import RESIDUES, Notes, bond_lengths, impossible
from data_pipeline.errors import ConfigError, SourceError
from data_pipeline.inspect.inspect import dihedrals, torsions
from data_pipeline.sources.synthetic import CLASSES, SyntheticSource, backbones, grow

random = np.random.default_rng(0)


def entry(name: str, length: int, classes: str = CLASSES) -> tuple[str, str, str]:
    sequence = "".join(random.choice(list(RESIDUES + "X"), length))
    return name, sequence, "".join(random.choice(list(classes), length))


def test_torsions_put_in_come_out():
    """phi, psi and omega, bonds and angles of chains of several lengths grown together."""
    lengths = np.array([9, 1, 40, 40, 2, 17])
    asked = random.uniform(-np.pi, np.pi, (lengths.sum(), 3))
    xyz = backbones(asked, lengths)
    degrees = np.degrees(asked)
    for first, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        n, ca, c, o = xyz[first : first + length].swapaxes(0, 1)
        phi, psi, omega = degrees[first : first + length].T
        for found, wanted in (
            (dihedrals(c[:-1], n[1:], ca[1:], c[1:]), phi[1:]),
            (dihedrals(n[:-1], ca[:-1], c[:-1], n[1:]), psi[:-1]),
            (dihedrals(ca[:-1], c[:-1], n[1:], ca[1:]), omega[:-1]),
            (dihedrals(n, ca, c, o), psi + 180),
        ):
            np.testing.assert_allclose((found - wanted + 180) % 360, 180, atol=1e-6)
        for a, b, wanted in ((n, ca, 1.459), (ca, c, 1.525), (c[:-1], n[1:], 1.336), (c, o, 1.229)):
            np.testing.assert_allclose(np.linalg.norm(a - b, axis=-1), wanted, atol=1e-9)
        for a, b, d, wanted in (
            (n, ca, c, 111.0), (ca[:-1], c[:-1], n[1:], 117.2), (c[:-1], n[1:], ca[1:], 121.7),
            (ca, c, o, 120.1),
        ):  # fmt: skip
            cosine = ((a - b) * (d - b)).sum(-1)
            cosine /= np.linalg.norm(a - b, axis=-1) * np.linalg.norm(d - b, axis=-1)
            np.testing.assert_allclose(np.degrees(np.arccos(cosine)), wanted, atol=1e-5)
        np.testing.assert_allclose(ca.mean(0), 0, atol=1e-9)


def test_chains_follow_from_seed_and_entry():
    """Whatever is grown beside them; every class has its region of the Ramachandran plot."""
    entries = [entry(str(i), 30 + 7 * i) for i in range(12)]
    together = {c.id: c for c in grow(entries, seed=1)}
    for one in entries[::5]:
        (alone,) = grow([one], seed=1)
        assert alone.id == f"synthetic/{one[0]}"
        np.testing.assert_allclose(alone.xyz, together[alone.id].xyz, atol=1e-4)
        (other,) = grow([one], seed=2)
        assert np.abs(other.xyz - alone.xyz).max() > 1
    for classes, low, high in (("H", (-90, -70), (-35, -15)), ("E", (-180, 80), (-20, 200))):
        name, _, dssp = entry("x", 900, classes)
        (chain,) = grow([(name, "A" * 900, dssp)], seed=0)
        assert not impossible(chain.xyz).any() and not chain.breaks.any()
        numbers = np.zeros(900, np.uint8), np.zeros(900, np.int64)
        angles = torsions(chain.xyz, *numbers)["General"] % 360
        turned = (angles - low) % 360 < np.subtract(high, low)
        assert turned.all(1).mean() > 0.98, classes
    assert bond_lengths(together.values())["CA-CA"][0] == pytest.approx(3.80, abs=0.03)


def test_source_reads_annotations(tmp_path, monkeypatch):
    """The first of each sequence, as many as asked; the package is found but not imported."""
    entries = [entry(f"{i}XYZ", 40 + i) for i in range(5)]
    entries.insert(2, ("copy", *entries[0][1:]))
    table = {name: {"Sequence": seq, "DSSP": dssp} for name, seq, dssp in entries}
    package = tmp_path / "sidechainnet" / "resources"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    file = package / "full_protein_dssp_annotations.json"
    file.write_text(json.dumps(table))
    monkeypatch.syspath_prepend(str(tmp_path))
    notes = Notes()
    chains = list(SyntheticSource(proteins=4).chains(notes))
    assert [c.id for c in chains] == [f"synthetic/{i}XYZ" for i in range(3)]
    assert notes == {"copies of another entry's sequence": ["copy"]}
    assert [c.sequence for c in SyntheticSource(file).chains(notes)] == [
        sequence for name, sequence, _ in entries if name != "copy"
    ]
    identity = SyntheticSource(file).identity()
    assert identity["kind"] == "synthetic" and list(identity["files"]) == [file.name]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is no JSON"),
        ("[]", "must map ids"),
        ('{"a": {"Sequence": "AAA"}}', "entry a has no Sequence and DSSP"),
        ('{"a": {"Sequence": 5, "DSSP": "H"}}', "entry a has no Sequence and DSSP"),
        ('{"a": {"Sequence": "AAA", "DSSP": "HH"}}', "entry a: 3 residues, 2 DSSP"),
        ('{"a": {"Sequence": "AZA", "DSSP": "HHH"}}', "entry a has the letter 'Z'"),
        ('{"a": {"Sequence": "AAA", "DSSP": "HQH"}}', "entry a has the letter 'Q'"),
        ('{"a": {"Sequence": "AAA", "DSSP": "HHH"}}', "no usable protein chain: 1 chains shorter"),
    ],
)
def test_bad_annotations_are_named(tmp_path, text, message):
    """The file or entry, in one line."""
    path = tmp_path / "annotations.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        list(SyntheticSource(path).chains(Notes()))
    assert "\n" not in str(caught.value) and "annotations.json" in str(caught.value)


def test_missing_files_and_packages_are_named(tmp_path, monkeypatch):
    """What to install, or which path is wrong."""
    with pytest.raises(SourceError, match=r"cannot read .*none\.json: No such file"):
        SyntheticSource(tmp_path / "none.json").identity()
    monkeypatch.setattr("data_pipeline.sources.synthetic.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps sidechainnet.* path"):
        SyntheticSource().file()
    assert isinstance(SyntheticSource(Path("x")).file(), Path)
