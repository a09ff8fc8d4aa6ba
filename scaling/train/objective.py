"""From one rank's slice of a micro-batch to its part of the loss.

The slice arrives as it was read, contiguous; at the door it comes into the layout that the model
works in, once for all, and stays so: what is summed over tokens does not ask for their order. The
result is a sum over what this rank counts; dividing it by the weight of all ranks is the loss's
business (engine/loss.py).
"""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch, Sample
from scaling.models import Model
from scaling.ops.masked_rows import MaskedRows
from scaling.parallel.mesh import Mesh
from scaling.parallel.shard import SequenceShard, redistribute_sample
from scaling.train.settings import EvaluationSettings


class Objective(nn.Module):
    """A model and the squared error of its answers per coordinate, weight · |answer - target|² / 3.

    A sample says what answers: the moved points or the first vector channel, at every token or in
    the mean over the valid (or marked) tokens of a row.

    Args:
        device, dtype: where samples go, and as which floats; None leaves them as they are.
        bf16: run the model under autocast.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.mesh = mesh
        self.device, self.dtype, self.bf16 = device, dtype, bf16

    @classmethod
    def for_run(
        cls, model: Model, mesh: Mesh, settings: EvaluationSettings, device: torch.device
    ) -> "Objective":
        """On that device, in the precision of the settings."""
        dtype = torch.float64 if settings.precision == "float64" else torch.float32
        bf16 = settings.precision == "bf16"
        return cls(model.to(device, dtype), mesh, device, dtype, bf16)

    def weight(self, sample: Sample) -> float:
        """What this rank's part of a sample weighs in the loss; summed over ranks, each weight
        counts once. For samples that are still on the host."""
        total = sample.weight.sum(dtype=torch.float64).item()
        return total if sample.per_token else total / self.mesh.slot.sp

    def place(self, sample: Sample) -> Sample:
        """A sample on the device."""
        return sample.to(self.device, self.dtype)

    def enter(self, sample: Sample) -> tuple[Sample, SequenceShard]:
        """The door: this rank's contiguous tokens become those that the model works on, inputs,
        targets and weights together; and which these are. The host does not wait."""
        group, layout = self.mesh.sequence_group, self.model.layout
        natural = SequenceShard(sample.length, group, "contiguous")
        shard = SequenceShard(sample.length, group, layout)
        return redistribute_sample(sample, natural, shard), shard

    def forward(
        self, sample: Sample, shard: SequenceShard
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " b *n"], GeometricBatch]:
        """This rank's loss sum, the terms that it consists of, and the moved batch.

        Args:
            sample, shard: as `enter` gives them.
        """
        moved = self.moved(sample.inputs, shard)
        errors = self._errors(moved, sample, shard)
        return errors.sum(), errors, moved

    def moved(self, batch: GeometricBatch, shard: SequenceShard) -> GeometricBatch:
        """The model alone, in the run's precision."""
        device = batch.points.device.type
        with torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext():
            return self.model(batch, shard)

    def _errors(
        self, moved: GeometricBatch, sample: Sample, shard: SequenceShard
    ) -> Float[Tensor, " b *n"]:
        answer = moved.points if sample.answer == "points" else moved.vectors[:, 0]
        weight = sample.weight
        if not sample.per_token:
            marked = moved.mask if sample.marked is None else moved.mask & sample.marked
            answer = MaskedRows(marked, shard).mean(answer)
            # Every sequence rank holds the same mean: each counts its share of it.
            weight = weight / self.mesh.slot.sp
        # Where nothing counts the target means nothing: it may not reach the gradient either.
        difference = (answer - sample.target).masked_fill((weight == 0).unsqueeze(1), 0)
        return weight * difference.square().sum(1) / 3
