"""What goes wrong with stores: every fault is an error of one line with the file and the way out,
and no number that was not written is ever read."""

import asyncio
import errno
import json
import os
import random
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.chains import RESIDUES, Chain
from data_pipeline.errors import LongfoldError, SourceError, StoreError
from data_pipeline.store import writer
from data_pipeline.store.build import build, ensure, staged, verify
from data_pipeline.store.reader import Store
from data_pipeline.stream.stream import Stream
from data_pipeline.tasks.denoising import Denoising

ARRAYS = ("xyz", "residue", "segment")


class WalkSource:
    """Random walks of 40 residues; `seed` stands for the files."""

    def __init__(self, seed: int = 0, count: int = 40, pause: float = 0.0):
        self.seed, self.count, self.pause = seed, count, pause

    def identity(self):
        return {"kind": "walk", "files": {"seed": str(self.seed)}}

    def chains(self, notes):
        generator = np.random.default_rng(self.seed)
        for i in range(self.count):
            time.sleep(self.pause)
            sequence = "".join(generator.choice(list(RESIDUES), 40))
            xyz = np.cumsum(generator.normal(size=(160, 3)), 0).reshape(40, 4, 3)
            yield Chain(f"walk{i}", sequence, xyz.astype(np.float32))


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Iterator[Path]:
    """Stores of many chunks, `plain` and `other`: the same shapes, other values."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK", 256)  # 64 residues a chunk of xyz
        patch.setattr(writer, "BLOCK", 300)
        build(folder / "plain", WalkSource())
        build(folder / "other", WalkSource(1))
    yield folder


def said(error: LongfoldError, *parts: object) -> bool:
    """One line that holds all parts."""
    text = str(error)
    assert "\n" not in text and all(str(part) in text for part in parts), text
    return True


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE = {
    "missing": (Path.unlink, True),
    "cut": (cut, True),
    "empty": (lambda path: path.write_bytes(b""), True),
    "flipped": (flip, False),
}
"""What is done to a file, and whether opening the store tells."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_before_and_after_opening_is_named(stores, tmp_path, damage):
    """In any array and chunk: by opening or verify before, by the first read after; the file is
    named, and chains in other chunks still read as they were."""
    spoil, opening = DAMAGE[damage]
    whole = Store(stores / "plain")
    for array in ARRAYS:
        path = tmp_path / array
        shutil.copytree(stores / "plain", path)
        opened = Store(path)
        victim = sorted(f for f in (path / array / "c").rglob("*") if f.is_file())[1]
        spoil(victim)
        for check in [Store, verify] if opening else [verify]:
            with pytest.raises(StoreError) as caught:
                check(path)
            assert said(caught.value, victim.relative_to(tmp_path), f"rm -r {path}", "prepare")
        refused = 0
        for chain in range(40):
            for name in ARRAYS:
                try:
                    found = opened.read(name, chain, 0, 40)
                except StoreError as error:
                    refused += said(error, victim.relative_to(tmp_path), f"rm -r {path}")
                else:
                    np.testing.assert_array_equal(found, whole.read(name, chain, 0, 40))
        assert 0 < refused < 40


def test_manifests_and_chunks_of_other_stores_are_refused(stores, tmp_path):
    """A stale manifest, another version, and a chunk of the same size from another store."""
    path = tmp_path / "copy"
    shutil.copytree(stores / "plain", path)
    manifest = (path / "manifest.json").read_text()
    opened = Store(path)
    same_size = 0
    for array in ARRAYS:
        for file in (path / array / "c").rglob("*"):
            theirs = stores / "other" / file.relative_to(path)
            if file.is_file() and file.stat().st_size == theirs.stat().st_size:
                same_size += 1
                shutil.copy(theirs, file)
    assert same_size > 20
    with pytest.raises(StoreError) as caught:
        opened.read("xyz", 0, 0, 40)
    assert said(caught.value, path / "xyz/c/0/0/0", "another store", f"rm -r {path}")
    for text, reason in (
        ((stores / "other" / "manifest.json").read_text(), "bytes instead of"),
        (json.dumps(json.loads(manifest) | {"version": 7}), "version 7, this program reads 1"),
        ("[]", "is no manifest"),
        (manifest[: len(manifest) // 2], "is no manifest"),
    ):
        (path / "manifest.json").write_text(text)
        with pytest.raises(StoreError) as caught:
            verify(path)
        assert said(caught.value, path, reason, f"rm -r {path}")


def test_a_store_that_vanishes_stops_training(stores, tmp_path):
    """The stream gives the right samples from what it holds, then the error; it never pads."""
    path = tmp_path / "store"
    shutil.copytree(stores / "plain", path)
    reference = Denoising(str(stores / "plain"), neighbours=2)
    task = Denoising(str(path), neighbours=2)
    stream = Stream(task, "train", batch_size=2, micro_batch_size=2, seed=0, max_length=999)
    whole = Stream(reference, "train", batch_size=2, micro_batch_size=2, seed=0, max_length=999)
    given = 0
    with pytest.raises(StoreError) as caught:
        for _ in range(40):
            step, expected = next(stream), next(whole)
            assert step[0].target.equal(expected[0].target)
            given += 1
            if given == 2:
                shutil.rmtree(path)
    assert 2 <= given < 20 and said(caught.value, f"{path}/", "is missing", f"store={path}")
    stream.close()
    whole.close()


def test_killed_writers_leave_nothing_that_opens(tmp_path):
    """SIGKILL at random moments: no store or a whole one, and the next build removes the draft."""
    path, chance = tmp_path / "store", random.Random(0)
    began = time.perf_counter()
    build(path, WalkSource(pause=1e-3))
    usual = time.perf_counter() - began
    shutil.rmtree(path)
    drafts_left = unfinished = 0
    for _ in range(12):
        child = get_context("fork").Process(target=build, args=(path, WalkSource(pause=1e-3)))
        child.start()
        time.sleep(chance.uniform(0, 1.2 * usual))
        child.kill()
        child.join()
        left = [each.name for each in tmp_path.iterdir() if each != path]
        drafts_left += len(left)
        assert len(left) <= 1  # each writer removed the one before
        if path.exists():
            verify(path)
            shutil.rmtree(path)
        else:
            unfinished += 1
            with pytest.raises(StoreError, match="no store at"):
                Store(path)
    assert drafts_left >= 2 and unfinished >= 2  # some were killed in the middle
    build(path, WalkSource())
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


def test_drafts_of_living_writers_stay(tmp_path):
    """Only a dead writer's draft is removed."""
    with staged(tmp_path / "store") as draft:
        build(tmp_path / "store", WalkSource())
        assert draft.is_dir()
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


def test_two_writers_at_once_make_one_store(tmp_path):
    """Of the same source both are content; another source's is refused, by name."""
    path = tmp_path / "store"
    outcomes: list[object] = []

    def attempt(source: WalkSource) -> None:
        try:
            outcomes.append(ensure(path, source)[1])
        except StoreError as error:
            outcomes.append(error)

    sources = [WalkSource(pause=2e-3), WalkSource(pause=2e-3), WalkSource(1, pause=2e-2)]
    writers = [threading.Thread(target=attempt, args=(source,)) for source in sources]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    refused = [each for each in outcomes if isinstance(each, StoreError)]
    assert sorted(each for each in outcomes if isinstance(each, bool)) == [False, True]
    assert len(refused) == 1 and said(refused[0], path, "another source", f"rm -r {path}")
    verify(path)
    with pytest.raises(StoreError) as caught:
        build(path, WalkSource())
    assert said(caught.value, path, "came to that place", "store=")
    assert [each.name for each in tmp_path.iterdir()] == ["store"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    """A file that may not grow, and a disk that is full at any of the writes."""
    path, (soft, hard) = tmp_path / "store", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StoreError) as caught:
            build(path, WalkSource())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said(caught.value, path, "File too large", "choose another store=", "room")
    from zarr.storage import LocalStore

    write, room = LocalStore.set, iter(())

    async def full(self, key, value):
        if next(room, None) is None:
            await asyncio.sleep(0.05)  # what zarr writes beside it ends first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root / key))
        return await write(self, key, value)

    monkeypatch.setattr(LocalStore, "set", full)
    for files in (0, 1, 5, 11):
        room = iter(range(files))
        with pytest.raises(StoreError) as caught:
            ensure(path, WalkSource())
        assert said(caught.value, path, "No space left", "choose another store=")
        assert ".tmp-" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may do anything; nobody may not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_permission_denied_is_named(stores, tmp_path):
    """Where a store is to be written, looked for, opened and read."""
    closed, path = tmp_path / "closed", tmp_path / "store"
    shutil.copytree(stores / "plain", path)
    closed.mkdir()
    for each in (tmp_path, *tmp_path.parents):
        if each.owner() == tmp_path.owner() and each.stat().st_mode & 0o005 != 0o005:
            each.chmod(0o755)
    opened = Store(path)
    (path / "residue/c/0").chmod(0)
    (path / "segment").chmod(0)
    closed.chmod(0)
    attempts = {
        partial(ensure, closed / "store", WalkSource()): closed / "store",
        partial(ensure, tmp_path / "new" / "store", WalkSource()): tmp_path / "new" / "store",
        partial(Store, closed / "store"): closed / "store",
        partial(Store, path): path / "segment",
        partial(opened.read, "residue", 0, 0, 9): path / "residue/c/0",
    }
    for attempt, place in attempts.items():
        with without_rights(), pytest.raises(StoreError) as caught:
            attempt()
        assert said(caught.value, place, "ermission denied", "store=")
    closed.chmod(0o755)
    (path / "segment").chmod(0o755)


def test_chains_that_would_spoil_a_store_are_refused(tmp_path):
    """By name, with what is wrong; nothing is left behind."""
    good = next(iter(WalkSource().chains({})))
    numbers = np.zeros((40, 2), np.float32)
    bad = {
        "no atom was observed": {"xyz": np.full((40, 4, 3), np.nan, np.float32)},
        "coordinate is infinite": {"xyz": np.full((40, 4, 3), np.inf, np.float32)},
        r"float32 \(39, 4, 3\), its 40 residues": {"xyz": good.xyz[:39]},
        "split is test, that of good is None": {"split": "test"},
        "segment must hold 40 numbers: 0": {"segment": np.ones(40, np.int32)},
        "segment must hold 40": {"segment": np.arange(0, 80, 2)},
        "extra arrays are": {"extra": {"scalars": numbers}},
    }

    class Source(WalkSource):
        def __init__(self, *more: Chain, **fields):
            whole = {"id": "bad", "sequence": good.sequence, "xyz": good.xyz}
            self.given = [*more, Chain(**(whole | fields))]

        def identity(self):
            return {"kind": "bad", "files": {}}

        def chains(self, notes):
            return self.given

    sources = {
        message: Source(Chain("good", good.sequence, good.xyz), **fields)
        for message, fields in bad.items()
    }
    sources["holds NaN"] = Source(extra={"scalars": numbers * np.nan})
    sources["name of its own"] = Source(extra={"xyz": numbers})
    sources["not one of train"] = Source(split="dev")
    for message, source in sources.items():
        with pytest.raises(SourceError, match=rf"^chain bad: .*{message}[^\n]*$"):
            build(tmp_path / "store", source)
    with pytest.raises(SourceError, match="gives no chain"):
        build(tmp_path / "store", WalkSource(count=0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_what_the_machine_lacks_is_not_called_damage(stores, monkeypatch, error):
    """Else the advice would be to delete a store that is whole."""
    store = Store(stores / "plain")

    async def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("data_pipeline.store.manifest.CheckedFiles.get", fail)
    with pytest.raises((StoreError, MemoryError)) as caught:
        store.read("xyz", 0, 0, 40)
    assert isinstance(error, MemoryError) or "Too many open files" in str(caught.value)
    assert "damaged" not in str(caught.value) and "rm -r" not in str(caught.value)
