"""Validation loss, and how equivariant the trained model is. Training's random state stays."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.batch import GeometricBatch, Sample
from data_pipeline.stream.stream import check_lengths, evaluation_batches
from data_pipeline.tasks.protocol import Task
from scaling.engine.base import Engine
from scaling.models import equivariance_error
from scaling.parallel.collectives import all_reduce_sum, global_sums, sum_over_ranks
from scaling.parallel.shard import SequenceShard
from scaling.runs.rows import Row
from scaling.train.objective import Objective
from scaling.train.settings import TrainSettings

Model = Callable[[GeometricBatch, SequenceShard | None], GeometricBatch]
PARTS = 8
"""Of the longest sequence, whose errors are told apart."""


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
        loss, weight, tokens = global_sums(total, weight, tokens, device=device)
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


class ErrorByPosition:
    """How far behind the start of their sequence answers are still right: gathers weighted errors
    of tokens in equal parts of [0, length), on the device.

    A row of an evaluation is one observation, since its tokens share their sequence: the standard
    error is that of a ratio of sums over rows, the error's and the weight's.

    Args:
        length: tokens of the longest sequence.
    """

    def __init__(self, length: int, device: torch.device | str = "cpu") -> None:
        self._bounds = [length * part // PARTS for part in range(PARTS + 1)]
        self._inner = torch.tensor(self._bounds[1:-1], device=device)
        # Of each part: rows, errors, weights, errors², errors · weights, weights².
        self._sums = torch.zeros(6, PARTS, dtype=torch.float64, device=device)

    def add(
        self, error: Float[Tensor, "b n"], weight: Float[Tensor, "b n"], shard: SequenceShard
    ) -> None:
        """This rank's tokens of some sequences: weighted errors and weights. Collective."""
        part = torch.bucketize(shard.index_on(error.device), self._inner, right=True)
        both = torch.stack([error, weight]).double()
        own = both.new_zeros(*both.shape[:2], PARTS).index_add_(2, part, both)
        e, w = all_reduce_sum(own, shard.group, "error_by_position")
        self._sums += torch.stack([(w > 0).double(), e, w, e * e, e * w, w * w]).sum(1) / shard.size

    def rows(self, unit: float) -> list[Row]:
        """Of each part where something counts: its first token and the one behind its last, loss in
        `unit`, and the loss's standard error; None where a single row counts. Collective."""
        columns = sum_over_ranks(self._sums.clone()).T.tolist()
        parts = []
        for (first, behind), (n, e, w, ee, ew, ww) in zip(
            pairwise(self._bounds), columns, strict=True
        ):
            if w > 0:
                loss = e / w
                spread = max(ee - 2 * loss * ew + loss * loss * ww, 0)  # sum of (e - loss w)²
                error = math.sqrt(spread * n / (n - 1)) / w / unit if n > 1.5 else None
                part = {"from": first, "to": behind, "loss": loss / unit}
                parts.append(part | {"standard_error": error})
        return parts
