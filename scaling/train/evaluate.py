"""Validation loss, and how equivariant the trained model is. Training's random state stays."""

import math
from dataclasses import dataclass
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.batch import Sample
from data_pipeline.stream.stream import MicroBatch, check_lengths, evaluation_batches
from data_pipeline.tasks.protocol import Task
from scaling.engine.base import Engine
from scaling.parallel.collectives import global_sums
from scaling.parallel.shard import SequenceShard
from scaling.runs.rows import Row
from scaling.train.error_by_position import ErrorByPosition
from scaling.train.objective import Objective
from scaling.train.settings import TrainSettings

TRANSLATION = 100.0
"""Length of the translation that equivariance is tried with; Å for molecules."""


@dataclass
class Evaluation:
    """How the present parameters do on one split."""

    engine: Engine
    objective: Objective
    task: Task
    train: TrainSettings
    device: torch.device

    def row(self, step: int, split: str = "validation") -> Row:
        """Loss over every sample of the split once, in units of the trivial answer, by depth where
        tokens have targets, and the equivariance error of its first micro-batch. Collective."""
        began = perf_counter()
        total = weight = tokens = 0.0
        equivariance = None
        mesh = self.objective.mesh
        check_lengths(self.task, split, self.train.max_length)
        error_by_position = ErrorByPosition(
            self.task.length(split, self.task.longest(split)), self.device
        )
        batches = evaluation_batches(
            self.task,
            split,
            micro_batch_size=self.train.micro_batch_size,
            max_length=self.train.max_length,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp,
            sp_rank=mesh.sp_rank,
            sp_size=mesh.sp,
        )
        devices = [self.device] if self.device.type == "cuda" else []
        with self.engine.evaluating(), torch.random.fork_rng(devices):
            for batch in batches:
                sample = self.place(batch)
                local_sum, *moved = self.engine(sample, batch.length)
                total += local_sum.double().item()
                weight += self.objective.weight(sample).double().item()
                tokens += batch.tokens / mesh.sp
                if sample.per_token:
                    shard = SequenceShard(batch.length, mesh.sequence_group)
                    errors = self.objective.token_errors(moved[0], sample, shard)
                    error_by_position.add(*errors, shard)
                if equivariance is None:
                    equivariance = self._equivariance_error(sample, batch.length, *moved)
        total, weight, tokens = global_sums(total, weight, tokens, device=self.device)
        row = {
            "step": step,
            "split": split,
            "loss": total / weight / self.task.unit,
            "tokens": round(tokens),
            "step_s": perf_counter() - began,
            "equivariance_error": equivariance,
        }
        parts = error_by_position.parts(self.task.unit)
        return row | ({"error_by_position": parts} if parts else {})

    def place(self, batch: MicroBatch) -> Sample:
        dtype = torch.float64 if self.train.precision == "float64" else torch.float32
        return batch.sample.to(self.device, dtype)

    def _equivariance_error(
        self, sample: Sample, length: int, points: Tensor, vectors: Tensor
    ) -> float:
        """rms of f(Rx + t) - (R f(x) + t) over valid tokens, divided by the rms of f(x) - x, for a
        random rotation R and translation t; points and free vectors alike. Collective.

        Args:
            sample, length: x, this rank's contiguous tokens of a micro-batch.
            points, vectors: f(x), this rank's cyclic tokens.
        """
        random = torch.Generator().manual_seed(0)
        rotation = random_rotation(random).to(self.device)
        direction = torch.randn(3, 1, generator=random, dtype=torch.float64).to(self.device)
        shift = TRANSLATION * direction / direction.norm()

        def turned(points: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
            return rotation @ points.double() + shift, rotation @ vectors.double()

        given = sample.inputs
        turned_points, turned_vectors = turned(given.points, given.vectors)
        other = given.replace(
            points=turned_points.to(given.points.dtype),
            vectors=turned_vectors.to(given.vectors.dtype),
        )
        _, points_after, vectors_after = self.engine(
            Sample(other, sample.target, sample.weight), length
        )
        points_wanted, vectors_wanted = turned(points, vectors)
        inputs, _ = self.objective.enter(given, length)  # in the outputs' order
        valid = inputs.mask.unsqueeze(1)
        error = _square(points_after - points_wanted, valid)
        error += _square(vectors_after - vectors_wanted, valid.unsqueeze(1))
        change = _square(points - inputs.points, valid)
        change += _square(vectors - inputs.vectors, valid.unsqueeze(1))
        error, change = global_sums(error, change, device=self.device)
        return math.sqrt(error / change) if change > 0 else math.nan


def random_rotation(random: torch.Generator) -> Float[Tensor, "3 3"]:
    """Uniformly distributed, float64: a random unit quaternion's matrix."""
    w, *xyz = torch.nn.functional.normalize(
        torch.randn(4, generator=random, dtype=torch.float64), dim=0
    )
    x, y, z = xyz
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + 2 * w * cross + 2 * cross @ cross


def _square(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, x.double(), 0.0).square().sum()
