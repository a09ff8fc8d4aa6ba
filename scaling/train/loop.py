"""The training loop, and what one optimiser step is."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from data_pipeline.batch import Sample
from data_pipeline.stream.order import DataSlot
from data_pipeline.stream.stream import Stream, check_lengths
from data_pipeline.tasks.protocol import Task
from scaling.checkpoint.checkpoint import Checkpoints
from scaling.engine.base import Engine
from scaling.engine.build import build_engine
from scaling.engine.loss import check_weight, engine_loss
from scaling.models import Model
from scaling.observe.metrics import StepMeter
from scaling.observe.profile import StepProfiler
from scaling.parallel.collectives import first_rank_says, sum_over_ranks
from scaling.parallel.mesh import Mesh
from scaling.parallel.telemetry import timed
from scaling.runs.folder import RunFolder
from scaling.runs.rows import NOT_FINITE, Row
from scaling.train.evaluate import Evaluation
from scaling.train.not_finite import LeftOut, not_finite_row
from scaling.train.objective import Objective
from scaling.train.report import Reporter, Summary
from scaling.train.settings import EngineSettings, OptimSettings, TrainSettings
from scaling.train.stop import StopRequest

UNWATCHED = nullcontext()


def fit(
    model: Model,
    task: Task,
    mesh: Mesh,
    train: TrainSettings,
    optim: OptimSettings,
    engine: EngineSettings,
    run: RunFolder,
    device: torch.device,
    watch: AbstractContextManager[object] = UNWATCHED,
) -> Summary:
    """Trains to the last step, from the newest checkpoint of the run if it has one.

    Collective: every rank calls it with the same parameters and settings. The result depends on
    neither the number of ranks, the engine nor the micro-batch size. Stops early, after a
    checkpoint, when a signal or a STOP file asks any rank. The first rank prints.

    Args:
        watch: around the steps; says where the ranks are.

    Raises:
        ConfigError: settings that cannot work together.
        RunError: loss or gradient left the finite numbers (see LeftOut), or the checkpoint does not
            fit.
    """

    def due(step: int) -> bool:
        """Whether this step is evaluated."""
        return step == train.steps or step % train.evaluate_every == 0

    with Reporter(run, task, train.steps) as report, StopRequest(run.stop_file) as stop:
        trainer = build_trainer(model, task, mesh, train, optim, engine, device)
        evaluation = Evaluation(trainer.engine, trainer.objective, task, train)
        losses = run.validation_losses
        checkpoints = Checkpoints(run.checkpoints, train.keep_last, train.keep_best, losses)
        profiler = StepProfiler(run.path / "profile", train.profile_steps, report.say)
        with closing(trainer.stream) as stream, closing(checkpoints), profiler, watch:
            step, damage = checkpoints.load(trainer.engine, stream)
            report.start(step, damage)
            left_out = LeftOut(train, optim, run)
            if step and due(step) and first_rank_says(lambda: step not in losses()):
                report.row(evaluation.row(step))  # it had been saved, but not evaluated
            stopped = False
            while step < train.steps and not stopped:
                step += 1
                with profiler.step(step), trainer.meter.step(step):
                    row, stopped = trainer.step(step, stop.asked() or checkpoints.failed)
                last = step == train.steps
                if row["split"] == NOT_FINITE:
                    report.row(row)
                    left_out.add(row)  # or that is the end
                elif last or step % train.log_every == 0:
                    report.row(row | trainer.meter.row() | left_out.row())
                save = last or stopped or step % train.save_every == 0
                if save:  # first: whatever becomes of the evaluation, the step is kept
                    checkpoints.save(step, trainer.engine, stream, run.identity())
                if due(step):
                    report.row(evaluation.row(step))
                report.advance(step, save)
            checkpoints.wait()
        return report.finish(step)


@dataclass
class Trainer:
    """What takes an optimiser step."""

    engine: Engine
    objective: Objective
    stream: Stream
    task: Task
    train: TrainSettings
    optim: OptimSettings
    meter: StepMeter

    def step(self, step: int, stop: bool) -> tuple[Row, bool]:
        """One optimiser step, which is the row's; and whether any rank wants to stop after it. If
        loss or gradient are not finite, nothing moves, and the row says why (not_finite.py)."""
        with timed("data_wait"):
            window = next(self.stream)
        numbers, losses = self.add_gradients(window, stop)
        total, weight, tokens, stops = numbers.tolist()  # here the host waits for the device
        check_weight(weight)
        loss = total / weight / self.task.unit
        rate = learning_rate(step, self.train.steps, self.optim)
        with timed("optimizer"):
            norm = self.engine.step(rate, move=math.isfinite(loss))
        self.meter.tokens = round(tokens)
        row = {"step": step, "split": "train", "loss": loss, "grad_norm": norm, "lr": rate}
        if not (math.isfinite(loss) and math.isfinite(norm)):
            row = not_finite_row(step, loss, norm, losses, self.stream.names())
        return row, stops > 0

    def add_gradients(
        self, window: Sequence[Sample], stop: bool
    ) -> tuple[Float64[Tensor, "4"], list[Float[Tensor, " b"]]]:
        """Adds up the gradients of a step's micro-batches; nothing in it waits for the device.

        Returns, over all ranks: the loss sum, its weight, the tokens, and who wants to stop; and
        this rank's loss sum of every row, by micro-batch.
        """
        objective, sp = self.objective, self.objective.mesh.slot.sp
        own = sum(map(objective.weight, window)), sum(s.tokens for s in window) / sp, float(stop)
        counts = torch.tensor(own, dtype=torch.float64, device=objective.device)
        weight = sum_over_ranks(counts)[0] * self.task.unit
        samples = [objective.place(sample) for sample in window]
        total, losses = counts.new_zeros(1), []
        for number, sample in enumerate(samples):
            with self.engine.accumulate(last=number == len(window) - 1):
                with timed("forward"):
                    local_sum, errors, _ = self.engine(*objective.enter(sample))
                    total += local_sum.detach()
                    losses.append(errors.detach().unsqueeze(1).flatten(1).sum(1))
                with timed("backward"):
                    self.engine.backward(engine_loss(local_sum, weight, self.engine.world))
        return torch.cat([sum_over_ranks(total), counts]), losses


def build_trainer(
    model: Model,
    task: Task,
    mesh: Mesh,
    train: TrainSettings,
    optim: OptimSettings,
    engine: EngineSettings,
    device: torch.device,
) -> Trainer:
    """Engine, stream and meter of one rank."""
    check_lengths(task, "validation", train.max_length)  # now, not at the first evaluation
    stream = training_stream(task, train, mesh.slot)
    objective = Objective.for_run(model, mesh, train, device)
    wrapped = build_engine(
        engine.name,
        objective,
        optimizer_maker(optim),
        gradient_clipping=optim.gradient_clipping,
        micro_batch_size=train.micro_batch_size,
        accumulation=train.batch_size // (mesh.slot.dp * train.micro_batch_size),
        precision=train.precision,
        zero_stage=engine.zero_stage,
        deepspeed=engine.deepspeed_config,
    )
    return Trainer(wrapped, objective, stream, task, train, optim, StepMeter(device))


def training_stream(task: Task, train: TrainSettings, slot: DataSlot) -> Stream:
    """What a rank in that place reads, step by step."""
    return Stream(
        task,
        "train",
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=train.seed,
        max_length=train.max_length,
        bucket_steps=train.bucket_steps or 1,
        slot=slot,
    )


def learning_rate(step: int, steps: int, optim: OptimSettings) -> float:
    """The rate of optimiser step `step`, counted from 1, of `steps`.

    Rises linearly over the first warmup_steps to lr, then follows a cosine down to
    lr · final_lr_ratio at the last step, or stays.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
    fall = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return optim.lr * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * fall)


def optimizer_maker(optim: OptimSettings) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """Makes the optimiser once the parameters are where they stay."""
    options: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if optim.name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, **options)
    return lambda parameters: torch.optim.AdamW(parameters, betas=optim.betas, **options)
