"""Packed samples: every chain once, whole, in its own place; slices read what they hold."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batch import Sample
from data_pipeline.chains import RESIDUES, SPLITS, Chain
from data_pipeline.counter_rng import rotations
from data_pipeline.errors import ConfigError
from data_pipeline.store import writer
from data_pipeline.store.build import build
from data_pipeline.store.manifest import CheckedFiles
from data_pipeline.store.reader import Store
from data_pipeline.tasks.denoising import Denoising
from data_pipeline.tasks.packed import PackedBodies


class ManySource:
    """Random walks of 20 to 60 residues with gaps and missing atoms; every array tells its chain
    apart. `extra` adds vectors and scalars."""

    def __init__(self, count: int = 120, seed: int = 0, extra: bool = False):
        self.count, self.seed, self.extra = count, seed, extra

    def identity(self):
        return {"kind": "many", "files": {}, "seed": self.seed}

    def chains(self, notes):
        random = np.random.default_rng(self.seed)
        for i in range(self.count):
            length = int(random.integers(20, 60))
            sequence = "".join(random.choice(list(RESIDUES), length))
            xyz = np.cumsum(random.normal(size=(4 * length, 3)) / 3, 0).reshape(length, 4, 3)
            xyz[length // 2 :] += 9
            xyz[3, i % 4] = np.nan
            extra = {}
            if self.extra:
                extra["vectors"] = random.normal(size=(length, 2, 3)).astype(np.float32)
                extra["scalars"] = random.normal(size=(length, 3)).astype(np.float32)
            yield Chain(f"c{i}", sequence, xyz.astype(np.float32), extra=extra)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """`plain` and `extra` with chunks of 64 residues of xyz, 256 of the rest."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK", 256)
        build(folder / "plain", ManySource())
        build(folder / "extra", ManySource(40, 1, extra=True))
        build(folder / "second", ManySource(40, 2))
    return {path.name: str(path) for path in folder.iterdir()}


def join(parts: list[Sample]) -> dict[str, torch.Tensor]:
    found = {name: [p.inputs.tensors[name] for p in parts] for name in parts[0].inputs.tensors}
    found |= {"target": [p.target for p in parts], "weight": [p.weight for p in parts]}
    return {name: torch.cat(tensors, -1) for name, tensors in found.items()}


def bodies_of(sample: Sample) -> torch.Tensor:
    """The number of each token's body in the only row, which its length ends."""
    assert sample.inputs.bodies is not None
    (lengths,) = sample.inputs.bodies
    assert sample.inputs.lengths == (sum(lengths),) == (sample.length,) == (sample.tokens,)
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def test_a_sample_says_its_bodies_of_whole_rows_or_is_one(paths):
    """The same on every rank; together, nothing but that and the digest differs."""
    apart, together = (
        Denoising(paths["plain"], neighbours=2, packed_length=1500, bodies=bodies)
        for bodies in ("apart", "together")
    )
    items, keys = [1, None], [7, 0]
    length = apart.length("train", 1)
    whole, half, one = (
        task.sample("train", items, keys, start, length).inputs
        for task, start in ((apart, 0), (apart, length // 2), (together, 0))
    )
    assert whole.bodies is not None and whole.bodies == half.bodies
    assert sum(whole.bodies[0]) == length and whole.bodies[1] == () and len(whole.bodies[0]) > 5
    assert whole.lengths == half.lengths == one.lengths == (length, 0) and one.bodies is None
    for name, x in whole.tensors.items():
        assert torch.equal(x, one.tensors[name])
    assert apart.digest != together.digest
    alone = Denoising(paths["plain"]).sample("train", [0, 1], [0, 0], 0, 400).inputs
    assert alone.bodies is None and alone.lengths == tuple(
        alone.index.where(alone.mask, 0).amax(1) + 1
    )


@pytest.mark.parametrize("name", ["plain", "extra"])
def test_slices_of_packed_samples_tile(paths, name):
    """Bit-equal for any cut, beside an empty row and one that ends earlier."""
    task = Denoising(paths[name], neighbours=3, packed_length=1500)
    items, keys = [1, None, 0], [7, 0, 2**63 + 1]
    length = max(task.length("train", i) for i in items if i is not None) + 5
    whole = join([task.sample("train", items, keys, 0, length)])
    assert (whole["segment"][1] == -1).all() and (whole["segment"][:, -1] == -1).all()
    for ranks in (2, 3, 7, 50):
        cuts = [length * r // ranks for r in range(ranks + 1)]
        parts = [task.sample("train", items, keys, a, b) for a, b in pairwise(cuts)]
        for field, joined in join(parts).items():
            torch.testing.assert_close(joined, whole[field], rtol=0, atol=0, msg=f"{ranks} {field}")


@pytest.mark.parametrize(("packed_length", "copies"), [(400, 1), (1500, 1), (10**9, 1), (9000, 3)])
def test_every_chain_comes_as_often_as_asked_and_is_what_it_is_alone(paths, packed_length, copies):
    """One body a copy, of the chain's length, moved rigidly; features and gaps as in a sample of
    its own; no body of another split; items are full but for one chain."""
    packed = Denoising(
        paths["plain"], sigma=1e-3, neighbours=4, packed_length=packed_length, packed_copies=copies
    )
    alone = Denoising(paths["plain"], sigma=1e-3, neighbours=4)
    store, seen = Store(paths["plain"]), Counter()
    for split in SPLITS:
        chains = {}
        for item in range(alone.size(split)):
            length = alone.length(split, item)
            sample = alone.sample(split, [item], [0], 0, length)
            chains[sample.inputs.scalars[0, :21].numpy().tobytes()] = (item, sample)
        for item in range(packed.size(split)):
            length = packed.length(split, item)
            assert length <= packed_length
            assert item == packed.size(split) - 1 or length > packed_length - 180
            sample = packed.sample(split, [item], [item + 5], 0, length)
            segment, body = sample.inputs.segment[0], bodies_of(sample)
            assert (segment.diff() >= 0).all() and segment[0] == 0
            for number in range(int(body[-1]) + 1):
                here = body == number
                own, single = chains[sample.inputs.scalars[0, :21, here].numpy().tobytes()]
                seen[split, own] += 1
                inputs, expected = sample.inputs, single.inputs
                assert torch.equal(inputs.index[0, here], expected.index[0])
                breaks = inputs.segment[0, here].diff()
                assert torch.equal(breaks, expected.segment[0].diff()) and breaks.max() == 1
                assert torch.equal(inputs.mask[0, here], expected.mask[0])
                assert torch.equal(inputs.scalars[0][:, here], expected.scalars[0])
                valid = expected.mask[0]
                x, y = sample.target[0][:, here][:, valid], single.target[0][:, valid]
                assert_rigid(x.double(), y.double())
                zeros = (expected.vectors[0] == 0).all(1)
                assert torch.equal((inputs.vectors[0][..., here] == 0).all(1), zeros)
    assert len(seen) == len(store.lengths) and set(seen.values()) == {copies}


def test_copies_of_a_chain_have_noise_and_motion_of_their_own(paths):
    """The order is run through once and once more: a sample of half the length has every chain."""
    once = Denoising(paths["plain"], packed_length=10**6).length("test", 0)
    halves = Denoising(paths["plain"], packed_length=once, packed_copies=2)
    assert [halves.length("test", item) for item in range(halves.size("test"))] == [once, once]
    task = Denoising(paths["plain"], neighbours=1, packed_length=10**6, packed_copies=2)
    sample = task.sample("test", [0], [4], 0, task.length("test", 0))
    body, residue = bodies_of(sample), sample.inputs.scalars[0, :21]
    bodies = [body == number for number in range(int(body[-1]) + 1)]
    first = bodies[0]
    (other,) = (
        body
        for body in bodies[1:]
        if residue[:, body].shape == residue[:, first].shape
        and torch.equal(residue[:, body], residue[:, first])
    )
    valid = sample.inputs.mask[0, first]
    x, y = (sample.target[0][:, here][:, valid].double() for here in (first, other))
    assert_rigid(x, y)
    noise = sample.inputs.points - sample.target
    assert (noise[0][:, first] - noise[0][:, other])[:, valid].abs().min() > 1e-6


def assert_rigid(x: torch.Tensor, y: torch.Tensor) -> None:
    """x is a proper rotation and a shift of y, and not y itself."""
    assert (x - y).abs().max() > 1
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    u, _, v = torch.linalg.svd(x @ y.T)
    assert torch.det(u @ v) > 0
    torch.testing.assert_close(u @ v @ y, x, rtol=0, atol=1e-3)


def test_order_and_motions_follow_from_the_key(paths):
    """Another key: the same chains in another order; rotations are rotations, and uniform."""
    task = Denoising(paths["plain"], atoms=("CA",), packed_length=10**9)
    length = task.length("train", 0)
    first, again, other = (join([task.sample("train", [0], [key], 0, length)]) for key in (1, 1, 2))
    for field in first:
        torch.testing.assert_close(first[field], again[field], rtol=0, atol=0)
    residues = [sample["scalars"][0, :21].argmax(0) for sample in (first, other)]
    assert not torch.equal(*residues)
    assert torch.equal(residues[0].sort()[0], residues[1].sort()[0])
    turns = rotations(5, 0, 4000)
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1) - np.eye(3), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    assert abs(turns.mean(0)).max() < 0.05 and abs((turns**2).mean(0) - 1 / 3).max() < 0.03
    layout = PackedBodies(Store(paths["plain"]), "train", 1, None)
    assert len({tuple(layout.pieces(0, key, 0, 9).chains) for key in range(3)}) == 1


def test_vectors_and_scalars_of_the_store_are_inputs(paths):
    """Behind the task's own channels; alone as they were given, packed turned with their chain."""
    store, near = Store(paths["extra"]), 2 * 3
    task = Denoising(paths["extra"], neighbours=3, atoms=("N", "CA"))
    assert (task.vectors, task.scalars) == (near + 2, 21 + 2 + 7 + 3)
    chain = int(store.chains("train")[1])
    length = int(store.lengths[chain])
    alone = task.sample("train", [1], [0], 0, 2 * length).inputs
    given = store.read("vectors", chain, 0, length).repeat(2, axis=0)
    np.testing.assert_array_equal(alone.vectors[0, near:].permute(2, 0, 1).numpy(), given)
    given = store.read("scalars", chain, 0, length).repeat(2, axis=0)
    np.testing.assert_array_equal(alone.scalars[0, -3:].T.numpy(), given)
    task = Denoising(paths["extra"], neighbours=3, atoms=("N", "CA"), packed_length=10**6)
    packed = task.sample("train", [0], [0], 0, task.length("train", 0))
    body = (packed.inputs.scalars[0, -1] == alone.scalars[0, -1, 0]).nonzero()[0, 0]
    here = slice(int(body), int(body) + 2 * length)
    before, after = alone.vectors[0, near:], packed.inputs.vectors[0, near:, :, here]
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    assert (after - before).abs().max() > 0.1
    with pytest.raises(ConfigError, match=r"plain holds .* a mixture needs one kind"):
        Denoising([paths["extra"], paths["plain"]])


@pytest.mark.parametrize("name", ["packed", "one long chain"])
def test_a_rank_reads_its_own_part(paths, tmp_path, monkeypatch, name):
    """Bytes by a counting store: every cut costs at most one chunk an array, which both its sides
    read. So ranks read 1/sp and less than a chunk on average, and none two chunks more."""
    path = paths["plain"]
    if name != "packed":
        monkeypatch.setattr(writer, "CHUNK", 256)

        class LongSource(ManySource):
            def chains(self, notes):
                for i, chain in enumerate(super().chains(notes)):
                    split = "train" if i == 0 else SPLITS[1 + i % 2]
                    times = 60 if i == 0 else 1
                    yield Chain(
                        chain.id, chain.sequence * times, np.tile(chain.xyz, (times, 1, 1)),
                        split=split,
                    )  # fmt: skip

        path = str(tmp_path / "long")
        build(path, LongSource(5))
    read: Counter[str] = Counter()
    get = CheckedFiles.get

    async def counted(self, key, prototype, byte_range=None):
        value = await get(self, key, prototype, byte_range)
        read[key.partition("/")[0]] += len(value) if value is not None and "/c/" in key else 0
        return value

    monkeypatch.setattr(CheckedFiles, "get", counted)
    store = Store(path)
    chunk = {
        array: max(f["size"] for n, f in store.manifest["files"].items() if n.startswith(array))
        for array in ("xyz", "residue", "segment")
    }

    def cost(start: int, stop: int) -> Counter[str]:
        task = Denoising(path, neighbours=4, packed_length=10**9 if name == "packed" else None)
        read.clear()
        task.sample("train", [0], [3], start, stop)
        return Counter(read)

    task = Denoising(path, packed_length=10**9 if name == "packed" else None)
    length = task.length("train", 0)
    whole = cost(0, length)
    assert whole["xyz"] > 15 * chunk["xyz"]
    for sp in (2, 4, 8):
        ranks = [cost(length * r // sp, length * (r + 1) // sp) for r in range(sp)]
        for array, size in chunk.items():
            total = sum(rank[array] for rank in ranks)
            assert total <= whole[array] + (sp - 1) * size, (sp, array)
            assert max(rank[array] for rank in ranks) <= whole[array] / sp + 2 * size, (sp, array)


def test_chains_too_long_and_bad_mixtures_are_named(paths):
    """One line: the value and the way out."""
    longest = max(Store(paths["plain"]).lengths) * 3
    with pytest.raises(ConfigError, match=r"c\d+, has \d+ tokens; raise"):
        Denoising(paths["plain"], packed_length=100)
    assert Denoising(paths["plain"], packed_length=int(longest)).size("train") > 40
    for weights in ([1], [1, 0], [1, 2, 3]):
        with pytest.raises(
            ConfigError, match=r"weights=.* (2 numbers of 1 or more|greater than or equal to 1)"
        ):
            Denoising([paths["plain"], paths["second"]], weights=weights)
    options: dict[str, Any]
    for options in ({"packed_copies": 0, "packed_length": 10**4}, {"packed_copies": 2}):
        with pytest.raises(ConfigError, match=r"packed_copies=\d: must be"):
            Denoising(paths["plain"], **options)
    with pytest.raises(ConfigError, match=r"packed_copies=1000000000: of \d+ train .* at most \d+"):
        Denoising(paths["plain"], packed_length=10**4, packed_copies=10**9)
    with pytest.raises(ConfigError, match="names no store"):
        Denoising([])
    digests = {
        Denoising(paths["plain"]).digest,
        Denoising(paths["plain"], packed_length=1000).digest,
        Denoising(paths["plain"], packed_length=1001).digest,
        Denoising(paths["plain"], packed_length=1000, packed_copies=2).digest,
        Denoising([paths["plain"], paths["second"]]).digest,
        Denoising([paths["plain"], paths["second"]], weights=[2, 1]).digest,
        Denoising([paths["second"], paths["plain"]]).digest,
    }
    assert len(digests) == 7


def test_mixed_stores_give_the_samples_of_each(paths):
    """Items run through the stores; a batch over both is what each gives alone."""
    mixed = Denoising([paths["plain"], paths["second"]], neighbours=2)
    parts = [Denoising(paths[name], neighbours=2) for name in ("plain", "second")]
    sizes = [part.size("train") for part in parts]
    assert mixed.parts("train") == [(sizes[0], 1), (sizes[1], 1)]
    items = [sizes[0] + 2, 1, sizes[0], 0]
    length = max(mixed.length("train", item) for item in items)
    sample = join([mixed.sample("train", items, [5, 6, 7, 8], 0, length)])
    for row, item in enumerate(items):
        part, own = (parts[1], item - sizes[0]) if item >= sizes[0] else (parts[0], item)
        assert mixed.describe("train", item) == part.describe("train", own)
        alone = join([part.sample("train", [own], [5 + row], 0, length)])
        for field, values in alone.items():
            torch.testing.assert_close(sample[field][row], values[0], rtol=0, atol=0, msg=field)
