"""Errors on a split, and how equivariant the trained model is. Training's random state stays."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch, Sample
from data_pipeline.stream.stream import check_lengths, evaluation_batches
from data_pipeline.tasks.protocol import Task
from scaling.engine.loss import check_weight
from scaling.models import equivariance_error
from scaling.parallel.collectives import all_reduce_sum, global_sums, sum_over_ranks
from scaling.parallel.shard import SequenceShard
from scaling.runs.rows import Row
from scaling.train.objective import Objective
from scaling.train.settings import EvaluationSettings

Model = Callable[[GeometricBatch, SequenceShard | None], GeometricBatch]
PARTS = 8
"""Of the longest sequence, whose errors are told apart."""


@dataclass
class Evaluation:
    """How the present parameters do on one split."""

    engine: Callable[[Sample, SequenceShard], tuple[Tensor, Tensor, GeometricBatch]]
    """Runs the objective: an engine around it, or the objective itself."""
    objective: Objective
    task: Task
    settings: EvaluationSettings

    def row(self, step: int, split: str = "validation") -> Row:
        """Loss over every sample of the split once, in units of the trivial answer, its standard
        error, both by position where tokens have targets, and the equivariance error of the first
        micro-batch. Collective."""
        began = perf_counter()
        objective, slot = self.objective, self.objective.mesh.slot
        device = torch.device(objective.device)
        check_lengths(self.task, split, self.settings.max_length)
        longest = self.task.length(split, self.task.longest(split))
        of_rows = ErrorOfRows(longest, device)
        batches = evaluation_batches(
            self.task,
            split,
            micro_batch_size=self.settings.micro_batch_size,
            max_length=self.settings.max_length,
            slot=slot,
        )
        tokens, equivariance = 0.0, None
        devices = [device] if device.type == "cuda" else []
        with evaluating(objective), torch.random.fork_rng(devices):
            for sample in batches:
                tokens += sample.tokens / slot.sp
                sample, shard = objective.enter(objective.place(sample))
                _, errors, moved = self.engine(sample, shard)
                of_rows.add(errors, sample.weight, shard)
                if equivariance is None:
                    engine = self._as_model(sample, moved)
                    equivariance = equivariance_error(engine, sample.inputs, shard)
        (tokens,) = global_sums(tokens, device=device)
        return {
            "step": step,
            "split": split,
            **of_rows.row(self.task.unit),
            "tokens": round(tokens),
            "step_s": perf_counter() - began,
            "equivariance_error": equivariance,
        }

    def _as_model(self, sample: Sample, moved: GeometricBatch) -> Model:
        """The trained model, called through the engine; what it makes of the sample is known."""

        def model(batch: GeometricBatch, shard: SequenceShard | None) -> GeometricBatch:
            if batch is sample.inputs:
                return moved
            assert shard is not None
            return self.engine(replace(sample, inputs=batch), shard)[2]

        return model


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()


class ErrorOfRows:
    """Gathers, on the device, the weighted errors of whole rows and, where tokens have targets, of
    equal parts of [0, length): how far behind the start of their sequence answers are still right.

    A row of an evaluation is one observation, since its tokens share their sequence: the standard
    error is that of a ratio of sums over rows, the error's and the weight's.

    Args:
        length: tokens of the longest sequence.
    """

    def __init__(self, length: int, device: torch.device | str = "cpu") -> None:
        self._bounds = [length * part // PARTS for part in range(PARTS + 1)]
        self._inner = torch.tensor(self._bounds[1:-1], device=device)
        # Of the whole, then of each part: rows, errors, weights, errors², errors · weights,
        # weights².
        self._sums = torch.zeros(6, 1 + PARTS, dtype=torch.float64, device=device)

    def add(
        self, error: Float[Tensor, " b *n"], weight: Float[Tensor, " b *n"], shard: SequenceShard
    ) -> None:
        """Weighted errors of some rows and weights: of this rank's tokens; or of targets per
        sequence, whose error every rank counts a share of. Collective."""
        if error.ndim == 1:
            e, w = torch.zeros(2, len(error), 1 + PARTS, dtype=torch.float64, device=error.device)
            e[:, 0], w[:, 0] = error.double() * shard.size, weight
        else:
            part = torch.bucketize(shard.index_on(error.device), self._inner, right=True)
            both = torch.stack([error, weight]).double()
            own = both.new_zeros(*both.shape[:2], 1 + PARTS).index_add_(2, part + 1, both)
            own[..., 0] = own.sum(-1)
            e, w = all_reduce_sum(own, shard.group, "error_by_position")
        self._sums += torch.stack([(w > 0).double(), e, w, e * e, e * w, w * w]).sum(1) / shard.size

    def row(self, unit: float) -> Row:
        """Loss in `unit`, its standard error, and how many rows count; the same `error_by_position`
        for each part where something counts, with its first token and the one behind its last. The
        standard error is None where a single row counts. Collective.

        Raises:
            RunError: nothing counts.
        """
        whole, *columns = sum_over_ranks(self._sums.clone()).T.tolist()
        check_weight(whole[2])
        parts = [
            {"from": first, "to": behind, **_ratio(column, unit)}
            for (first, behind), column in zip(pairwise(self._bounds), columns, strict=True)
            if column[2] > 0
        ]
        row = {**_ratio(whole, unit), "samples": round(whole[0])}
        return row | ({"error_by_position": parts} if parts else {})


def _ratio(sums: list[float], unit: float) -> dict[str, Any]:
    """Summed errors over summed weights, in `unit`, and the standard error of that."""
    n, e, w, ee, ew, ww = sums
    loss = e / w
    spread = max(ee - 2 * loss * ew + loss * loss * ww, 0)  # sum of (e - loss w)²
    error = math.sqrt(spread * n / (n - 1)) / w / unit if n > 1.5 else None
    return {"loss": loss / unit, "standard_error": error}
