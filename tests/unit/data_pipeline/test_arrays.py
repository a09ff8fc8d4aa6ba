"""A user's own arrays: the documented example trains, and every fault in them is named."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.chains import SPLITS, Notes
from data_pipeline.errors import SourceError
from data_pipeline.sources.arrays import ArraySource
from data_pipeline.store.build import build
from data_pipeline.store.reader import Store
from data_pipeline.tasks.registry import build_task
from launch.prepare import main

DOCS = Path(__file__).parents[3] / "docs" / "data.md"


def read(path: Path):
    return list(ArraySource(path).chains(Notes()))


def good() -> dict[str, Any]:
    """Four samples of three points a token, with everything that may be given."""
    random = np.random.default_rng(0)
    points = random.normal(size=(40, 3, 3))
    points[7] = points[9, 1] = np.nan
    return {
        "points": points,
        "offsets": np.array([0, 5, 12, 30, 40]),
        "vectors": random.normal(size=(40, 2, 3)).astype(np.float32),
        "scalars": random.normal(size=(40, 1)),
        "kinds": np.arange(40) % 3,
        "segments": np.repeat([7, 7, 2, 9], 10),
        "groups": np.array(["a", "a", "b", "c"]),
        "split": np.array([b"train", b"train", b"test", b"validation"]),
        "ids": np.array(["one", "two", "three", "four"]),
    }


def test_the_documented_example_becomes_a_store_and_trains(tmp_path, monkeypatch, capsys):
    """Ten lines, two commands; denoising gives the points, the kinds and differences."""
    (example,) = re.findall(r"```python\n(import numpy.*?)```", DOCS.read_text(), re.S)
    code = [x for x in example.splitlines() if x.strip() and not x.startswith(("import", ")"))]
    assert len(code) <= 10
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    prepare = re.findall(r"launch prepare (source=arrays.*)", DOCS.read_text())[0]
    main(prepare.split())
    assert "40 in 40 groups" in capsys.readouterr().out
    train = re.findall(r"launch train (task.store=stores/rna.*)", DOCS.read_text())[0]
    assert train.split() == ["task.store=stores/rna", "task.atoms=[point]"]
    task = build_task("denoising", store="stores/rna", atoms=["point"], sigma=0.1)
    given = np.load("rna.npz")
    chain = task.describe("test", 0)
    sample = task.sample("test", [0], [1], 0, task.length("test", 0))
    number = int(chain.rpartition("/")[2])
    first, last = given["offsets"][number : number + 2]
    np.testing.assert_allclose(sample.target[0].T, given["points"][first:last], rtol=1e-6)
    one_hot = sample.inputs.scalars[0, -4:].numpy()
    np.testing.assert_array_equal(one_hot.argmax(0), given["kinds"][first:last])
    assert one_hot.sum() == last - first and sample.inputs.vectors.abs().sum() > 0
    assert task.baselines("test")["identity"] == pytest.approx(1, abs=0.2)
    assert {task.size(split) > 0 for split in SPLITS} == {True}


@pytest.mark.parametrize("folder", [False, True])
def test_everything_given_is_stored(tmp_path, folder):
    """From one file or from many mapped to memory: values, names, groups, segments and splits."""
    arrays = good()
    path = tmp_path / ("data" if folder else "data.npz")
    if folder:
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    else:
        np.savez_compressed(path, **arrays)
    assert ArraySource(path).atoms == ("point0", "point1", "point2")
    manifest = build(tmp_path / "store", ArraySource(path))
    assert manifest["counts"]["missing atoms"] == 4 and not manifest["bonds"]
    store = Store(tmp_path / "store")
    assert [store.name(i) for i in range(4)] == ["one", "two", "three", "four"]
    assert store.chains("train").tolist() == [0, 1] and store.chains("test").tolist() == [2]
    for i, (first, last) in enumerate(((0, 5), (5, 12), (12, 30), (30, 40))):
        for name, wanted in (("xyz", arrays["points"]), ("vectors", arrays["vectors"])):
            found = store.read(name, i, 0, last - first)
            np.testing.assert_array_equal(found, wanted[first:last].astype(np.float32))
        scalars = store.read("scalars", i, 0, last - first)
        np.testing.assert_array_equal(scalars[:, 0], arrays["scalars"][first:last, 0].astype("f4"))
        np.testing.assert_array_equal(scalars[:, 1:].argmax(1), arrays["kinds"][first:last])
    assert store.read("segment", 2, 0, 18).tolist() == [0] * 8 + [1] * 10


def test_points_and_offsets_are_enough(tmp_path):
    """Named by the file; frames of a group stay together where no split is given."""
    np.savez(tmp_path / "walk.npz", points=np.ones((9, 3)), offsets=np.array([0, 9]))
    (chain,) = read(tmp_path / "walk.npz")
    assert chain.id == "walk/0" and chain.xyz.shape == (9, 1, 3) and chain.cluster == "walk/0"
    frames: dict[str, Any] = good() | {"groups": np.arange(40) // 4, "offsets": np.arange(41)}
    del frames["split"], frames["ids"], frames["points"]
    np.savez(tmp_path / "frames.npz", points=np.ones((40, 3)), **frames)
    build(tmp_path / "store", ArraySource(tmp_path / "frames.npz"))
    store = Store(tmp_path / "store")
    for split in SPLITS:
        assert len(store.chains(split)) % 4 == 0 < len(store.chains(split))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"points": None}, "there is no array points; it has offsets"),
        ({"offsets": None}, "there is no array offsets; it has "),
        ({"velocity": np.zeros((40, 3))}, "there is an array velocity; known ones are points"),
        ({"points": np.zeros((40, 2))}, "last axis must be x, y, z"),
        ({"points": np.zeros(40)}, r"points is float64 of shape \(40,\)"),
        ({"points": np.zeros((40, 3), int)}, "points is int64"),
        ({"vectors": np.zeros((39, 1, 3))}, "vectors has 39 rows, but there are 40 tokens"),
        ({"groups": np.arange(3)}, "groups has 3 rows, but there are 4 samples"),
        ({"offsets": np.array([0, 5, 5, 30, 40])}, "offsets must rise from 0 to the 40 tokens"),
        ({"offsets": np.array([0, 5, 12, 30, 39])}, "offsets must rise from 0 to the 40 tokens"),
        ({"kinds": np.arange(40) - 1}, r"kinds must lie in 0 ... 255, not -1 ... 38"),
        ({"split": np.array(["train", "valid", "test", "test"])}, "split holds 'valid'"),
        ({"ids": np.array(["a", "b", "a", "c"])}, "ids holds a name twice"),
        ({"scalars": np.full((40, 1), np.nan)}, r"scalars of sample one, token 0, .*nan"),
        ({"points": np.full((40, 3), [0, np.nan, 0])}, "points of sample one, token 0, .*nan"),
        ({"points": np.full((40, 3), 1e300)}, "points of sample one, token 0, .*inf"),
        ({"points": np.full((40, 3), np.nan)}, "sample one has no point that is not NaN"),
        ({"kinds": np.array([{}] * 40)}, "cannot read path=.*allow_pickle=False"),
    ],
)
def test_faults_are_named(tmp_path, change, message):
    """The array, what it has and what it needs, in one line."""
    arrays = {name: array for name, array in (good() | change).items() if array is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(SourceError, match=message) as caught:
        read(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none_are_named(tmp_path):
    """Missing, not a zip, half of one, one array alone."""
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "whole.npz", **good())
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("none.npz", "text.npz", "half.npz", "one.npy"):
        with pytest.raises(SourceError, match=rf"cannot read path=.*{name}: ") as caught:
            ArraySource(tmp_path / name).identity()
        assert "give an .npz file" in str(caught.value) and "\n" not in str(caught.value)
