"""A checkpoint is complete or it is not there; a damaged one is named, and not used."""

import json
import shutil
import zlib
from itertools import pairwise
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import nn

from data_pipeline.errors import RunError
from data_pipeline.stream.stream import Stream
from scaling.checkpoint import files
from scaling.checkpoint.checkpoint import Checkpoints
from scaling.checkpoint.files import (
    MODEL,
    OPTIMIZER,
    begin,
    newest_whole,
    publish,
    write_shards,
)
from scaling.engine.build import build_engine
from scaling.engine.shards import PARAMETER, SavedState, shard_of
from scaling.train.loop import learning_rate, optimizer_maker
from scaling.train.settings import OptimSettings


class Place(Stream):
    """The place in the data, which is all that a checkpoint wants of a stream."""

    def __init__(self):
        self.cursor = 0

    def state_dict(self):
        return {"cursor": self.cursor}

    def load_state_dict(self, state):
        self.cursor = state["cursor"]


def make(width: int = 3):
    module = nn.Sequential(nn.Linear(width, 2), nn.BatchNorm1d(2))
    engine = build_engine(
        "ddp",
        module,
        optimizer_maker(OptimSettings(lr=0.1)),
        gradient_clipping=0.0,
        micro_batch_size=4,
        accumulation=1,
        environment={},
    )
    return engine, Place()


def advance(engine, stream) -> None:
    engine.backward(engine(torch.randn(4, 3)).square().sum())
    engine.step(0.1)
    stream.cursor += 4


def everything(engine, stream) -> dict[str, torch.Tensor]:
    state = {f"{name}/{kind}": x.values for name, own in engine.state().items()
             for kind, x in own.items()}  # fmt: skip
    return {**state, **engine.module.state_dict(), "cursor": torch.tensor(stream.cursor)}


def save(checkpoints: Checkpoints, step: int, state) -> None:
    checkpoints.save(step, *state, identity={})
    checkpoints.wait()


def test_saved_and_loaded_goes_on_alike(tmp_path):
    """Parameters, buffers, moments, Adam's step, data cursor and random numbers."""
    first, checkpoints = make(), Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.load(*first) == (0, "")
    advance(*first)
    save(checkpoints, 1, first)
    torch.manual_seed(99)  # of another process
    second = make()
    torch.manual_seed(1234)
    assert Checkpoints(tmp_path, keep_last=2).load(*second) == (1, "")
    drawn = torch.randn(3)
    assert Checkpoints(tmp_path, keep_last=2).load(*second) == (1, "")
    assert torch.equal(torch.randn(3), drawn)
    for one, other in zip(everything(*first).items(), everything(*second).items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    for pair in (first, second):
        torch.manual_seed(5)
        advance(*pair)
    for name, value in everything(*first).items():
        assert torch.equal(value, everything(*second)[name]), name


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    state, checkpoints = make(), Checkpoints(tmp_path, keep_last=2)
    (tmp_path / "step-00000003.tmp").mkdir()
    (tmp_path / "step-00000003.tmp" / "model.pt").write_text("half")
    assert checkpoints.load(*state) == (0, "")
    for step in (1, 2, 3, 12):
        save(checkpoints, step, state)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000003", "step-00000012"}
    assert checkpoints.load(*state) == (12, "")


def test_killed_at_any_moment_of_saving_the_one_before_is_read(tmp_path, monkeypatch):
    """The process ends at each call that touches the disk, one after the other."""
    state, checkpoints = make(), Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1, state)
    moments = [(torch, "save"), (Path, "rename"), (Path, "replace"), (json, "dumps")]
    for owner, name in moments:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                save(checkpoints, 2, state)
        assert checkpoints.load(*state) == (1, "")
    save(checkpoints, 2, state)
    assert checkpoints.load(*state) == (2, "")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("name", ["model-00000.pt", "optimizer-00000.pt", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    state, checkpoints = make(), Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2):
        save(checkpoints, step, state)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    step, said = checkpoints.load(*state)
    assert step == 1 and "\n" not in said
    assert said.startswith(f"{tmp_path / 'step-00000002'} is damaged (")
    save(checkpoints, 2, state)  # in its place
    assert checkpoints.load(*state) == (2, "")
    shutil.rmtree(tmp_path / "step-00000002")
    assert checkpoints.load(*state) == (1, "")
    later = tmp_path / "step-00000001" / "state.json"
    later.write_text(later.read_text().replace('"format": 2', '"format": 9'))
    with pytest.raises(RunError, match="step-00000001 has format 9, this program reads 1 to 2"):
        checkpoints.load(*state)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [state],
        lambda state: None,
        lambda state: state | {"step": "1"},
        lambda state: state | {"step": 2},
        lambda state: state | {"stream": 3},
        lambda state: state | {"random": {}},
        lambda state: state | {"random": {"cpu": "AAAA"}},
        lambda state: state | {"checksums": []},
    ],
)
def test_a_state_of_another_type_is_damage(tmp_path, change):
    pair, checkpoints = make(), Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1, pair)
    path = tmp_path / "step-00000001" / "state.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(RunError, match=r"step-00000001 is damaged .* remove") as error:
        checkpoints.load(*pair)
    assert "\n" not in str(error.value)


def test_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1, make())
    other = build_engine(
        "ddp",
        nn.Linear(3, 2),
        optimizer_maker(OptimSettings()),
        gradient_clipping=0.0,
        micro_batch_size=1,
        accumulation=1,
        environment={},
    )
    with pytest.raises(
        RunError, match=r"another model: 0.bias has the shape \(2,\) there and None"
    ):
        checkpoints.load(other, Place())
    with pytest.raises(
        RunError, match=r"another model: 0.weight has the shape \(2, 3\) there and \(2, 4\)"
    ):
        checkpoints.load(*make(4))


def test_a_full_disk_is_an_error_of_ours(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpoints, state = Checkpoints(tmp_path / "checkpoints"), make()
    with pytest.raises(RunError, match="cannot write"):
        checkpoints.save(1, *state, identity={})


def test_a_write_that_fails_is_said_by_the_next_save(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path), make()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
        checkpoints.save(1, *state, identity={})
        checkpoints.close()
    assert checkpoints.failed
    with pytest.raises(RunError, match=r"no space.*make room"):
        checkpoints.save(2, *state, identity={})
    assert not checkpoints.failed
    save(checkpoints, 2, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What later steps change does not come into it; nothing is there before it is complete."""
    written, write = Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *all: written.wait(60) and write(*all))
    state, checkpoints = make(), Checkpoints(tmp_path)
    advance(*state)
    torch.manual_seed(7)
    before = {name: x.clone() for name, x in everything(*state).items()}
    checkpoints.save(1, *state, identity={})
    advance(*state)
    assert not list(tmp_path.glob("step-00000001")) and not checkpoints.failed
    written.set()
    checkpoints.wait()
    other = make()
    assert checkpoints.load(*other) == (1, "")
    for name, x in everything(*other).items():
        assert torch.equal(x, before[name]), name
        changed = everything(*state)[name]
        assert "num_batches" in name or not torch.equal(x, changed), name


def test_a_checkpoint_of_the_first_format_is_read(tmp_path):
    """One file of whole tensors of each kind, and no shapes."""
    first, checkpoints = make(), Checkpoints(tmp_path)
    advance(*first)
    save(checkpoints, 1, first)
    folder = tmp_path / "step-00000001"
    whole = first[0].module.state_dict()
    kept = {name: dict(first[0].optimizer.state[p]) for name, p in first[0].parameters.items()}
    for name, content in (("model", whole), ("optimizer", kept)):
        (folder / f"{name}-00000.pt").unlink()
        torch.save(content, folder / f"{name}.pt")
    state = json.loads((folder / "state.json").read_text())
    del state["shapes"]
    state["format"] = 1
    state["checksums"] = {
        name: zlib.crc32((folder / name).read_bytes()) for name in ("model.pt", "optimizer.pt")
    }
    (folder / "state.json").write_text(json.dumps(state))
    second = make()
    assert checkpoints.load(*second) == (1, "")
    for name, value in everything(*first).items():
        assert torch.equal(value, everything(*second)[name]), name
    (folder / "optimizer.pt").write_bytes(b"no more")
    with pytest.raises(RunError, match=r"checksum of optimizer\.pt is wrong"):
        checkpoints.load(*second)


def test_a_state_with_a_shard_missing_or_there_twice_is_refused():
    x = torch.arange(10.0)
    shards = [{"x": {PARAMETER: shard_of(x, rank, 3)}} for rank in range(3)]
    state = SavedState(shards)
    assert state.numel("x", PARAMETER) == 10 and torch.equal(state.read("x", PARAMETER), x)
    assert torch.equal(state.read("x", PARAMETER, 2, 7), x[2:7])
    assert state.read("x", PARAMETER, 4, 6).data_ptr() == shards[1]["x"][PARAMETER][1][1].data_ptr()
    for wrong in (shards[1:], [shards[0], *shards], [shards[0], shards[2]]):
        with pytest.raises(ValueError, match=r"x \(parameter\) has a shard at"):
            SavedState(wrong).numel("x", PARAMETER)


RANKS = (1, 2, 3, 4, 8)


@pytest.mark.parametrize("writers", RANKS)
def test_what_any_number_of_ranks_wrote_any_number_reads(tmp_path, writers):
    """Uneven parts, fewer elements than ranks, none at all, no axes; the readers check every file
    once."""
    whole = {
        "uneven": torch.randn(7, 11, dtype=torch.float64),
        "small": torch.randn(3),
        "empty": torch.randn(0, 5),
        "count": torch.tensor(41),
        "turned": torch.randn(6, 4).t(),
    }
    temporary = begin(tmp_path, 5)
    for rank in reversed(range(writers)):
        kept = {name: {PARAMETER: x, "moment": x * 2, "step": torch.tensor(5.0)}
                for name, x in whole.items()}  # fmt: skip
        shards = {name: {kind: shard_of(x, rank, writers) for kind, x in kinds.items()}
                  for name, kinds in kept.items()}  # fmt: skip
        write_shards(temporary, rank, shards)
    shapes = {name: tuple(x.shape) for name, x in whole.items()}
    folder = publish(temporary, writers, {"step": 5, "shapes": shapes})
    checked: list[str] = []
    for readers in RANKS:
        checked.clear()
        for rank in range(readers):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files, "_checksum", lambda p: checked.append(p.name) or crc(p))
                _, _, state, saved = newest_whole([folder], MODEL, OPTIMIZER,
                                                  rank=rank, ranks=readers)  # fmt: skip
            for name, x in whole.items():
                own = shard_of(x, rank, readers)
                stop = own.start + own.values.numel()
                for kind, factor in ((PARAMETER, 1), ("moment", 2)):
                    read = saved.read(name, kind, own.start, stop)
                    assert x.ndim == 0 or torch.equal(read, own.values * factor), (name, kind)
                    again = saved.read(name, kind).view(state["shapes"][name])
                    assert torch.equal(again, x * factor), (name, kind)
                assert saved.read(name, "step") == 5.0
        assert sorted(checked) == sorted(state["checksums"]) and len(checked) == 2 * writers


def crc(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def test_the_best_are_kept_besides_the_newest(tmp_path):
    losses = {1: 0.5, 2: 0.1, 3: 0.3, 4: 0.2, 5: 0.9}
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=2, losses=lambda: losses)
    state, kept = make(), []
    for step in (1, 2, 3, 4, 5, 6):
        save(checkpoints, step, state)
        kept.append([int(path.name[5:]) for path in sorted(tmp_path.iterdir())])
    assert kept == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [2, 4, 5], [2, 4, 6]]


def test_none_is_removed_before_there_are_more_than_are_kept(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, keep_last=5), make()
    for step in range(1, 7):
        save(checkpoints, step, state)
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["2", "3", "4", "5", "6"]


def test_the_learning_rate_is_a_function_of_the_step():
    optim = OptimSettings(lr=2.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(step, 12, optim) for step in range(1, 13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[7] == pytest.approx(2 * (0.1 + 0.9 / 2)) and rates[11] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[3:]))
    optim.schedule = "constant"
    assert learning_rate(12, 12, optim) == 2.0
    assert learning_rate(1, 1, OptimSettings(lr=1.0, warmup_steps=0, final_lr_ratio=1.0)) == 1.0
