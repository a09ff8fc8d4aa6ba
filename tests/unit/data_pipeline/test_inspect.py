"""What inspect prints and draws: angles that are known, paths in their order."""

import matplotlib.image
import numpy as np
import pytest

from data_pipeline.chains import encode
from data_pipeline.inspect.figures import draw_path
from data_pipeline.inspect.inspect import torsions
from data_pipeline.prepare import ensure_bundled
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
    for name, least in (("backbone.png", 0.02), ("lengths.png", 0.1), ("ramachandran.png", 0.1)):
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


def test_a_path_is_drawn_along_its_axis_and_open_at_breaks():
    """A helix lies across, as a rotation of itself; one line less at a break."""
    helix = ideal(-63, -42, 30)[:, 1]
    whole, parted = (
        draw_path(helix, np.repeat([0, last], 15), "Å", "helix").axes[0].collections
        for last in (0, 1)
    )
    assert len(whole[0].get_paths()) == 29 and len(parted[0].get_paths()) == 28
    drawn = np.asarray(whole[1].get_offsets())
    centred = helix - helix.mean(0)
    turn = np.linalg.lstsq(centred, np.c_[drawn, np.zeros(30)], rcond=None)[0]
    np.testing.assert_allclose(centred @ turn[:, :2], drawn, atol=1e-3)
    assert np.ptp(drawn[:, 0]) == pytest.approx(29 * 1.5, abs=4)  # 1.5 Å a residue
