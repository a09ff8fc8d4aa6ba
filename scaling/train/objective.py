"""From one rank's slice of a micro-batch to its part of the loss.

The slice arrives as it was read, contiguous; it becomes cyclic at the model's door and stays so:
what is summed over tokens does not ask for their order. The result is a sum over what this rank
counts; dividing it by the weight of all ranks is the loss's business (engine/loss.py).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import GeometricBatch, Sample
from scaling.ops.masked_rows import MaskedRows
from scaling.parallel.mesh import Mesh
from scaling.parallel.shard import SequenceShard, redistribute, redistribute_batch


class Objective(nn.Module):
    """A model and its read-out.

    Per-token targets are compared with the moved points, targets of a sequence with the mean of
    the first vector channel over all valid tokens; both as squared error per coordinate:
    sum of weight · |answer - target|² / 3.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.mesh = mesh
        self.bf16 = bf16

    def forward(
        self, sample: Sample, length: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b 3 n"], Float[Tensor, "b v 3 n"]]:
        """This rank's loss sum, and the moved points and vectors of its cyclic tokens.

        Args:
            sample: this rank's contiguous tokens.
            length: tokens of the rows, all sequence ranks together.
        """
        inputs, shard = self.enter(sample.inputs, length)
        with torch.autocast(inputs.points.device.type, torch.bfloat16, enabled=self.bf16):
            moved = self.model(inputs, shard)
        return self._read_out(moved, sample, shard), moved.points, moved.vectors

    def enter(self, inputs: GeometricBatch, length: int) -> tuple[GeometricBatch, SequenceShard]:
        """The inputs in the layout that models work in, and that layout."""
        contiguous = SequenceShard(length, self.mesh.sequence_group, "contiguous")
        cyclic = SequenceShard(length, self.mesh.sequence_group, "cyclic")
        return redistribute_batch(inputs, contiguous, cyclic), cyclic

    def weight(self, sample: Sample) -> Float[Tensor, ""]:
        """What this rank's part of the loss weighs; summed over ranks, each weight counts once."""
        return sample.weight.sum() if sample.per_token else sample.weight.sum() / self.mesh.sp

    def _read_out(self, moved: GeometricBatch, sample: Sample, shard: SequenceShard) -> Tensor:
        if not sample.per_token:
            # Every sequence rank holds the same mean: each counts its share of it.
            answer = MaskedRows(moved.mask, shard).mean(moved.vectors[:, 0])
            error = (answer - sample.target).square().sum(1) / 3
            return (sample.weight * error).sum() / self.mesh.sp
        error, _ = self.token_errors(moved.points, sample, shard)
        return error.sum()

    def token_errors(
        self, points: Float[Tensor, "b 3 n"], sample: Sample, shard: SequenceShard
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """weight · |answer - target|² / 3 and the weight of this rank's cyclic tokens.

        Args:
            points: answers of the cyclic tokens.
            sample: this rank's contiguous tokens; its targets are per token.
            shard: the cyclic one.
        """
        contiguous = SequenceShard(shard.length, shard.group, "contiguous")
        target = redistribute(sample.target, contiguous, shard)
        weight = redistribute(sample.weight, contiguous, shard)
        # Where nothing counts the target means nothing: it may not reach the gradient either.
        difference = (points - target).masked_fill((weight == 0).unsqueeze(1), 0)
        return weight * difference.square().sum(1) / 3, weight
