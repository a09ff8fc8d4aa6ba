"""The loss, told by a plain loop over tokens."""

import pytest
import torch

from data_pipeline.batch import GeometricBatch, Sample
from data_pipeline.errors import RunError
from scaling.engine.loss import engine_loss
from scaling.parallel.mesh import Mesh
from scaling.train.objective import Objective
from tests.small_models import PlainModel


class Shift(PlainModel):
    """Moves points along the first vector; one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.far = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, batch, shard=None):
        return batch.replace(
            points=batch.points + self.far * batch.vectors[:, 0], vectors=batch.vectors * self.far
        )


def padded(rows: int, tokens: int) -> GeometricBatch:
    """float64; row 0 whole, row 1 two tokens shorter, and in it one that was not observed."""
    random = torch.Generator().manual_seed(1)
    points = torch.randn(rows, 3, tokens, generator=random, dtype=torch.float64)
    vectors = torch.randn(rows, 2, 3, tokens, generator=random, dtype=torch.float64)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[1, -2:] = mask[1, 1] = False
    return GeometricBatch(points, vectors, mask=mask, lengths=(tokens, tokens - 2))


def test_loss_per_token_is_the_plain_loop_and_its_gradient_is_finite():
    inputs, model = padded(2, 7), Shift()
    weight = (torch.arange(14, dtype=torch.float64) + 1).reshape(2, 7) * inputs.mask
    weight[0, 3] = 0  # there, but it does not count
    target = torch.randn(2, 3, 7, dtype=torch.float64)
    target.masked_fill_((weight == 0).unsqueeze(1), torch.nan)
    objective = Objective(model, Mesh(1, 1))
    sample = Sample(inputs, target, weight)
    loss, errors, _ = objective(*objective.enter(sample))
    assert errors.shape == (2, 7)
    (gradient,) = torch.autograd.grad(loss, model.far)
    wanted, slope = 0.0, 0.0
    for row in range(2):
        for token in range(7):
            if weight[row, token] > 0:
                along = inputs.vectors[row, 0, :, token]
                miss = inputs.points[row, :, token] + 0.7 * along - target[row, :, token]
                wanted += weight[row, token].item() * (miss @ miss).item() / 3
                slope += weight[row, token].item() * 2 * (miss @ along).item() / 3
    assert loss.item() == pytest.approx(wanted, rel=1e-13)
    assert gradient.item() == pytest.approx(slope, rel=1e-13)
    assert objective.weight(sample) == weight.sum().item()


def loss_of(model: Shift, sample: Sample) -> torch.Tensor:
    objective = Objective(model, Mesh(1, 1))
    loss, *_ = objective(*objective.enter(sample))
    return loss


def test_loss_per_sequence_reads_the_mean_over_all_or_marked_tokens_that_are_there():
    inputs, model = padded(2, 7), Shift()
    moved = model(inputs)
    target, weight = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0.5, 3.0]).double()
    marked = torch.arange(7).expand(2, 7) % 3 == 1  # tokens 1 and 4; row 1 has 4 alone
    for marks in (None, marked):
        for sample, x in (
            (Sample(inputs, target, weight, "vectors", marks), 0.7 * inputs.vectors[:, 0]),
            (Sample(inputs, target, weight, "points", marks), moved.points),
        ):
            loss = loss_of(model, sample)
            read = inputs.mask if marks is None else inputs.mask & marks
            wanted = 0.0
            for row in range(2):
                there = [x[row, :, token] for token in range(7) if read[row, token]]
                miss = sum(there) / len(there) - target[row]
                wanted += weight[row].item() * (miss @ miss).item() / 3
            assert loss.item() == pytest.approx(wanted, rel=1e-13)


def test_targets_of_tokens_may_be_vectors():
    inputs, model = padded(2, 7), Shift()
    target, weight = torch.randn(2, 3, 7, dtype=torch.float64), inputs.mask.double()
    loss = loss_of(model, Sample(inputs, target, weight, "vectors"))
    miss = (0.7 * inputs.vectors[:, 0] - target).square().sum(1) / 3
    assert loss.item() == pytest.approx((weight * miss).sum().item(), rel=1e-13)


def test_the_average_over_ranks_of_their_losses_is_the_objective():
    sums = [torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.0, 4.5)]
    losses = [engine_loss(local, 22.0, len(sums)) for local in sums]
    assert sum(losses) / len(sums) == pytest.approx(5.5 / 22)
    for weight in (0.0, float("nan")):
        with pytest.raises(RunError, match="no mean loss"):
            engine_loss(sums[0], weight, 3)
    on_device = engine_loss(sums[2], torch.tensor(22.0, dtype=torch.float64), 3)
    assert on_device == losses[2]
