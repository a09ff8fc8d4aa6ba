"""What only a GPU can show: the numbers of a CPU, a host that never waits, runs over NCCL."""

import json
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from scaling.cost.planner import Job, memory_by_part
from scaling.cost.trace import forward_and_backward, random_batch
from scaling.execution import Execution
from scaling.models import MODELS
from scaling.ops.tiles import set_execution
from scaling.parallel.shard import SequenceShard
from tests import processes
from tests.long_conv_cases import TOLERANCE, Case
from tests.small_models import small_batch, small_model
from tests.threaded_ranks import run_threaded
from tests.unit.scaling.test_long_conv_ranks import random_case

pytestmark = pytest.mark.gpu
GPU = "cuda"
LOOSE = {torch.float64: 1e-9, torch.float32: 2e-4}
"""Of whole models, relative to the norm."""
TRAIN = ["experiment=recall", "device=cuda", "train.log_every=1", "train.evaluate_every=10",
         "train.save_every=5", "task.held_out_size=4"]  # fmt: skip


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request):
    """high: TF32, which the long convolution must not feel."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(usual)


@pytest.mark.parametrize("world, cases", [(1, 60), (2, 60), (3, 40), (4, 30), (8, 15)])
def test_any_long_convolution_equals_the_cpus(world, cases, matmul_precision):
    """Sharded over ranks that are threads, on one GPU."""
    random = Random(100 * world)
    some = [random_case(random) for _ in range(cases)]

    def errors_of(group: Any, cases: list[Case]) -> list[float]:
        return [case.error(group, GPU) for case in cases]

    for errors in run_threaded(errors_of, world, some):
        for error, case in zip(errors, some, strict=True):
            assert error <= TOLERANCE[case.dtype], f"{error} on {world} ranks: {case}"


def results(name: str, dtype: torch.dtype, device: str, group: Any, sharded: bool) -> list[Tensor]:
    """Outputs and parameters' gradients; a shard's outputs are gathered, its gradients its own."""
    model = small_model(name, dtype).to(device)
    batch = small_batch([37, 9, 20], dtype)
    shard = SequenceShard(37, group) if sharded else None
    batch = (batch.map(shard.scatter) if shard else batch).to(device)
    out = model(batch, shard)
    outputs = [out.points, out.vectors, out.scalars]
    mask = batch.mask
    loss = sum((x.nan_to_num().square() * mask.reshape(3, *[1] * (x.ndim - 2), -1)).sum()
               for x in outputs)  # fmt: skip
    assert isinstance(loss, Tensor)
    loss.backward()
    outputs = [shard.gather(x.detach()) if shard else x.detach() for x in outputs]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [x.nan_to_num() for x in outputs] + grads


def relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    floor = 1e-3 * torch.stack([y.double().norm() for y in b]).norm()
    return max(((x.cpu() - y).double().norm() / y.double().norm().maximum(floor)).item()
               for x, y in zip(a, b, strict=True))  # fmt: skip


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_the_cpus(name, dtype):
    expected = results(name, torch.float64, "cpu", None, False)
    ours = results(name, dtype, GPU, None, False)
    assert relative_error(ours, expected) < LOOSE[dtype]


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_model_equals_the_cpus(name):
    expected = results(name, torch.float64, "cpu", None, False)

    def sharded(group: Any) -> list[Tensor]:
        return results(name, torch.float64, GPU, group, True)

    ranks = run_threaded(sharded, 3)
    assert all(relative_error(each[:3], expected[:3]) < 1e-9 for each in ranks)
    summed = [torch.stack(some).sum(0) for some in zip(*(each[3:] for each in ranks), strict=True)]
    assert relative_error(summed, expected[3:]) < 1e-9


def model_on_gpu(name: str, execution: Execution, tokens: int, **options: Any) -> tuple[Any, Any]:
    model = small_model(name, torch.float32, **options).to(GPU)
    set_execution(model, execution)
    return model, random_batch(model, 1, tokens).to(GPU)


@pytest.mark.parametrize("name", ["hyena", "se3_hyena", "se3_hyena_paper", "transformer"])
def test_a_step_does_not_wait_for_the_gpu(name):
    model, batch = model_on_gpu(name, Execution(), 4096)
    forward_and_backward(model, batch)  # tables are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("execution", [
    Execution(tile_bytes=1 << 22), Execution(tile_bytes=1 << 22, recompute_operators=True),
    Execution(offload="host"),
], ids=["tiles", "operators again", "offload"])  # fmt: skip
def test_ways_to_run_a_model_agree(execution):
    gradients = []
    for way in (Execution(), execution):
        model, batch = model_on_gpu("se3_hyena", way, 4096)
        forward_and_backward(model, batch)
        gradients.append([p.grad.cpu() for p in model.parameters()])
    assert relative_error(gradients[1], gradients[0]) < 1e-4


@pytest.mark.parametrize("tokens", [1 << 14, 1 << 17])
@pytest.mark.parametrize("name", ["hyena", "se3_hyena"])
def test_memory_is_foreseen(name, tokens):
    """Within 5 % of what the allocator was asked for."""
    options = {"channels": 16} if name == "se3_hyena" else {}
    model, batch = model_on_gpu(name, Execution(), tokens, **options)
    data = torch.cuda.memory_allocated()
    for _ in range(2):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        forward_and_backward(model, batch)
    peak = torch.cuda.max_memory_allocated() - data
    job = Job(model.cpu(), Execution(), tokens, 1, 1, 1, 1, 0, 0, device=GPU)
    parts = memory_by_part(job, job.trace())
    activations = sum(parts.values()) - parts["parameters and gradients"] - parts["optimiser"]
    assert activations == pytest.approx(peak, rel=0.05)


def train(folder: Path, *told: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "launch.train", *TRAIN, "name=run", *told]
    places = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    ran = processes.run(command, cwd=folder, env=environment, timeout=150)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    rows = map(json.loads, (folder / "runs/run/metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("engine", [["engine=ddp"], ["engine=deepspeed"],
                                    ["engine=deepspeed", "engine.zero_stage=3"]])  # fmt: skip
def test_training_stopped_and_resumed_gives_the_same_curve(tmp_path, engine):
    """And peaks of memory are the GPU's."""
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = train(tmp_path / "straight", "train.steps=10", *engine)
    train(tmp_path / "stopped", "train.steps=5", *engine)
    stopped = train(tmp_path / "stopped", "train.steps=10", *engine)
    assert [row["step"] for row in stopped] == list(range(1, 11))
    assert [row["loss"] for row in stopped] == pytest.approx([row["loss"] for row in straight])


def test_compiled_parts_train_alike(tmp_path):
    losses = []
    for compiled in ("false", "true"):
        (tmp_path / compiled).mkdir()
        rows = train(
            tmp_path / compiled, "train.steps=6", "engine=ddp", f"execution.compile={compiled}"
        )
        losses.append([row["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
