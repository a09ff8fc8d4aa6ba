"""N-body: the systems of EGNN and springs, the same in any slice, batch and store."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from data_pipeline.batch import Sample
from data_pipeline.chains import Notes
from data_pipeline.errors import ConfigError
from data_pipeline.prepare import ensure_bundled
from data_pipeline.store.build import build
from data_pipeline.tasks.nbody import NBody
from data_pipeline.tasks.protocol import Task
from data_pipeline.tasks.recall import Recall
from data_pipeline.tasks.registry import build_task
from data_pipeline.tasks.stored import Materialised, ProceduralSource


def same(one: Sample, other: Sample) -> None:
    for name in ("points", "vectors", "scalars", "index", "mask"):
        a, b = getattr(one.inputs, name), getattr(other.inputs, name)
        assert a.shape == b.shape and torch.equal(a, b), name
    assert torch.equal(one.target, other.target) and torch.equal(one.weight, other.weight)


def test_systems_have_the_published_statistics():
    """Motion straight on errs by 0.0748 over 1000 steps from the start and by 0.110 from EGNN's
    frame 30, as measured on EGNN's own generator."""
    task = NBody(held_out_size=600)
    assert task.baselines("validation")["straight on"] == pytest.approx(0.0748, abs=0.012)
    sample = task.sample("test", range(100), [0] * 100, 0, 5)
    speed = sample.inputs.vectors[:, 0].norm(dim=1)
    torch.testing.assert_close(speed, torch.full_like(speed, 0.5))
    assert sample.inputs.points.std() == pytest.approx(1, abs=0.1)
    assert sample.inputs.scalars.unique().tolist() == [-1, 1]
    later = NBody(held_out_size=150, start=3100).baselines("test")["straight on"]
    assert later == pytest.approx(0.110, abs=0.035)


@pytest.mark.parametrize("options", [{}, {"spring": 10.0, "strength": 0.0, "particles": 9}])
def test_motion_keeps_energy_and_momentum(options):
    """Newton's third law, and energy, where forces are not cut off: in nearly every system."""
    task = NBody(steps=300, held_out_size=50, **options)
    one, two = (
        NBody(steps=300, start=start, held_out_size=50, **options).sample(
            "test", range(50), [0] * 50, 0, task.particles
        ).inputs
        for start in (1, 301)
    )  # fmt: skip
    drift = (one.vectors.sum(-1) - two.vectors.sum(-1)).abs().amax((1, 2))
    assert (drift < 1e-4).float().mean() > 0.9

    def energy(inputs) -> torch.Tensor:
        x, charge = inputs.points.double(), inputs.scalars[:, 0].double()
        total = 0.5 * inputs.vectors.double().square().sum((1, 2, 3))
        if task.strength:
            apart = (x[..., None] - x[..., None, :]).norm(dim=1)
            i, j = torch.triu_indices(task.particles, task.particles, 1)
            total += (charge[:, i] * charge[:, j] / apart[:, i, j]).sum(1)
        if task.spring:
            total += 0.5 * task.spring * ((x.diff(dim=-1).norm(dim=1) - 1) ** 2).sum(1)
        return total

    change = (energy(two) - energy(one)).abs()
    assert change.median() < 0.02 * energy(one).abs().median()


def test_slices_tile_and_order_is_augmented_in_training():
    """Any cut gives the same tokens; a gas is shuffled by the key, as a set it stays."""
    for task in (NBody(7, steps=20), NBody(7, steps=20, spring=5.0)):
        assert isinstance(task, Task)
        whole = task.sample("train", [5, None, 9], [1, 0, 2], 0, 8)
        assert whole.inputs.mask.sum(1).tolist() == [7, 0, 7]
        assert whole.weight.sum() == 14 and not whole.target[1].any()
        for ranks in (2, 3, 8):
            cuts = [8 * r // ranks for r in range(ranks + 1)]
            parts = [task.sample("train", [5, None, 9], [1, 0, 2], a, b) for a, b in pairwise(cuts)]
            for name in ("points", "vectors", "scalars", "mask", "index"):
                joined = torch.cat([getattr(p.inputs, name) for p in parts], -1)
                assert torch.equal(joined, getattr(whole.inputs, name)), name
            assert torch.equal(torch.cat([p.target for p in parts], -1), whole.target)
        fresh = type(task)(7, steps=20, spring=task.spring)
        same(fresh.sample("train", [5], [1], 0, 7), task.sample("train", [5], [1], 0, 7))
        one, other = (task.sample("train", [5], [key], 0, 7).inputs.points[0] for key in (1, 3))
        assert torch.equal(one, other) == bool(task.spring)
        assert torch.equal(one.sort(-1).values, other.sort(-1).values)
        one, other = (task.sample(s, [5], [1], 0, 7).inputs.points for s in ("test", "validation"))
        assert not torch.allclose(one, other)


def test_training_turns_whole_systems_where_that_is_asked_for():
    """A spring's system keeps its lengths and angles between positions, velocities and target."""

    def moving(task: NBody, split: str, key: int) -> torch.Tensor:
        sample = task.sample(split, [5], [key], 0, 7)
        return torch.cat(
            [sample.inputs.points[0], sample.inputs.vectors[0, 0], sample.target[0]], 1
        )

    plain, turned = (NBody(7, steps=20, spring=5.0, turned=turned) for turned in (False, True))
    still, first, second = moving(plain, "train", 1), *(moving(turned, "train", k) for k in (1, 2))
    assert not torch.allclose(still, first, atol=0.1)
    assert not torch.allclose(first, second, atol=0.1)
    for each in (first, second):
        torch.testing.assert_close(each.T @ each, still.T @ still, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.linalg.det(each[:, :3]), torch.linalg.det(still[:, :3]))
    assert torch.equal(moving(plain, "test", 1), moving(turned, "test", 1))
    half = turned.sample("train", [5], [1], 3, 7).target[0]
    assert torch.equal(half, moving(turned, "train", 1)[:, 14 + 3 :])


@pytest.mark.parametrize("made", [NBody(6, steps=30, spring=3.0, train_size=70, held_out_size=3),
                                  NBody(5, steps=10, train_size=5, held_out_size=3),
                                  Recall(9, train_size=65, held_out_size=2)])  # fmt: skip
def test_what_is_written_down_is_what_is_generated(tmp_path, made):
    """Per token and per sequence, whole and in slices, with empty rows and rows that end early."""
    manifest = build(tmp_path / "store", ProceduralSource(made))
    assert manifest["source"]["kind"] == made.name
    read = build_task("materialised", store=str(tmp_path / "store"))
    assert isinstance(read, Materialised) and isinstance(read, Task)
    from data_pipeline.counter_rng import evaluation_key

    for split in ("train", "validation", "test"):
        assert read.size(split) == made.size(split)
        items = [made.size(split) - 1, None, 0]
        keys = [0 if item is None else evaluation_key(split, item) for item in items]
        length = made.length(split, 0)
        assert read.length(split, read.longest(split)) == length
        for start, stop in ((0, length), (0, 3), (2, length + 2), (length, length + 1)):
            one, other = (t.sample(split, items, keys, start, stop) for t in (read, made))
            same(one, other)
    assert read.baselines("test") == made.baselines("test") and read.unit == made.unit
    assert read.describe("test", 1) == "test/1" and read.vectors == made.vectors


def test_bad_options_are_named(tmp_path):
    """One line with the value; a store of proteins is not taken for a generated one."""
    for options, message in (
        ({"particles": 1}, "particles=1: must be .* 2$"),
        ({"particles": 2000}, r"particles=2000: must be 1024 or less with charges"),
        (
            {"particles": 1 << 21, "strength": 0.0, "spring": 1.0},
            "particles=2097152: must be .* 1048576$",
        ),
        ({"strength": 0.0}, "strength must not both be 0"),
        ({"spring": -1.0}, "spring=-1.0: must be .* 0$"),
        ({"dt": float("nan")}, "dt=nan"),
        ({"steps": 0}, "steps=0: must be .* 1$"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_task("nbody", **options)
    ensure_bundled(tmp_path / "bundled")
    with pytest.raises(ConfigError, match="holds bundled, not samples of recall or nbody"):
        build_task("materialised", store=str(tmp_path / "bundled"))
    notes = Notes()
    chain = next(iter(ProceduralSource(NBody(3, steps=1)).chains(notes)))
    assert chain.xyz.shape == (3, 1, 3) and np.isfinite(chain.xyz).all() and not notes
