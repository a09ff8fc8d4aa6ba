"""Models turn and move with their input, sharded or not, masked or not; causal ones look back."""

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import GeometricBatch
from scaling.models import MODELS
from scaling.parallel.shard import SequenceShard
from tests.small_models import small_batch, small_model

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def root_mean_square(x: Tensor, mask: Tensor) -> Tensor:
    """Over the valid tokens; mask (b, n)."""
    weights = mask.reshape(len(mask), *[1] * (x.ndim - 2), -1).expand_as(x)
    return x[weights].square().mean().sqrt()


def random_motion(dtype: torch.dtype, sign: int = 1) -> tuple[Tensor, Tensor]:
    """A rotation (sign -1: with a reflection) and a translation of 100 Å."""
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    rotation = rotation * torch.linalg.det(rotation) * sign
    direction = torch.randn(3, 1, dtype=torch.float64)
    return rotation.to(dtype), (100 * direction / direction.norm()).to(dtype)


def equivariance_errors(model, batch, shard, rotation, shift) -> dict[str, tuple[float, float]]:
    """Field -> (error, change), both relative: to rms(output - input), and to rms(input)."""
    moved = batch.replace(points=rotation @ batch.points + shift, vectors=rotation @ batch.vectors)
    if shard is not None:
        batch, moved = (b.map(shard.scatter) for b in (batch, moved))
    out, turned = model(batch, shard), model(moved, shard)
    fields = {
        "points": (turned.points, rotation @ out.points + shift),
        "vectors": (turned.vectors, rotation @ out.vectors),
        "scalars": (turned.scalars, out.scalars),
    }
    result = {}
    for field, (a, b) in fields.items():
        before, after, mask = getattr(batch, field), getattr(out, field), batch.mask
        change = root_mean_square(after - before, mask)
        error = root_mean_square(a - b, mask) / change
        result[field] = error.item(), (change / root_mean_square(before, mask)).item()
    return result


def check(group, name, dtype, lengths):
    torch.manual_seed(3)
    batch = small_batch(lengths, dtype)
    shard = None if group is None else SequenceShard(max(lengths), group)
    for sign in (1, -1):
        errors = equivariance_errors(
            small_model(name, dtype), batch, shard, *random_motion(dtype, sign)
        )
        for field, (error, change) in errors.items():
            assert error <= TOLERANCE[dtype], (field, error, sign)
            assert change >= 0.1, (field, change)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [[64, 64], [37, 9, 20]])
@pytest.mark.parametrize("name", MODELS)
def test_rotations_reflections_and_translations_act_on_the_output(name, lengths, dtype):
    """And the output is not the input."""
    check(None, name, dtype, lengths)


@pytest.mark.parametrize("name", MODELS)
def test_also_sharded(distributed, name):
    for dtype in TOLERANCE:
        distributed(check, 3, name, dtype, [37, 9, 20])


def test_a_chiral_model_tells_mirror_images_apart():
    model, batch = small_model("se3_hyena", chiral=True, salience=True), small_batch([40])
    rotation, shift = random_motion(torch.float64)
    assert equivariance_errors(model, batch, None, rotation, shift)["points"][0] < 1e-10
    mirrored = equivariance_errors(model, batch, None, -rotation, shift)["points"]
    assert mirrored[0] > 1e-3


def test_a_causal_convolution_does_not_look_ahead():
    """Shown by gradients of vectors, which pass no mean over the sequence."""
    model, batch = small_model("se3_hyena", padding="causal"), small_batch([16])
    batch.vectors.requires_grad_()
    model(batch).vectors[..., 7].sum().backward()
    sensitivity = batch.vectors.grad.abs().sum((0, 1, 2))
    assert (sensitivity[[0, 2, 7]] > 1e-3).all()
    assert (sensitivity[8:] < 1e-14).all()  # a transform's rounding reaches every token


def test_padding_changes_nothing():
    """A row alone equals the same row in a longer batch whose padding holds NaN."""
    for name in MODELS:
        model, batch = small_model(name), small_batch([20, 31])
        alone = model(GeometricBatch(**{k: v[:1, ..., :20] for k, v in vars(batch).items()}))
        together = model(batch)
        for field in ("points", "vectors", "scalars"):
            padded = getattr(together, field)[:1, ..., :20]
            assert torch.allclose(getattr(alone, field), padded, atol=1e-12)
            assert getattr(together, field).isfinite().all()
