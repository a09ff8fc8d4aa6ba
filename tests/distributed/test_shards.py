"""Saving and loading need the engine's own state, a rank's part of it once more, and one tensor."""

from pathlib import Path
from typing import Any
from weakref import finalize

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.stream.stream import Stream
from scaling.checkpoint.checkpoint import Checkpoints
from scaling.engine.base import Engine
from scaling.engine.build import build_engine
from tests.distributed.test_engine import silent
from tests.states import saved_tensors

WIDTH, LAYERS = 24, 10


class Nowhere(Stream):
    """A place in no data."""

    def __init__(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors made inside that live, and when they were most; files that are mapped into
    memory do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tensors_in(args)}  # views make nothing
        made = func(*args, **(kwargs or {}))
        for x in tensors_in(made) if "set_" not in str(func) else ():
            storage = x.untyped_storage()
            if storage._cdata not in before | self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size


def make(name: Any, stage: int, group=None) -> Engine:
    """With a frozen parameter, and one of fewer elements than ranks."""
    torch.manual_seed(dist.get_rank() if group is None else 0)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), nn.Linear(WIDTH, 1))
    module[1].weight.requires_grad_(False)
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter.data)
    return build_engine(
        name,
        module,
        torch.optim.AdamW,
        gradient_clipping=0.0,
        micro_batch_size=1,
        accumulation=1,
        zero_stage=stage,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        environment={},
    )


def advance(engine: Engine) -> None:
    with engine.accumulate(last=True):
        engine.backward(engine(torch.ones(3, WIDTH)).square().sum())
    engine.step(0.01)


def save_and_load(_group, folder: Path, name: str, stage: int) -> tuple[int, int, int]:
    """Live bytes beyond the engine's own: after the copies of a save, and at most in a load; and
    those of the largest tensor."""
    with silent():
        engine, checkpoints = make(name, stage), Checkpoints(folder)
        advance(engine)
        with LiveBytes() as saving:
            checkpoints.save(1, engine, Nowhere(), {})
        copied = saving.most
        checkpoints.wait()
        again = make(name, stage)
        with LiveBytes() as loading:
            assert checkpoints.load(again, Nowhere()) == (1, "")
        beyond = loading.most - loading.now
        checkpoints.save(2, again, Nowhere(), {})
        checkpoints.wait()
    return copied, beyond, 4 * WIDTH * WIDTH


@pytest.mark.parametrize(
    ("world", "name", "stage"),
    [(8, "ddp", 0), (2, "deepspeed", 1), (4, "deepspeed", 2), (2, "deepspeed", 3)],
)
def test_a_rank_needs_its_part_and_one_tensor(
    distributed, deepspeed_worlds, tmp_path, world, name, stage
):
    pool = distributed if name == "ddp" else deepspeed_worlds[world]
    answers = pool(save_and_load, world, tmp_path, name, stage)
    first, second = (saved_tensors(tmp_path / f"step-0000000{step}") for step in (1, 2))
    assert first.keys() == second.keys() and len(first) == 22 + 21 * 3
    for key, x in first.items():
        assert torch.equal(second[key], x), key
    state = sum(x.nbytes for x in first.values())
    for copied, beyond, largest in answers:
        assert 0 < copied <= state / world + 2 * largest
        assert beyond <= state / world + 2 * largest
    files = {path.name for path in (tmp_path / "step-00000002").iterdir()}
    assert files == {"state.json"} | {f"{kind}-{rank:05d}.pt" for rank in range(world)
                                      for kind in ("model", "optimizer")}  # fmt: skip
