"""VN-Transformer beside the package of that name: its weights, and its numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError, OptionError, ShapeError
from scaling.models.vn_transformer import VNTransformer, from_package

ARGUMENTS: dict[str, Any] = {"dim": 6, "depth": 2, "dim_head": 5, "heads": 3, "dim_feat": 4}


def state_of(**arguments: Any) -> dict[str, Tensor]:
    """A state dict of the package's VNTransformer, as it lists its weights."""
    like = {"dim_head": 64, "heads": 8} | arguments
    dim, inner = like["dim"], like["dim_head"] * like["heads"]
    shapes = {"vn_proj_in.1.weight": (dim, 1), "vn_proj_out.1.weight": (1, dim)}
    shapes |= {f"vn_proj_out.0.ln.{name}": (dim,) for name in ("gamma", "beta")}
    for n in range(like["depth"]):
        layer = f"encoder.layers.{n}."
        shapes |= {f"{layer}0.to_{x}.weight": (inner, dim) for x in "qkv"}
        shapes |= {f"{layer}{m}.ln.{x}": (dim,) for m in (1, 3) for x in ("gamma", "beta")}
        shapes |= {f"{layer}2.1.{x}": (4 * dim, 4 * dim) for x in "WU"}
        shapes |= {f"{layer}0.to_out.weight": (dim, inner), f"{layer}2.0.weight": (4 * dim, dim)}
        shapes |= {f"{layer}2.2.weight": (dim, 4 * dim)}
    return {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}


def test_a_state_dict_of_the_package_is_loaded():
    state = state_of(**ARGUMENTS)
    model = from_package(ARGUMENTS, state)
    assert isinstance(model, VNTransformer) and (model.vectors, model.scalars) == (0, 4)
    assert sorted(x.sum().item() for x in model.state_dict().values()) == sorted(
        x.sum().item() for x in state.values()
    )
    assert model.symmetry == "none"


@pytest.mark.parametrize(
    "arguments, change, error, said",
    [
        ({"dim": 8}, {}, ShapeError, r"vn_proj_in.1.weight is \(6, 1\) in .* and \(8, 1\) by"),
        (
            {"depth": 1},
            {},
            ConfigError,
            r"an unknown encoder.layers.1.0.to_k.weight for VN.*depth=1",
        ),
        ({"depth": 3}, {}, ConfigError, r"lacks encoder.layers.2.0.to_k.weight"),
        ({"bias_epsilon": 0.1}, {}, ConfigError, r"lacks encoder.layers.0.0.to_k.bias"),
        ({"l2_dist_attn": True}, {}, ConfigError, r"layers.0.0.to_k.weight .* differs from to_q"),
        ({"num_tokens": 20}, {}, OptionError, r"num_tokens=20: must be None"),
        ({"reduce_dim_out": False}, {}, OptionError, r"reduce_dim_out=False: must be True"),
        ({"dim_coor": 2}, {}, OptionError, r"dim_coor=2: must be 3"),
        ({"dims": 8}, {}, ConfigError, r"VN-transformer has no option dims; it has dim, depth"),
        ({}, {"token_emb.weight": torch.randn(2)}, ConfigError, r"an unknown token_emb.weight"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_one_line(arguments, change, error, said):
    with pytest.raises(error, match=said) as raised:
        from_package(ARGUMENTS | arguments, state_of(**ARGUMENTS) | change)
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="VN-transformer cannot be built without depth"):
        from_package({"dim": 3}, {})


def package_case(arguments: dict[str, Any]) -> tuple[Any, Any, Tensor, Tensor, Tensor]:
    """The package's model with small weights, ours with the same; points, features, mask."""
    from VN_transformer import VNTransformer as Package

    package = Package(**arguments)
    for p in package.parameters():  # as drawn they saturate every softmax
        p.data *= 0.4
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    points = (2 * torch.randn(2, 9, 3)).masked_fill(~mask[..., None], 0)
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
        {"dim_feat": 0},
    ],
    ids=str,
)
def test_the_package_has_the_same_numbers(more):
    """In float32; coordinates and features of two rows, the second padded with zeros."""
    package, model, points, feats, mask = package_case(ARGUMENTS | more)
    coordinates, features = package(points, feats=feats, mask=mask)
    batch = GeometricBatch(points.mT, scalars=feats.mT, mask=mask)
    out = model(batch)
    centre = points.mean((0, 1)) if "translation_equivariance" in more else 0
    expected = torch.cat([coordinates - centre, features], -1)[mask]
    found = torch.cat([out.points - batch.points, out.scalars - batch.scalars], 1).mT[mask]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert expected.norm() > 1
