"""What inspect prints and draws: angles that are known, cartoons of helices and strands."""

import matplotlib.image
import numpy as np
import pytest

from data_pipeline.chains import Notes, encode
from data_pipeline.inspect.cartoon import quads, secondary_structure
from data_pipeline.inspect.inspect import torsions
from data_pipeline.prepare import ensure_bundled
from data_pipeline.sources.bundled import BundledSource
from data_pipeline.sources.synthetic import backbones
from launch.prepare import main

DEGREES = np.pi / 180


def ideal(phi: float, psi: float, length: int = 20) -> np.ndarray:
    """(length, 4, 3) of one conformation throughout."""
    asked = np.tile(np.array([phi, psi, 180.0]) * DEGREES, (length, 1))
    return backbones(asked, np.array([length])).astype(np.float32)


def test_inspect_prints_and_draws(tmp_path, capsys):
    """Lengths and bonds in print, three figures beside the store, of proteins and of points."""
    ensure_bundled(tmp_path / "bundled")
    main(["action=inspect", f"store={tmp_path / 'bundled'}"])
    printed = capsys.readouterr().out
    assert "N-CA 1.46" in printed and "537" in printed and "xyz (4, 3)" in printed
    folder = tmp_path / "bundled.inspect"
    assert sorted(p.name for p in folder.iterdir()) == [
        "backbone.png", "lengths.png", "ramachandran.png",
    ]  # fmt: skip
    for name, least in (("backbone.png", 0.1), ("lengths.png", 0.1), ("ramachandran.png", 0.1)):
        image = matplotlib.image.imread(folder / name)[..., :3]
        assert (image.min(-1) < 0.95).mean() > least, name  # of the figure is painted
    options = ["source.train_size=20", "source.held_out_size=2", "source.steps=5"]
    main(["source=nbody", f"store={tmp_path / 'nbody'}", *options])
    figures = tmp_path / "figures"
    main(["action=inspect", f"store={tmp_path / 'nbody'}", f"figures={figures}"])
    assert "vectors float32 (1, 3)" in capsys.readouterr().out
    assert sorted(p.name for p in figures.iterdir()) == ["backbone.png", "lengths.png"]


def test_torsions_are_sorted_by_kind_and_stop_at_breaks():
    """phi and psi of every inner residue; the residue before proline has its own plot."""
    xyz = ideal(-63, -42, 9)
    residue, segment = encode("AGAPPAGPA"), np.zeros(9, np.int64)
    found = torsions(xyz, residue, segment)
    counts = {kind: len(angles) for kind, angles in found.items()}
    assert counts == {"General": 1, "Glycine": 2, "Proline": 3, "Before proline": 1}
    for angles in found.values():
        np.testing.assert_allclose(angles, np.tile([-63, -42], (len(angles), 1)), atol=0.01)
    segment[5:] = 1  # residues 4 and 5 lose a neighbour, and missing atoms their residues
    xyz[1, 2] = np.nan
    counts = {kind: len(angles) for kind, angles in torsions(xyz, residue, segment).items()}
    assert counts == {"General": 0, "Glycine": 1, "Proline": 2, "Before proline": 0}


def test_hydrogen_bonds_show_helices_and_strands():
    """An ideal helix and an extended chain; real proteins have as much of both as is known."""
    assert (secondary_structure(ideal(-63, -42)) == 1).sum() >= 16
    assert not secondary_structure(ideal(-120, 130)).any()  # strands need partners
    share = {}
    for chain in BundledSource().chains(Notes()):
        if chain.id in ("pdb1ubi/A", "pdb3enl/A") and chain.complete.all():
            kind = secondary_structure(chain.xyz.astype(np.float64))
            share[chain.id] = [(kind == k).mean() for k in (1, 2)]
    # DSSP: ubiquitin has 12 residues of 76 in alpha helices and 22 to 25 in strands.
    helix, strand = share["pdb1ubi/A"]
    assert 0.14 < helix < 0.20 and 0.25 < strand < 0.37
    assert share["pdb3enl/A"][0] > 0.3


def test_cartoons_are_not_mirrored_and_skip_gaps():
    """A right-handed helix stays so: its front strands rise from left to right; gaps stay open."""
    helix = ideal(-63, -42, 30)
    corners, colors, ends = quads(helix, np.zeros(30, np.int64))
    assert corners.shape[1:] == (4, 2) and len(corners) == len(colors) == 2 * 29 * 8
    assert np.isfinite(corners).all() and ((colors >= 0) & (colors <= 1)).all()
    assert np.linalg.norm(ends[0] - ends[1]) == pytest.approx(29 * 1.5, abs=4)  # 1.5 Å a residue
    helix[14] = np.nan
    parted, _, _ = quads(helix, np.zeros(30, np.int64))
    assert len(parted) == 2 * (13 + 14) * 8
    middle = (ends[0] + ends[1]) / 2
    nearest = [np.linalg.norm(c.mean(1) - middle, axis=1).min() for c in (corners, parted)]
    assert nearest[0] < 2.5
