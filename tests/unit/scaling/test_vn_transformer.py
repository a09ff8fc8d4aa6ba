"""VN-Transformer: layers against plain loops, the model against the package it is named after."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError, LongfoldError, OptionError
from scaling.models import MODELS, build, equivariance_error
from scaling.models.vector_neurons import Block, LatentBlock, Variant, VNLayerNorm, VNLinear, VNReLU
from scaling.models.vn_transformer import VNTransformer, from_package
from scaling.ops.masked_rows import MaskedRows
from tests.small_models import small_batch, small_model

ARGUMENTS: dict[str, Any] = {"dim": 6, "depth": 2, "dim_head": 5, "heads": 3, "dim_feat": 4}
LENGTHS = [9, 6]


def package_case(arguments: dict[str, Any]) -> tuple[Any, Any, Tensor, Tensor, Tensor]:
    """The package's model with small weights, ours with the same; points, features, mask."""
    from VN_transformer import VNTransformer as Package

    torch.manual_seed(3)
    package = Package(**arguments)
    for p in package.parameters():  # as drawn they saturate every softmax
        p.data *= 0.4
    points = 2 * torch.randn(2, 9, 3)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    points = points.masked_fill(~mask[..., None], 0)
    feats = torch.randn(2, 9, arguments["dim_feat"])
    return package, from_package(arguments, package.state_dict()), points, feats, mask


@pytest.mark.package("VN_transformer")
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"l2_dist_attn": True},
        {"bias_epsilon": 0.3},
        {"translation_invariant": True},
        {"translation_equivariance": True},
        {"flash_attn": False, "dim_feat": 0},
    ],
)
def test_the_package_has_the_same_numbers(more):
    package, model, points, feats, mask = package_case(ARGUMENTS | more)
    coordinates, features = package(points, feats=feats, mask=mask)
    batch = GeometricBatch(points.mT, scalars=feats.mT, mask=mask)
    out = model(batch)
    centre = points.mean((0, 1)) if "translation_equivariance" in more else 0
    expected = torch.cat([coordinates - centre, features], -1)[mask]
    found = torch.cat([out.points - batch.points, out.scalars - batch.scalars], 1).mT[mask]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert expected.norm() > 1
