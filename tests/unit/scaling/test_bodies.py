"""Bodies of a packed row do not see each other: it equals its chains, each alone."""

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import GeometricBatch
from scaling.models import MODELS
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import measuring
from tests.small_models import small_batch, small_model
from tests.threaded_ranks import run_threaded

BODIES = ((7, 1, 13, 10), (20,), (5, 5))
LENGTHS = [31, 20, 10]
FIELDS = ("points", "vectors", "scalars")
OPTIONS = [("se3_hyena", {"salience": True}), ("se3_hyena", {"padding": "causal"})]
OPTIONS += [(name, {}) for name in MODELS]


def outputs_and_gradients(model, batch: GeometricBatch, shard=None) -> list[Tensor]:
    """Outputs, and the inputs' gradients of a sum that weighs every number differently."""
    leaves = [getattr(batch, field).clone().requires_grad_() for field in FIELDS]
    out = model(batch.replace(**dict(zip(FIELDS, leaves, strict=True))), shard)
    found = [getattr(out, field) for field in FIELDS]
    places = batch.index[0].to(found[0].dtype)
    mask = batch.mask.reshape(len(batch.mask), 1, -1)
    terms = [(x.flatten(1, -2).square() * (1 + places.sin()) * mask).sum() for x in found]
    total = torch.stack(terms).sum()
    gradients = torch.autograd.grad(total, leaves)
    return [x.detach() for x in (*found, *gradients)]


def chain(batch: GeometricBatch, row: int, start: int, stop: int) -> GeometricBatch:
    """One body as a row of its own; its tokens keep their places in the sum above."""
    alone = batch.replace(lengths=None, bodies=None)
    cut = alone.map(lambda x: x[row : row + 1, ..., start:stop])
    return cut.replace(lengths=(stop - start,))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name, options", OPTIONS)
def test_a_packed_row_equals_its_chains_each_alone(name, options, world):
    batch = small_batch(LENGTHS, bodies=BODIES)

    def packed(group):
        shard = SequenceShard(max(LENGTHS), group)
        own = batch.map(shard.scatter)
        found = outputs_and_gradients(small_model(name, **options), own, shard)
        return [shard.gather(x) for x in found]

    (found, *_) = run_threaded(packed, world)
    model = small_model(name, **options)
    for row, bodies in enumerate(BODIES):
        start = 0
        for length in bodies:
            alone = outputs_and_gradients(model, chain(batch, row, start, start + length))
            for ours, expected in zip(found, alone, strict=True):
                ours = ours[row : row + 1, ..., start : start + length]
                valid = batch.mask[row, start : start + length]
                error = (ours - expected)[..., valid].norm()
                assert error <= 1e-10 * expected[..., valid].norm().clamp(min=1e-3)
            start += length


@pytest.mark.parametrize("name", MODELS)
def test_a_body_that_moves_moves_its_own_output_alone(name):
    model, batch = small_model(name), small_batch(LENGTHS, bodies=BODIES)
    points = batch.points.clone()
    points[0, :, 8:21] += 50  # the third body of the first row
    before, after = model(batch), model(batch.replace(points=points))
    shift = (after.points - before.points)[0]
    assert torch.allclose(shift[:, 8:21], torch.full_like(shift[:, 8:21], 50), atol=1e-9)
    assert shift[:, :8].abs().max() < 1e-12 and shift[:, 21:].abs().max() < 1e-12
    for field in ("vectors", "scalars"):
        assert torch.allclose(getattr(after, field), getattr(before, field), atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_many_bodies_take_as_many_exchanges_as_one(distributed, name):
    one, *_ = distributed(exchanges, 4, name, None)
    many, *_ = distributed(exchanges, 4, name, BODIES)
    assert one == many and sum(one.values()) > 0


def exchanges(group, name, bodies) -> dict[str, int]:
    batch, shard = small_batch(LENGTHS, bodies=bodies), SequenceShard(max(LENGTHS), group)
    own = batch.map(shard.scatter).replace(lengths=tuple(LENGTHS))
    with measuring() as measured:
        outputs_and_gradients(small_model(name), own, shard)
    return {operator: count.calls for operator, count in measured.exchanges.items()}
