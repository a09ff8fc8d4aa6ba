"""What one training step costs: time, exchanged bytes, memory; and beside the naive one."""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch
from scaling.engine.build import build_engine
from scaling.engine.loss import engine_loss
from scaling.execution import Execution
from scaling.experiments.experiment import Experiment, Point, row
from scaling.experiments.naive import straightforward
from scaling.experiments.options import Checked, Counts, Positive, StepOptions
from scaling.experiments.timing import medians, now
from scaling.models import build
from scaling.observe.memory import peak_bytes, reset_peak
from scaling.ops.tiles import set_execution
from scaling.parallel.collectives import Group, global_maxima
from scaling.parallel.shard import SequenceShard, redistribute_batch
from scaling.parallel.telemetry import measuring
from scaling.runs.identity import NotIdentity
from scaling.runs.rows import Row

Side = Literal["ours", "straightforward"]
SIDES: Sequence[Side] = get_args(Side)

REDUCTIONS = {"sum", "lengths"}
"""Operators that exchange by all-reduce; all others by one all-to-all a call."""


@dataclass(kw_only=True)
class StepCase(StepOptions):
    """A model and an input; all ranks share each sequence."""

    model: dict[str, Any]
    """`name` and options."""
    length: int
    """Tokens of a sequence."""
    execution: Execution = field(default_factory=Execution)


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


def training_step(
    case: StepCase,
    group: Group,
    device: torch.device,
    change: Callable[[nn.Module], object] = lambda model: None,
) -> Callable[[], None]:
    """Forward, backward and AdamW of a new model on a random batch; all ranks call it together.

    Args:
        change: is done to the model first.
    """
    torch.manual_seed(case.seed)
    natural = SequenceShard(case.length, group, "contiguous")
    batch = _random_batch(case, natural, device)
    options = {key: value for key, value in case.model.items() if key != "name"}
    model = build(case.model["name"], case.vectors, case.scalars, **options).to(device)
    set_execution(model, case.execution)
    change(model)
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

    def step() -> None:
        engine.backward(engine_loss(engine(batch), case.rows * case.length, engine.world))
        engine.step(1e-3)

    return step


def measure_step(case: StepCase, group: Group, device: torch.device) -> StepCost:
    """The step, repeated; every rank of `group` calls it and gets the same."""
    step = training_step(case, group, device)
    gc.collect()
    base = reset_peak(device)
    seconds, waits = [], []
    for _ in range(case.warmup_steps + case.steps):
        began = now(device)
        with measuring(device) as measured:
            step()
        seconds.append(now(device) - began)
        waits.append(sum(count.seconds for count in measured.exchanges.values()))
    counts = measured.exchanges.items()  # every step exchanges the same
    step_s, comm_s, sent, exchanges, peak, base = global_maxima(
        statistics.median(seconds[case.warmup_steps :]),
        statistics.median(waits[case.warmup_steps :]),
        measured.sent_bytes,
        sum(count.calls for name, count in counts if name not in REDUCTIONS),
        peak_bytes(device),
        base,
        group=group,
        device=device,
    )
    speed = case.rows * case.length / step_s
    return StepCost(speed, step_s, comm_s, sent, exchanges, peak, base)


@dataclass
class TrainStepOptions(Checked):
    """
    Args:
        models: sections like `model`, under names for the table.
        lengths: N, tokens of the one sequence of a step.
        vectors: free vector channels of the input, besides the points.
        scalars: scalar channels of the input.
        seconds: of every comparison; at least three rounds.
        execution: how our side runs.
        sides: those that one process measures; its points choose them.
    """

    models: dict[str, dict[str, Any]]
    lengths: Annotated[Counts, NotIdentity()]
    vectors: int = 0
    scalars: int = 16
    seconds: Positive = 10.0
    execution: Execution = field(default_factory=Execution)
    sides: Sequence[Side] = SIDES


def _points(options: TrainStepOptions) -> list[Point]:
    """Memory is a process's own, so each side has one."""
    return [
        Point(f"{name}_N{n}_{what}", 1,
              replace(options, models={name: model}, lengths=[n], sides=sides))
        for name, model in options.models.items()
        for n in sorted(options.lengths)
        for what, sides in [("time", SIDES), *((f"memory_{side}", [side]) for side in SIDES)]
    ]  # fmt: skip


def train_step_rows(options: TrainStepOptions, group: Group, device: torch.device) -> list[Row]:
    """Of one model and length: both sides in turn, or the memory of one side."""
    ((name, model),), (length,) = options.models.items(), options.lengths
    case = StepCase(
        model=model,
        length=length,
        execution=options.execution,
        vectors=options.vectors,
        scalars=options.scalars,
    )
    changes = {"ours": lambda model: None, "straightforward": straightforward}
    steps = {side: training_step(case, group, device, changes[side]) for side in options.sides}
    if len(steps) > 1:
        times = medians(steps, group, device, options.seconds)
        speed_up = times["straightforward"] / times["ours"]
        title = f"{name}: speed-up over the straightforward step"
        return [
            row(title, 1, length, times["ours"], "s", speed_up),
            *(row(f"{name}: step, {side}", 1, length, times[side]) for side in SIDES),
        ]
    ((side, step),) = steps.items()
    reset_peak(device)
    step()
    step()  # now with the optimiser's state
    return [row(f"{name}: memory, {side}", 1, length, peak_bytes(device), "B")]


def _conclude(_options: TrainStepOptions, rows: list[Row]) -> tuple[list[Row], str]:
    """How much more memory the straightforward step takes."""
    found = list(rows)
    for name, length in dict.fromkeys((r["case"].partition(":")[0], r["length"]) for r in rows):
        ours, theirs = (
            next(r for r in rows if (r["case"], r["length"]) == (f"{name}: memory, {side}", length))
            for side in SIDES
        )
        title = f"{name}: memory, straightforward / ours"
        found.append(row(title, 1, length, ours["value"], "B", theirs["value"] / ours["value"]))
    return found, "Memory is the peak of a whole process over two steps."


GOALS = {
    f"{name}: speed-up over the straightforward step": (">=", 3.0) for name in ("paper", "default")
}
BENCH = Experiment(TrainStepOptions, _points, train_step_rows, GOALS, _conclude)


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
