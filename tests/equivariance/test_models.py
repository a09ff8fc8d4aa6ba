"""Models turn and move with their input as far as they say, no further; causal ones look back."""

import pytest
import torch

from data_pipeline.batch import GeometricBatch
from scaling.models import MODELS, Model, equivariance_error
from scaling.parallel.shard import SequenceShard
from tests.small_models import small_batch, small_model
from tests.threaded_ranks import run_threaded

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHOWS = 1e-3
"""An error that no rounding makes."""
OPTIONS = [
    ("se3_hyena", {"chiral": True, "salience": True}),
    ("se3_hyena", {"layers": 2, "local": 8}),
    ("clifford_mlp", {"layers": 1, "local": 8}),
    *[(name, {}) for name in MODELS],
]


def holds(model: Model, dtype: torch.dtype, batch: GeometricBatch, shard=None) -> None:
    """The model's own word on its symmetry, both ways."""
    errors = [equivariance_error(model, batch, shard, mirrored=m) for m in (False, True)]
    turned, mirrored = (error <= TOLERANCE[dtype] for error in errors)
    expected = {"E(3)": (True, True), "SE(3)": (True, False), "none": (False, False)}
    assert (turned, mirrored) == expected[model.symmetry], errors
    assert all(error <= TOLERANCE[dtype] or error > SHOWS for error in errors), errors


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [[100, 50], [37, 9, 20]])
@pytest.mark.parametrize("name, options", OPTIONS)
def test_a_model_has_the_symmetry_that_it_says(name, options, lengths, dtype):
    holds(small_model(name, dtype, **options), dtype, small_batch(lengths, dtype))


@pytest.mark.parametrize("name, options", OPTIONS)
def test_also_sharded_and_packed(name, options):
    def sharded(group, dtype):
        for bodies in (None, ((20, 17), (9,), (1, 19))):
            batch = small_batch([37, 9, 20], dtype, bodies)
            shard = SequenceShard(37, group)
            holds(small_model(name, dtype, **options), dtype, batch.map(shard.scatter), shard)

    for dtype in TOLERANCE:
        run_threaded(sharded, 3, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_model_moves_its_input(name):
    """By a tenth of its rms or more, in every field that it changes, and points at least: the
    identity would pass for equivariant."""
    batch = small_batch([37, 9, 20])
    out = small_model(name)(batch)
    for field in ("points", "vectors", "scalars"):
        before, after = getattr(batch, field), getattr(out, field)
        valid = batch.mask.reshape(3, *[1] * (before.ndim - 2), 37).expand_as(before)
        change = (after - before)[valid].square().mean() / before[valid].square().mean()
        assert change.sqrt() >= 0.1 or (field != "points" and change == 0), field


def test_a_model_without_symmetry_fails():
    """The check itself: a model that favours an axis says "none", or is found out."""
    model = small_model("se3_hyena")
    axis = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).reshape(3, 1)

    class Drifts(torch.nn.Module):
        symmetry = "E(3)"

        def forward(self, batch, shard=None):
            out = model(batch, shard)
            return out.replace(points=out.points + axis)

    with pytest.raises(AssertionError):
        holds(Drifts(), torch.float64, small_batch([20]))  # pyright: ignore[reportArgumentType]
    assert equivariance_error(Drifts(), small_batch([20])) > SHOWS


def test_a_causal_convolution_does_not_look_ahead():
    """Shown by gradients of vectors, which pass no mean over the sequence."""
    model, batch = small_model("se3_hyena", padding="causal"), small_batch([16])
    batch.vectors.requires_grad_()
    model(batch).vectors[..., 7].sum().backward()
    assert batch.vectors.grad is not None
    sensitivity = batch.vectors.grad.abs().sum((0, 1, 2))
    assert (sensitivity[[0, 2, 7]] > 1e-3).all()
    assert (sensitivity[8:] < 1e-14).all()  # a transform's rounding reaches every token


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name):
    """A row alone equals the same row in a longer batch whose padding holds NaN."""
    model, batch = small_model(name), small_batch([20, 31])
    alone, together = model(batch.map(lambda x: x[:1, ..., :20])), model(batch)
    for field in ("points", "vectors", "scalars"):
        padded = getattr(together, field)[:1, ..., :20]
        assert torch.allclose(getattr(alone, field), padded, atol=1e-12)
        assert getattr(together, field).isfinite().all()
