"""A step's micro-batches, forward and backward, ask the device for nothing: counted on one that
has no values to give, as rank 3 of 8."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.prepare import ensure_bundled
from data_pipeline.stream.order import DataSlot
from data_pipeline.stream.stream import Stream
from data_pipeline.tasks.registry import build_task
from scaling.engine.base import DistributedDataParallelEngine
from scaling.models import MODELS, build
from scaling.observe.metrics import StepMeter
from scaling.ops.masked_rows import MaskedRows
from scaling.parallel.mesh import Mesh
from scaling.parallel.telemetry import innermost_range, measuring
from scaling.train.loop import Trainer
from scaling.train.objective import Objective
from scaling.train.settings import OptimSettings, TrainSettings
from tests.small_models import PlainModel

RANK, RANKS = 3, 8
META = torch.device("meta")
COPIES = ("_to_copy", "copy_")


class Waits(TorchDispatchMode):
    """What makes the host wait: a value asked for; in forward and backward a copy to the device,
    too, unless it is told not to wait (from pinned memory)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [x.device.type for x in args if isinstance(x, torch.Tensor)]
        if name == "_local_scalar_dense" and "meta" in given:
            self.found.append(name)
            return 1.0
        result = func(*args, **kwargs or {})
        made = result.device.type if isinstance(result, torch.Tensor) else "meta"
        waits = not (kwargs or {}).get("non_blocking", False)
        if waits and innermost_range() and name in COPIES and len({*given, made}) > 1:
            self.found.append(f"{name} {given} -> {made}")
        return result


class Centred(PlainModel):
    """Centring, and the token before: what models do with whole rows.
    `asks`: for what the host waits."""

    def __init__(self, vectors: int, asks: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(max(vectors, 1)))
        self.asks = asks

    def forward(self, batch, shard=None):
        rows = MaskedRows(batch.mask, shard)
        vectors = torch.cat([batch.points.unsqueeze(1), batch.vectors], 1)
        x, _ = rows.centre(vectors)
        x = x + rows.previous(x)
        if self.asks == "a value":
            x = x * x.sum().item()
        if self.asks == "a copy":
            x = x[..., torch.arange(x.shape[-1]).to(x.device)]
        return batch.replace(
            points=batch.points + self.weight[0] * x[:, 0], vectors=self.weight[0] * x[:, 1:]
        )


@pytest.fixture(scope="module", autouse=True)
def one_of_many():
    dist.Backend.register_backend(
        "fakedev", fake_pg._create_fake_pg, extended_api=True, devices=["cpu", "meta"]
    )
    store = fake_pg.FakeStore()
    dist.init_process_group("fakedev", store=store, rank=RANK, world_size=RANKS)
    yield
    dist.destroy_process_group()


def waits(task: Any, rows: int, asks: str = "", name: str = "") -> list[str]:
    """Of the micro-batches of one optimiser step, with the model of that name."""
    with torch.device(META):
        model: Any = Centred(task.vectors, asks)
        if name:
            model = build(name, task.vectors, task.scalars, **MODELS[name].tiny())
    mesh = Mesh(1, RANKS)
    objective = Objective(model, mesh, META, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    alone = dist.new_group([RANK])
    assert isinstance(alone, dist.ProcessGroup)
    engine = DistributedDataParallelEngine(objective, optimizer, 0.0, alone)
    seen = Waits()
    meter = StepMeter(META)
    stream: Any = Stream(
        task, "train", batch_size=2 * rows, micro_batch_size=rows, seed=0, max_length=1 << 20,
        slot=mesh.slot,
    )  # fmt: skip
    window = next(stream)
    stream.close()
    assert len(window) == 2 and mesh.slot == DataSlot(0, 1, RANK, RANKS)
    trainer = Trainer(engine, objective, stream, task, TrainSettings(), OptimSettings(), meter)
    with measuring(), seen:
        numbers, losses = trainer.add_gradients(window, stop=False)
    assert numbers.shape == (4,) and numbers.device == META
    assert [x.shape for x in losses] == [(rows,)] * 2
    assert next(model.parameters()).grad is not None  # the backward pass reached the first layer
    return seen.found


def bundled(tmp_path_factory, **options: Any) -> Any:
    path = str(tmp_path_factory.getbasetemp() / "bundled")
    ensure_bundled(path)
    return build_task("denoising", store=path, **options)


@pytest.mark.parametrize("name", ["", *MODELS])
def test_padded_and_packed_micro_batches_wait_for_nothing(tmp_path_factory, name):
    moves_points_alone = name in ("", "linear_motion")
    padded = bundled(tmp_path_factory) if moves_points_alone else build_task("recall")
    assert waits(padded, 3, name=name) == []
    assert waits(bundled(tmp_path_factory, packed_length=8000), 1, name=name) == []


def test_read_outs_wait_for_nothing():
    assert waits(build_task("recall", readout="marked"), 4) == []
    assert waits(build_task("recall", tokens=5), 2) == []  # shorter than the ranks are many


def test_one_value_asked_for_is_seen(tmp_path_factory):
    task = bundled(tmp_path_factory)
    assert waits(task, 3, asks="a value") == ["_local_scalar_dense"] * 2
    assert waits(task, 3, asks="a copy") == ["_to_copy ['cpu'] -> meta"] * 2
