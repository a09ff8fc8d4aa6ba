"""Stores: what was written is what is read, clusters stay whole, and damage is refused."""

import gc
import json
import shutil
import tracemalloc
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest

from data_pipeline.chains import RESIDUES, SPLITS, Chain, Notes, decode, encode
from data_pipeline.errors import SourceError, StoreError
from data_pipeline.prepare import ensure_bundled
from data_pipeline.sources.bundled import BundledSource
from data_pipeline.store import clusters, manifest, reader, writer
from data_pipeline.store.build import build, ensure, verify
from data_pipeline.store.manifest import MANIFEST
from data_pipeline.store.reader import Store, read_manifest
from data_pipeline.stream.stream import Stream
from data_pipeline.tasks.denoising import Denoising


class SmallSource:
    """Random chains with missing atoms; `seed` stands for the files, step 0 makes no break."""

    def __init__(self, seed: int = 0, lengths=(40, 90, 31, 64, 50, 33), step: float = 1.0):
        self.seed, self.lengths, self.step = seed, lengths, step

    def identity(self):
        return {"kind": "small", "files": {"seed": str(self.seed)}}

    def chains(self, notes):
        random = np.random.default_rng(self.seed)
        chains = []
        for i, length in enumerate(self.lengths):
            sequence = "".join(random.choice(list(RESIDUES + "X"), length))
            xyz = np.cumsum(self.step * random.normal(size=(length, 4, 3)), 0).astype(np.float32)
            xyz[3, 1 + 2 * (i % 2)] = np.nan
            chains.append(Chain(f"file{i}/A", sequence, xyz))
        return chains


@pytest.fixture(scope="module")
def bundled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "bundled"
    assert ensure_bundled(path)
    return path


def test_store_gives_back_what_was_written(tmp_path, monkeypatch):
    """Every slice is bit-equal, missing atoms included, across chunk borders too."""
    monkeypatch.setattr(writer, "CHUNK", 64)  # 16 residues a chunk of xyz
    source = SmallSource()
    manifest = build(tmp_path / "small", source)
    assert verify(tmp_path / "small") == manifest == read_manifest(tmp_path / "small")
    store = Store(tmp_path / "small")
    for number, chain in enumerate(source.chains(Notes())):
        length = len(chain.sequence)
        assert store.name(number) == chain.id and store.lengths[number] == length
        for start, stop in ((0, length), (5, 6), (15, 31), (length - 1, length), (16, 16)):
            xyz = store.read("xyz", number, start, stop)
            np.testing.assert_array_equal(xyz, chain.xyz[start:stop])
            letters = decode(store.read("residue", number, start, stop))
            assert letters == chain.sequence[start:stop]
            segment = store.read("segment", number, start, stop)
            np.testing.assert_array_equal(segment, np.cumsum(chain.breaks)[start:stop])
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_second_build_reuses_and_another_source_is_refused(tmp_path, bundled):
    """The digest follows from the content alone; a failed build leaves nothing."""
    assert not ensure_bundled(bundled)
    with pytest.raises(StoreError, match=r"another source .*rm -r"):
        ensure(bundled, SmallSource())
    build(tmp_path / "zeros", SmallSource(step=0.0))  # chunks of fill values are written too
    digests = [build(tmp_path / str(n), SmallSource(n // 2))["digest"] for n in range(3)]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(SourceError, match="needs 3"):
        build(tmp_path / "tiny", SmallSource(lengths=(40, 40)))
    for place in ("/dev/null/store", "/proc/store"):  # root may not write here either
        with pytest.raises(StoreError, match=rf"cannot write the store {place}: ") as caught:
            ensure(place, SmallSource())
        text = str(caught.value)
        assert "choose another store=" in text and "tmp-" not in text and "\n" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "zeros"]


def cluster(sequences, keys=()):
    return clusters.cluster(*flat(sequences), keys)


def split(sequences, groups):
    return clusters.split(*flat(sequences), groups)


def flat(sequences):
    offsets = np.cumsum([0, *(len(sequence) for sequence in sequences)])
    return encode("".join(sequences)), offsets


def damage_by_flipping(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage, opening, message",
    [
        (lambda s: (s / MANIFEST).unlink(), True, "manifest.json is missing"),
        (lambda s: (s / MANIFEST).write_text("{"), True, "is no manifest"),
        (lambda s: shutil.rmtree(s), True, "no store at"),
        (lambda s: (s / "xyz/c/1/0/0").unlink(), True, "xyz/c/1/0/0 is missing"),
        (lambda s: (s / "xyz/c/0/0/0").write_bytes(b""), True, "0 bytes instead of"),
        (lambda s: damage_by_flipping(s / "xyz/c/0/0/0"), False, "sha256 differs"),
        (lambda s: damage_by_flipping(s / "segment/c/0"), False, "sha256 differs"),
    ],
)
def test_damaged_stores_are_refused(bundled, tmp_path, damage, opening, message):
    """Missing, cut and foreign files stop the opening; flipped bits stop verify."""
    path = tmp_path / "copy"
    shutil.copytree(bundled, path)
    damage(path)
    if opening:
        with pytest.raises(StoreError, match=message):
            Store(path)
    with pytest.raises(StoreError, match=message) as caught:
        verify(path)
    assert "prepare source=... store=" in str(caught.value) and "\n" not in str(caught.value)


def test_other_versions_and_changed_manifests_are_refused(bundled, tmp_path):
    """The manifest's version rules; whatever changed in it is found when the store is opened."""
    path = tmp_path / "copy"
    shutil.copytree(bundled, path)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(StoreError, match="version 0, this program reads 1"):
        Store(path)
    for change in ({"digest": "0"}, {"atoms": ["N", "CB", "C", "O"]}, {"more": 1}):
        (path / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(StoreError, match=r"manifest\.json is damaged .*rm -r"):
            Store(path)


def test_flipped_bits_and_vanished_chunks_stop_the_reader(bundled, tmp_path):
    """What was whole at opening may break later: the checksum and the fill value tell."""
    path = tmp_path / "copy"
    shutil.copytree(bundled, path)
    store = Store(path)
    damage_by_flipping(path / "xyz/c/0/0/0")
    with pytest.raises(StoreError, match="xyz/c/0/0/0 is damaged"):
        store.read("xyz", 0, 0, 5)
    (path / "xyz/c/0/0/0").unlink()
    with pytest.raises(StoreError, match="xyz/c/0/0/0 is missing"):
        store.read("xyz", 0, 0, 5)


def test_splits_share_no_cluster_and_held_out_ones_are_a_tenth(bundled):
    """By cluster, not by chain; validation is not one family."""
    store = Store(bundled)
    sequences = [c.sequence for c in BundledSource().chains(Notes())]
    groups = cluster(sequences)
    members = {name: set(groups[store.chains(name)]) for name in SPLITS}
    assert sum(len(m) for m in members.values()) == len(set().union(*members.values())) == 96
    for name in ("validation", "test"):
        residues = store.lengths[store.chains(name)]
        assert 0.09 <= residues.sum() / store.lengths.sum() <= 0.1
        assert len(members[name]) > 10


def test_split_follows_from_the_set_of_sequences():
    """Sixty pairs of relatives in any order fall to the same splits."""
    random = np.random.default_rng(0)
    single = ["".join(random.choice(list(RESIDUES), 60)) for _ in range(60)]
    sequences = single + [sequence[10:] for sequence in single]
    reference = split(sequences, cluster(sequences))
    assert np.bincount(reference).tolist() == [96, 12, 12]
    for _ in range(3):
        order = random.permutation(120)
        shuffled = [sequences[i] for i in order]
        np.testing.assert_array_equal(split(shuffled, cluster(shuffled)), reference[order])


def test_clusters_join_what_shares_a_quarter_of_its_kmers():
    """Containment counts the smaller set, linkage is single, X makes no 4-mer."""
    random = np.random.default_rng(1)
    a, b, c = ("".join(random.choice(list(RESIDUES), 80)) for _ in range(3))
    bridge = a[:40] + b[:40]
    assert cluster([a, b, c, a[10:40], "XX" + "X" * 30]).tolist() == [0, 1, 2, 0, 3]
    assert cluster([a, c, b, bridge]).tolist() == [0, 1, 0, 0]
    assert cluster([a, a[:15] + c]).tolist() == [0, 1]  # 12 of 77 4-mers
    assert cluster([a, b, a, "XX", "XX"]).tolist() == [0, 1, 0, 2, 3]  # equal ones, if known
    keys = ["one", None, "two", None, "one"]  # decide alone
    assert cluster([a, a, a, bridge, c], keys).tolist() == [0, 1, 2, 1, 0]
    many = ["".join(random.choice(list(RESIDUES), 60)) for _ in range(40)]
    many += [sequence[20:] for sequence in many]
    assert cluster(many).tolist() == [*range(40)] * 2


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(params=["file", "memory", "http"])
def remote(request, bundled, tmp_path):
    """The URL of a copy of a store, and how to remove one of its files."""
    if request.param == "memory":
        files = fsspec.filesystem("memory")
        files.put(str(bundled), f"/{tmp_path.name}", recursive=True)
        yield f"memory://{tmp_path.name}", lambda name: files.rm(f"/{tmp_path.name}/{name}")
        return
    shutil.copytree(bundled, tmp_path / "copy")
    remove = lambda name: (tmp_path / "copy" / name).unlink()  # noqa: E731
    if request.param == "file":
        yield f"file://{tmp_path}/copy", remove
        return
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/copy", remove
        server.shutdown()


def test_stores_are_read_through_urls(bundled, remote):
    """Bit-equal, verified, and with the same faults."""
    url, remove = remote
    here, there = Store(bundled), Store(url)
    assert there.digest == here.digest == verify(url)["digest"]
    for chain in (0, 7, 114):
        length = int(here.lengths[chain])
        assert there.name(chain) == here.name(chain)
        for array in ("xyz", "residue", "segment"):
            given = there.read(array, chain, 3, length)
            np.testing.assert_array_equal(given, here.read(array, chain, 3, length))
    there = Store(url)
    remove("xyz/c/0/0/0")
    for attempt in (lambda: Store(url), lambda: there.read("xyz", 0, 0, 9)):
        with pytest.raises(StoreError, match=rf"{url}/xyz/c/0/0/0 is missing; copy it there anew"):
            attempt()
    with pytest.raises(StoreError, match=r"memory://nowhere/manifest\.json is missing"):
        Store("memory://nowhere")
    with pytest.raises(StoreError, match=r"nowhere://x.* cannot be read: Protocol not known"):
        Store("nowhere://x")


def test_a_disk_that_gives_other_values_back_makes_no_store(tmp_path, monkeypatch):
    create = writer._create

    def forgetful(group, name, values):
        array = create(group, name, values)
        if name == "segment":
            (tmp_path / array.store.root.name / name / "c" / "0").unlink()  # zarr reads fill values
        return array

    monkeypatch.setattr(writer, "_create", forgetful)
    with pytest.raises(StoreError, match="segment reads back as other values"):
        build(tmp_path / "store", BundledSource())
    assert list(tmp_path.iterdir()) == []


class LongSource:
    """Chains of 300 residues, made as they are asked for."""

    def __init__(self, count: int):
        self.count = count

    def identity(self):
        return {"kind": "long", "files": {}, "count": self.count}

    def chains(self, notes):
        xyz = np.random.default_rng(0).normal(size=(300, 4, 3)).astype(np.float32)
        for i in range(self.count):
            yield Chain(f"{i}", "ACDEF" * 60, xyz + np.float32(i), cluster=f"{i}")


def test_memory_does_not_grow_with_the_store(tmp_path, monkeypatch):
    """A store of 6 MB takes the memory of one of 1.5 MB, to write and to stream from, within a
    megabyte; peaks of what Python and numpy allocate."""
    monkeypatch.setattr(writer, "CHUNK", 1 << 13)
    monkeypatch.setattr(reader, "CACHED_CHUNKS", 8)
    for module in (writer, manifest):
        monkeypatch.setattr(module, "BLOCK", 1 << 14)
    written, streamed = [], []
    for count in (100, 400):
        path = tmp_path / str(count)
        with peak_mb(written):
            build(path, LongSource(count))
        with peak_mb(streamed):
            task = Denoising(str(path), neighbours=2)
            stream = Stream(task, "train", batch_size=8, micro_batch_size=8, seed=0, max_length=999)
            for _ in range(8):
                next(stream)
            stream.close()
    assert max(written) < 12 and written[1] < written[0] + 1
    assert max(streamed) < 12 and streamed[1] < streamed[0] + 1


@contextmanager
def peak_mb(found: list[float]):
    # Python collects cycles the later the more objects live: those of other tests do not count.
    gc.freeze()
    gc.collect()
    tracemalloc.start()
    yield
    found.append(tracemalloc.get_traced_memory()[1] / 1e6)
    tracemalloc.stop()
    gc.unfreeze()
