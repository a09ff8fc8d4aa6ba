"""What one training step costs: time, exchanged bytes, memory."""

import gc
import statistics
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.models import build
from scaling.observe.memory import peak_bytes, reset_peak
from scaling.parallel.collectives import Group, traffic
from scaling.parallel.engine import build_engine
from scaling.parallel.loss import engine_loss, global_maxima
from scaling.parallel.shard import SequenceShard, redistribute_batch

REDUCTIONS = {"sum", "lengths"}
"""Operators that exchange by all-reduce; all others by one all-to-all a call."""


@dataclass
class StepCase:
    """A model and an input; all ranks share each sequence."""

    model: dict[str, Any]
    """`name` and options."""
    length: int
    """Tokens of a sequence."""
    rows: int = 1
    """Sequences."""
    vectors: int = 1
    scalars: int = 4
    warmup_steps: int = 1
    steps: int = 5
    """Timed steps; times are medians."""
    seed: int = 0


@dataclass
class StepCost:
    """A median step of the slowest rank, and the memory of the rank that has most."""

    tokens_per_s: float
    """All ranks together."""
    step_s: float
    comm_s: float
    """Waiting in the sequence's exchanges."""
    comm_bytes: float
    """Sent by the rank that sends most; gradients not counted."""
    all_to_alls: float
    peak_bytes: float
    base_bytes: float
    """Memory before the first step: interpreter, libraries, parameters."""


def measure_step(case: StepCase, group: Group, device: torch.device) -> StepCost:
    """Forward, backward and AdamW, repeated; every rank of `group` calls it and gets the same."""
    torch.manual_seed(case.seed)
    natural = SequenceShard(case.length, group, "contiguous")
    batch = _random_batch(case, natural, device)
    options = {key: value for key, value in case.model.items() if key != "name"}
    model = build(case.model["name"], case.vectors, case.scalars, **options).to(device)
    engine = build_engine(
        "ddp",
        _MeanSquare(model, natural, SequenceShard(case.length, group)),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        gradient_clipping=1.0,
        micro_batch_size=case.rows,
        accumulation=1,
        environment={},  # how this process was launched does not matter here
        group=group,
    )
    gc.collect()
    base = reset_peak(device)
    seconds, waits = [], []
    for _ in range(case.warmup_steps + case.steps):
        traffic.reset()
        began = _now(device)
        engine.backward(engine_loss(engine(batch), case.rows * case.length, engine.world))
        engine.step(1e-3)
        seconds.append(_now(device) - began)
        waits.append(sum(count.seconds for count in traffic.snapshot().values()))
    step = traffic.snapshot()  # every step exchanges the same
    step_s, comm_s, sent, exchanges, peak, base = global_maxima(
        statistics.median(seconds[case.warmup_steps :]),
        statistics.median(waits[case.warmup_steps :]),
        sum(count.bytes for count in step.values()),
        sum(count.calls for name, count in step.items() if name not in REDUCTIONS),
        peak_bytes(device),
        base,
        group=group,
        device=device,
    )
    speed = case.rows * case.length / step_s
    return StepCost(speed, step_s, comm_s, sent, exchanges, peak, base)


class _MeanSquare(nn.Module):
    """This rank's sum of squares over all outputs, so that every parameter has a gradient."""

    def __init__(self, model: nn.Module, natural: SequenceShard, cyclic: SequenceShard) -> None:
        super().__init__()
        self.model, self.natural, self.cyclic = model, natural, cyclic

    def forward(self, batch: GeometricBatch) -> Tensor:
        # As in training: the batch arrives in natural order and goes to cyclic at the door.
        out = self.model(redistribute_batch(batch, self.natural, self.cyclic), self.cyclic)
        return out.points.square().sum() + out.vectors.square().sum() + out.scalars.square().sum()


def _random_batch(
    case: StepCase, shard: SequenceShard, device: torch.device | str
) -> GeometricBatch:
    random = torch.Generator().manual_seed(case.seed + shard.rank)

    def normal(*channels: int) -> Tensor:
        return torch.randn(case.rows, *channels, shard.n_local, generator=random)

    index = shard.index.expand(case.rows, -1).contiguous()
    batch = GeometricBatch(normal(3), normal(case.vectors, 3), normal(case.scalars), index)
    return batch.to(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
