"""Denoising samples: slices tile, differences are what they say, baselines are as measured."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from data_pipeline.batch import Sample
from data_pipeline.chains import RESIDUES, Chain
from data_pipeline.errors import ConfigError, StoreError
from data_pipeline.prepare import ensure_bundled
from data_pipeline.store.build import build
from data_pipeline.store.reader import Store
from data_pipeline.tasks.denoising import Denoising


class GappySource:
    """Random walks of several lengths with missing atoms and chain breaks."""

    def identity(self):
        return {"kind": "gappy", "files": {}}

    def chains(self, notes):
        random = np.random.default_rng(0)
        chains = []
        for i, length in enumerate((33, 8, 21, 40, 60, 35, 12, 30, 30, 30)):
            sequence = "".join(random.choice(list(RESIDUES), length))
            xyz = np.cumsum(random.normal(size=(4 * length, 3)) / 3, 0).reshape(length, 4, 3)
            xyz[length // 2 :] += 9  # a gap: C-N above 2.5 Å
            xyz[3, i % 4] = np.nan
            xyz[-1, 1:3] = np.nan
            chains.append(Chain(f"{i}/A", sequence, xyz.astype(np.float32)))
        return chains


@pytest.fixture(scope="module")
def gappy(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "gappy"
    build(path, GappySource())
    return str(path)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "bundled"
    ensure_bundled(path)
    return str(path)


def join(parts: list[Sample]) -> dict[str, torch.Tensor]:
    """Every field of slices, put together along the tokens."""
    found = {name: [p.inputs.tensors[name] for p in parts] for name in parts[0].inputs.tensors}
    found |= {"target": [p.target for p in parts], "weight": [p.weight for p in parts]}
    return {name: torch.cat(tensors, -1) for name, tensors in found.items()}


@pytest.mark.parametrize("atoms", [("N", "CA", "C"), ("CA",), ("N", "CA", "C", "O")])
def test_slices_of_all_ranks_tile_the_sample(gappy, atoms):
    """Bit-equal for 1 to 8 ranks, rows of unequal length, an empty row, padding behind the end."""
    task = Denoising(gappy, atoms=atoms, neighbours=5)
    items, keys = [3, None, 0, 1], [2**63 + 5, 0, 17, 3]
    length = max(task.length("train", i) for i in items if i is not None) + 3
    whole = join([task.sample("train", items, keys, 0, length)])
    for ranks in (2, 3, 4, 8, length + 2):
        cuts = [length * r // ranks for r in range(ranks + 1)]
        parts = [task.sample("train", items, keys, a, b) for a, b in pairwise(cuts)]
        for name, joined in join(parts).items():
            torch.testing.assert_close(joined, whole[name], rtol=0, atol=0, msg=f"{ranks} {name}")
    # A row is what it is alone, whatever shares its batch.
    alone = join([task.sample("train", [0], [17], 0, length)])
    for name, field in alone.items():
        torch.testing.assert_close(field[0], whole[name][2], rtol=0, atol=0, msg=name)


def test_inputs_follow_from_the_store_and_the_noise(gappy):
    """Against a plain loop: positions, differences, one-hot types, masks, segments."""
    task, store = Denoising(gappy, sigma=2.0, neighbours=4), Store(gappy)
    item = 2
    chain = int(store.chains("train")[item])
    length = task.length("train", item)
    sample = task.sample("train", [item], [11], 0, length)
    xyz = store.read("xyz", chain, 0, length // 3)[:, :3].reshape(-1, 3)
    segment = store.read("segment", chain, 0, length // 3).repeat(3)
    residue = store.read("residue", chain, 0, length // 3).repeat(3)
    inputs, seen = sample.inputs, np.all(np.isfinite(xyz), axis=1)
    assert 0 < (~seen).sum() < 5 and segment.max() >= 1
    np.testing.assert_array_equal(inputs.mask[0].numpy(), seen)
    np.testing.assert_array_equal(sample.weight[0].numpy(), seen)
    np.testing.assert_array_equal(sample.target[0].numpy().T[seen], xyz[seen])
    np.testing.assert_array_equal(inputs.segment[0].numpy(), segment)
    np.testing.assert_array_equal(inputs.index[0].numpy(), np.arange(length))
    np.testing.assert_array_equal(inputs.scalars[0, :21].argmax(0).numpy(), residue)
    np.testing.assert_array_equal(inputs.scalars[0, 21:24].argmax(0).numpy(), np.arange(length) % 3)
    points, zeros = inputs.points[0].numpy(), 0
    for channel, offset in enumerate([-4, -3, -2, -1, 1, 2, 3, 4]):
        for i in range(length):
            j = i + offset
            near = 0 <= j < length and seen[i] and seen[j] and segment[i] == segment[j]
            expected = points[:, j] - points[:, i] if near else np.zeros(3)
            np.testing.assert_array_equal(inputs.vectors[0, channel, :, i].numpy(), expected)
            zeros += not near
    assert zeros > 40
    for name, field in join([sample]).items():
        assert field.isfinite().all(), name


def test_noise_is_normal_and_follows_its_key(bundled):
    """Mean 0, deviation sigma, no correlation of neighbours; another key is another noise."""
    task = Denoising(bundled, sigma=0.5)
    items = list(range(20))
    length = max(task.length("train", i) for i in items)
    noises = []
    for keys in (items, [i + 1000 for i in items]):
        sample = task.sample("train", items, keys, 0, length)
        noises.append((sample.inputs.points - sample.target) / 0.5)
    seen = sample.weight.bool()[:, None].expand_as(noises[0])
    for noise in noises:
        assert abs(noise[seen].mean()) < 0.02 and abs(noise[seen].std() - 1) < 0.02
        assert abs((noise[..., 1:] * noise[..., :-1])[seen[..., 1:]].mean()) < 0.02
        assert abs((noise[:, 0] * noise[:, 1])[seen[:, 0]].mean()) < 0.02
    assert abs((noises[0] * noises[1])[seen].mean()) < 0.02


def test_baselines_are_the_measured_ones(bundled):
    """Identity 1; the best combination of the nearest two 0.41, of the nearest sixteen 0.29."""
    scores = Denoising(bundled).baselines("validation")
    assert scores["identity"] == pytest.approx(1, abs=0.02)
    assert scores["tuned local average, k=1"] == pytest.approx(0.41, abs=0.02)
    assert scores["tuned local average, k=8"] == pytest.approx(0.29, abs=0.02)
    assert Denoising(bundled).unit == 1 and Denoising(bundled, sigma=2.0).unit == 4


def test_digest_tells_samples_apart_and_options_are_checked(gappy, bundled):
    """Whatever changes a sample changes the digest; impossible options are named."""
    digests = [
        Denoising(gappy).digest,
        Denoising(bundled).digest,
        Denoising(gappy, sigma=2.0).digest,
        Denoising(gappy, atoms=("CA",)).digest,
        Denoising(gappy, neighbours=2).digest,
    ]
    assert len(set(digests)) == 5 and digests[0] == Denoising(gappy, atoms=["N", "CA", "C"]).digest
    for sigma in (0.0, -1.0, 1e-200, 1e-4, 1e4, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=rf"^sigma={sigma}: must be .* (0.001|1000)$"):
            Denoising(gappy, sigma=sigma)
    assert Denoising(gappy, sigma=1e-3).unit == pytest.approx(1e-6)
    with pytest.raises(ConfigError, match=r"^neighbours=0: must be .* 1$"):
        Denoising(gappy, neighbours=0)
    for atoms in (("CB",), (), ("CA", "CA"), ("N", "CA", "N")):
        with pytest.raises(ConfigError, match=r"^atoms=\[.*N, CA, C, O, each once"):
            Denoising(gappy, atoms=atoms)
    with pytest.raises(StoreError, match=r"prepare source=\.\.\. store="):
        Denoising(gappy + "x")
