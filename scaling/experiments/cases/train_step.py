"""What one training step costs: time, exchanged bytes, memory; and beside the naive one."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.engine.base import Engine
from scaling.engine.build import build_engine
from scaling.engine.loss import engine_loss
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.naive import straightforward
from scaling.experiments.options import Positive, Selection, StepOptions
from scaling.experiments.timing import medians, now, peak_of
from scaling.models import build
from scaling.observe.memory import peak_bytes, reset_peak
from scaling.ops.tiles import set_execution
from scaling.parallel.collectives import global_maxima, group_size
from scaling.parallel.mesh import Mesh
from scaling.parallel.shard import SequenceShard, redistribute_batch
from scaling.parallel.telemetry import measuring
from scaling.runs.rows import Row
from scaling.train.settings import EngineSettings

REDUCTIONS = {"sum", "lengths"}
"""Operators that exchange by all-reduce; all others by one all-to-all a call."""


@dataclass
class TrainingStep:
    """Forward, backward and AdamW; all ranks call it together."""

    engine: Engine
    batch: GeometricBatch
    weight: int
    """Of the loss: all tokens of all ranks."""

    def __call__(self) -> None:
        loss = engine_loss(self.engine(self.batch), self.weight, self.engine.world)
        self.engine.backward(loss)
        self.engine.step(1e-3)


def training_step(
    options: StepOptions,
    model: Mapping[str, Any],
    length: int,
    device: torch.device,
    change: Callable[[nn.Module], object] | None = None,
    dp: int = 1,
    settings: EngineSettings | None = None,
) -> TrainingStep:
    """That of a new model on a random batch of sequences that all ranks share, or all of a
    data-parallel rank.

    Args:
        model: `name` and options.
        change: is done to the model first.
        dp: data-parallel ranks, each with sequences of its own.
        settings: of the engine; None is DDP.
    """
    torch.manual_seed(options.seed)
    mesh = Mesh(dp, group_size(None) // dp)
    natural = SequenceShard(length, mesh.sequence_group, "contiguous")
    batch = _random_batch(options, natural).to(device)
    built = build(**model, vectors=options.vectors, scalars=options.scalars).to(device)
    set_execution(built, options.execution)
    if change:
        change(built)
    settings = settings or EngineSettings()
    shard = SequenceShard(length, mesh.sequence_group, built.layout)
    engine = build_engine(
        settings.name,
        _MeanSquare(built, natural, shard),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        gradient_clipping=1.0,
        micro_batch_size=options.rows,
        accumulation=1,
        zero_stage=settings.zero_stage,
        deepspeed=settings.deepspeed_config,
        environment={},  # how this process was launched does not matter here
    )
    return TrainingStep(engine, batch, dp * options.rows * length)


class _MeanSquare(nn.Module):
    """This rank's sum of squares over all outputs, so that every parameter has a gradient."""

    def __init__(self, model: nn.Module, natural: SequenceShard, shard: SequenceShard) -> None:
        super().__init__()
        self.model, self.natural, self.shard = model, natural, shard

    def forward(self, batch: GeometricBatch) -> Tensor:
        # As in training: the batch arrives in natural order and comes into the model's at the door.
        batch = redistribute_batch(batch, self.natural, self.shard)
        out = self.model(batch, self.shard)
        return out.points.square().sum() + out.vectors.square().sum() + out.scalars.square().sum()


def _random_batch(options: StepOptions, shard: SequenceShard) -> GeometricBatch:
    random = torch.Generator().manual_seed(options.seed + shard.rank)

    def normal(*channels: int) -> Tensor:
        return torch.randn(options.rows, *channels, shard.n_local, generator=random)

    index = shard.index.expand(options.rows, -1).contiguous()
    return GeometricBatch(normal(3), normal(options.vectors, 3), normal(options.scalars), index)


def step_cost(
    options: StepOptions,
    model: Mapping[str, Any],
    length: int,
    device: torch.device,
    warmup_steps: int,
    steps: int,
    dp: int = 1,
    settings: EngineSettings | None = None,
) -> Row:
    """A median step of the slowest rank, and the memory of the rank that has most; the keys are
    columns (experiments/columns.py)."""
    step = training_step(options, model, length, device, dp=dp, settings=settings)
    gc.collect()
    base = reset_peak(device)
    seconds, waits, transfers = [], [], []
    for _ in range(warmup_steps + steps):
        began = now(device)
        with measuring(device) as measured:
            step()
        seconds.append(now(device) - began)
        waits.append(measured.waited_s)
        transfers.append(measured.transfer_s)
    counts = measured.exchanges.items()  # every step exchanges the same
    timed = seconds[warmup_steps:]
    low, middle, high = quantiles(timed, n=4, method="inclusive") if steps > 1 else 3 * timed
    cost = {
        "step_s": middle,
        "step_low_s": low,
        "step_high_s": high,
        "comm_s": median(waits[warmup_steps:]),
        "transfer_s": median(transfers[warmup_steps:]),
        "comm_bytes": measured.sent_bytes,
        "all_to_alls": sum(count.calls for name, count in counts if name not in REDUCTIONS),
        "peak_bytes": peak_bytes(device),
        "base_bytes": base,
    }
    cost = dict(zip(cost, global_maxima(*cost.values(), device=device), strict=True))
    transfer = cost.pop("transfer_s")
    rate = dp * options.rows * length / cost["step_s"]
    return {
        "tokens_per_s": rate,
        "tokens_per_s_rank": rate / group_size(None),
        "comm_hidden": max(1 - cost["comm_s"] / transfer, 0.0) if transfer else None,
        **cost,
    }


SIDES = {"ours": None, "straightforward": straightforward}


@dataclass(kw_only=True)
class TrainStep(StepOptions, Experiment):
    """
    Args:
        models: sections like `model`, under names for the table.
        lengths: N, tokens of the one sequence of a step.
        seconds: of every comparison; at least three rounds.
    """

    models: dict[str, dict[str, Any]]
    lengths: Selection
    seconds: Positive = 10.0

    goals: ClassVar = {
        f"{name}: speed-up over the straightforward step": (">=", 3.0)
        for name in ("paper", "default")
    }

    def points(self) -> Iterator[Point]:
        """Memory is a process's own, so each side has one."""
        for name in self.models:
            for n in sorted(self.lengths):
                for side in ("", *SIDES):
                    yield Point(name, side, n)

    def measure(self, point: Point, device: torch.device) -> Iterator[Row]:
        """Both sides in turn, or the memory of one side."""
        name, side, n = point.part, point.side, point.length
        steps = {
            each: training_step(self, self.models[name], n, device, change)
            for each, change in SIDES.items()
            if side in ("", each)
        }
        if side:
            step = steps[side]
            # The second step has the optimiser's state.
            peak = peak_of(lambda: [step() for _ in range(2)], device)
            yield row(f"{name}: memory, {side}", peak, "B")
            return
        times = medians(steps, self.seconds, device)
        ratio = times["straightforward"] / times["ours"]
        yield row(f"{name}: speed-up over the straightforward step", times["ours"], "s", ratio)
        for each, seconds in times.items():
            yield row(f"{name}: step, {each}", seconds)

    def conclude(self, rows: list[Row]) -> tuple[list[Row], str]:
        """How much more memory the straightforward step takes."""
        held = {(r["case"], r["length"]): r for r in rows if ": memory, " in r["case"]}
        ratios = []
        for (case, length), ours in held.items():
            name, _, side = case.partition(": memory, ")
            if side == "ours":
                theirs = held[f"{name}: memory, straightforward", length]
                ratio = theirs["value"] / ours["value"]
                case = f"{name}: memory, straightforward / ours"
                ratios.append(ours | {"case": case, "ratio": ratio})
        return rows + ratios, "Memory is the peak of a whole process over two steps."
