"""Validation loss, and how equivariant the trained model is. Training's random state stays."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from data_pipeline.batch import GeometricBatch, Sample
from data_pipeline.stream.stream import check_lengths, evaluation_batches
from data_pipeline.tasks.protocol import Task
from scaling.engine.base import Engine
from scaling.models import equivariance_error
from scaling.parallel.collectives import sum_over_ranks
from scaling.parallel.shard import SequenceShard
from scaling.runs.rows import Row
from scaling.train.error_by_position import ErrorByPosition
from scaling.train.objective import Objective
from scaling.train.settings import TrainSettings

Model = Callable[[GeometricBatch, SequenceShard | None], GeometricBatch]


@dataclass
class Evaluation:
    """How the present parameters do on one split."""

    engine: Engine
    objective: Objective
    task: Task
    train: TrainSettings

    def row(self, step: int, split: str = "validation") -> Row:
        """Loss over every sample of the split once, in units of the trivial answer, by position
        where tokens have targets, and the equivariance error of its first micro-batch.
        Collective."""
        began = perf_counter()
        objective, slot = self.objective, self.objective.mesh.slot
        device = torch.device(objective.device)
        check_lengths(self.task, split, self.train.max_length)
        longest = self.task.length(split, self.task.longest(split))
        by_position = ErrorByPosition(longest, device)
        batches = evaluation_batches(
            self.task,
            split,
            micro_batch_size=self.train.micro_batch_size,
            max_length=self.train.max_length,
            slot=slot,
        )
        total = torch.zeros((), dtype=torch.float64, device=device)
        weight, tokens, equivariance = 0.0, 0.0, None
        devices = [device] if device.type == "cuda" else []
        with self.engine.evaluating(), torch.random.fork_rng(devices):
            for sample in batches:
                weight += objective.weight(sample)
                tokens += sample.tokens / slot.sp
                sample, shard = objective.enter(objective.place(sample))
                local_sum, errors, moved = self.engine(sample, shard)
                total += local_sum
                if sample.per_token:
                    by_position.add(errors, sample.weight, shard)
                if equivariance is None:
                    engine = self._as_model(sample, moved)
                    equivariance = equivariance_error(engine, sample.inputs, shard)
        counts = torch.tensor([weight, tokens], dtype=torch.float64, device=device)
        loss, weight, tokens = sum_over_ranks(torch.cat([total.view(1), counts])).tolist()
        row = {
            "step": step,
            "split": split,
            "loss": loss / weight / self.task.unit,
            "tokens": round(tokens),
            "step_s": perf_counter() - began,
            "equivariance_error": equivariance,
        }
        parts = by_position.rows(self.task.unit)
        return row | ({"error_by_position": parts} if parts else {})

    def _as_model(self, sample: Sample, moved: GeometricBatch) -> Model:
        """The trained model, called through the engine; what it makes of the sample is known."""

        def model(batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
            if batch is sample.inputs:
                return moved
            return self.engine(replace(sample, inputs=batch), shard)[2]

        return model
