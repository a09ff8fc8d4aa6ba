"""Models under the engines: 20 steps of training do not show how many ranks there were.

Real processes at sp 2 and dp 2 x sp 2; test_models.py shows other worlds and every model on
threads.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import Sample
from scaling.engine.build import build_engine
from scaling.engine.loss import engine_loss
from scaling.parallel.collectives import global_sums
from scaling.parallel.mesh import Mesh
from scaling.parallel.shard import SequenceShard
from scaling.train.objective import Objective
from tests.distributed.test_engine import relative, silent
from tests.small_models import small_batch, small_model
from tests.states import whole_parameters

LENGTHS = [13, 5, 9, 1, 12, 13, 7, 2]
STEPS, RATE = 20, 0.02
ENGINES = [
    ("ddp", 0, torch.float64, 1e-10),
    *[("deepspeed", z, torch.float32, 1e-5) for z in (0, 1, 2, 3)],
]
SMALL = {
    "se3_hyena": {"operators": 1, "hidden": 3, "gate_hidden": 2},
    "equivariant_transformer": {"blocks": 1},
    "egnn": {"layers": 2},
}
"""Options of one of each way to mix tokens. ZeRO 0 to 2 treat all modules alike: one shows them."""
MESHES = {2: (1, 2), 4: (2, 2)}


def whole_sample(dtype: torch.dtype) -> Sample:
    """Points to be moved back to where they were before noise; weight where they are valid."""
    batch = small_batch(LENGTHS, dtype)
    noise = torch.randn(batch.points.shape, generator=torch.Generator().manual_seed(1))
    weight = batch.mask.to(dtype)
    return Sample(batch, batch.points.nan_to_num() + noise.to(dtype), weight)


def one_process(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain loop that everybody knows."""
    model, sample = small_model(name, dtype, **SMALL[name]), whole_sample(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        squares = (model(sample.inputs).points - sample.target).square().sum(1) / 3
        optimizer.zero_grad()
        ((squares * sample.weight).sum() / sample.weight.sum()).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def on_a_mesh(mesh: Mesh, name: str, engine_name: Any, stage: int, dtype: torch.dtype):
    sample = whole_sample(dtype)
    rows = slice(mesh.slot.dp_rank, None, mesh.slot.dp)
    lengths = tuple(LENGTHS[rows])
    shard = SequenceShard(max(lengths), mesh.sequence_group, "contiguous")

    def cut(x: Tensor) -> Tensor:
        return shard.scatter(x[rows, ..., : max(lengths)])

    inputs = sample.inputs.map(cut).replace(lengths=lengths)
    part = Sample(inputs, cut(sample.target), cut(sample.weight))
    objective = Objective(small_model(name, dtype, **SMALL[name]), mesh)
    engine = build_engine(
        engine_name,
        objective,
        lambda parameters: torch.optim.SGD(parameters, lr=RATE),
        gradient_clipping=0.0,
        micro_batch_size=len(LENGTHS) // mesh.slot.dp,
        accumulation=1,
        precision="float64" if dtype == torch.float64 else "float32",
        zero_stage=stage,
        environment={},
    )
    for _ in range(STEPS):
        (weight,) = global_sums(objective.weight(part))
        with engine.accumulate(last=True):
            local_sum, *_ = engine(*objective.enter(part))
            engine.backward(engine_loss(local_sum, weight, engine.world))
        engine.step(RATE)
    return {key.removeprefix("model."): value for key, value in whole_parameters(engine).items()}


def error(_group, name: str, engine_name: str, stage: int, dtype: torch.dtype) -> float:
    with silent():
        values = on_a_mesh(Mesh(*MESHES[dist.get_world_size()]), name, engine_name, stage, dtype)
    return relative(values, one_process(name, dtype)) if dist.get_rank() == 0 else 0.0


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("world", MESHES)
def test_training_equals_one_process(deepspeed_worlds, world, name):
    """float64 under DDP, float32 under ZeRO 0 to 3."""
    for engine_name, stage, dtype, tolerance in ENGINES:
        if name != "se3_hyena" and engine_name == "deepspeed" and stage < 3:
            continue
        errors = deepspeed_worlds[world](error, world, name, engine_name, stage, dtype)
        assert max(errors) <= tolerance, (engine_name, stage)


def test_training_moves_the_parameters():
    """Else the comparison could not fail."""
    for name in SMALL:
        start = dict(small_model(name, torch.float64, **SMALL[name]).named_parameters())
        start = {key: value.detach() for key, value in start.items()}
        assert relative(one_process(name, torch.float64), start) > 1e-2
