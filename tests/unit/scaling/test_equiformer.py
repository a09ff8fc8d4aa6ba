"""Equiformer against its equations edge by edge, e3nn's harmonics, and the published count."""

import copy
import math
import sys

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError
from scaling.models import build, equivariance_error
from scaling.models.equiformer import Equiformer, EquiformerLayer
from scaling.models.irreps import Coupling, halved
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.neighbours import find_neighbours
from tests.small_models import small_batch, small_model

needs_e3nn = pytest.mark.package("e3nn")


@needs_e3nn
@pytest.mark.parametrize("parity", [True, False])
def test_a_layer_is_its_equations(parity):
    """12 points, two of which have fewer neighbours; values, and the gradients of points, features
    and every parameter."""
    torch.manual_seed(0)
    n, k, widths, heads = 12, 3, [4, 2, 1], 2
    layer = EquiformerLayer(widths, widths_of_values(heads), heads, (5, 4), Coupling(2, parity))
    layer = layer.double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    points = torch.randn(n, 3).double().requires_grad_()
    x = torch.randn(n, 4 + 2 * 3 + 5).double().requires_grad_()
    d = torch.randn(n, n, 5).double()
    rows = MaskedRows(torch.ones(1, n, dtype=torch.bool))
    there = points.T[None]
    neighbours = find_neighbours(there, rows, k, radius=1.2)
    assert 0 < neighbours.valid.sum() < n * k
    (others,) = neighbours.gather(there)
    apart = others - there.unsqueeze(2)
    direction = apart / apart.square().sum(1, keepdim=True).clamp(min=1e-30).sqrt()
    near = nearest(points, k, 1.2)
    edges = torch.zeros(1, 5, k, n).double()
    for i in range(n):
        for place, j in enumerate(near[i]):
            edges[0, :, place, i] = d[i, j]
    ours = layer(x.T[None], direction, edges, neighbours, rows.mask)[0].T
    expected = in_loops(layer, x, points, d, near, parity)
    assert torch.allclose(ours, expected, atol=1e-11)
    leaves = [points, x, *layer.parameters()]
    weigh = torch.randn_like(ours)
    ours, expected = (torch.autograd.grad((y * weigh).sum(), leaves) for y in (ours, expected))
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10) and b.abs().max() > 1e-6


def widths_of_values(heads: int) -> list[int]:
    return [heads * c for c in (2, 1, 1)]


def nearest(points: Tensor, k: int, radius: float) -> list[list[int]]:
    distance = torch.cdist(points, points).detach().fill_diagonal_(torch.inf)
    return [[j for j in row.argsort()[:k].tolist() if row[j] <= radius] for row in distance]


def in_loops(
    layer: EquiformerLayer,
    x: Tensor,
    points: Tensor,
    d: Tensor,
    near: list[list[int]],
    parity: bool,
) -> Tensor:
    """The docstring's equations, token by token and edge by edge, components last."""
    n = len(x)
    tokens = [apart(row) for row in x]
    normed = [norm(layer.norm, token) for token in tokens]
    out = []
    for i in range(n):
        new = tokens[i]
        logits, values = [], []
        for j in near[i]:
            own, other = linear(layer.own, normed[i]), linear(layer.other, normed[j])
            z = [a + b for a, b in zip(own, other, strict=True)]
            y = harmonics(points[j] - points[i])
            u = product(z, y, radial(layer.radial, d[i, j]), parity)
            t = layer.logits.weight @ u[0][:, 0] + layer.logits.bias
            t = torch.where(t > 0, 1.0, 0.2) * t + 0.8 * t * (t.sigmoid() - (t > 0).double())
            logits.append((layer.a.flatten() * t).reshape(layer.heads, -1).sum(1))
            message = gate(linear(layer.message, u), layer.widths)
            u = product(message, y, layer.path_weights.flatten(), parity)
            values.append(linear(layer.value, u))
        if near[i]:
            shares = torch.stack(logits).exp()
            shares = shares / shares.sum(0)
            sums = [torch.zeros_like(part) for part in values[0]]
            for share, value in zip(shares, values, strict=True):
                for degree, part in enumerate(value):
                    each = part.shape[0] // layer.heads
                    sums[degree] = sums[degree] + share.repeat_interleave(each)[:, None] * part
        else:
            sums = [torch.zeros(c, 2 * m + 1).double() for m, c in enumerate(widths_of_values(2))]
        new = [a + b for a, b in zip(new, linear(layer.project, sums), strict=True)]
        up = linear(layer.up, norm(layer.second_norm, new))
        change = linear(layer.down, gate(up, [3 * c for c in layer.widths]))
        out.append(torch.cat([(a + b).flatten() for a, b in zip(new, change, strict=True)]))
    return torch.stack(out)


def apart(row: Tensor) -> list[Tensor]:
    return [row[:4].reshape(4, 1), row[4:10].reshape(2, 3), row[10:].reshape(1, 5)]


def harmonics(r: Tensor) -> list[Tensor]:
    """By e3nn."""
    from e3nn import o3

    u = r / r.norm()
    return [o3.spherical_harmonics(m, u, False, normalization="component") for m in range(3)]


def product(x: list[Tensor], y: list[Tensor], weights: Tensor, parity: bool) -> list[Tensor]:
    """Channel by channel, in e3nn's order of paths."""
    from e3nn import o3

    made: list[list[Tensor]] = [[], [], []]
    place = 0
    for a in range(3):
        for b in range(3):
            for c in range(abs(a - b), min(a + b, 2) + 1):
                if parity and (a + b + c) % 2:
                    continue
                symbols = math.sqrt(2 * c + 1) * o3.wigner_3j(a, b, c, dtype=torch.float64)
                for channel in x[a]:
                    moved = torch.einsum("i,j,ijk->k", channel, y[b], symbols)
                    made[c].append(weights[place] * moved)
                    place += 1
    assert place == len(weights)
    return [torch.stack(some) for some in made]


def linear(module: torch.nn.Module, x: list[Tensor]) -> list[Tensor]:
    maps = list(module.degrees)  # pyright: ignore[reportArgumentType]
    results = [m.weight @ part for m, part in zip(maps, x, strict=True)]
    if maps[0].bias is not None:
        results[0] = results[0] + maps[0].bias[:, None]
    return results


def norm(module: torch.nn.Module, x: list[Tensor]) -> list[Tensor]:
    first = channel_norm(module.scalars, x[0][:, 0])
    rest = [
        each.weight[:, 0] * part / (part.square().mean() + 1e-5).sqrt()
        for each, part in zip(module.others, x[1:], strict=True)  # pyright: ignore
    ]
    return [first[:, None], *rest]


def channel_norm(module, x: Tensor) -> Tensor:
    variance = x.var(unbiased=False) if x.numel() else x
    return module.weight[:, 0] * (x - x.mean()) / (variance + 1e-5).sqrt() + module.bias[:, 0]


def radial(module, x: Tensor) -> Tensor:
    for place in (0, 3):
        x = channel_norm(module[place + 1], module[place].weight @ x + module[place].bias)
        x = x * x.sigmoid()
    return module[6].weight @ x + module[6].bias


def gate(x: list[Tensor], widths: list[int]) -> list[Tensor]:
    scalars = x[0][:, 0]
    first = scalars[: widths[0]]
    by_degree = scalars[widths[0] :].sigmoid().split(widths[1:])
    opened = [g[:, None] * part for g, part in zip(by_degree, x[1:], strict=True)]
    return [(first * first.sigmoid())[:, None], *opened]


@needs_e3nn
def test_the_first_features_and_the_read_outs_are_their_equations():
    model, batch = small_model("equiformer", layers=1, separations=0), small_batch([9])
    assert isinstance(model, Equiformer)
    batch = batch.replace(mask=torch.ones(1, 9, dtype=torch.bool), points=batch.points.nan_to_num())
    for p in model.layers.parameters():
        torch.nn.init.zeros_(p)  # the layers add nothing
    out = model(batch)
    points, widths = batch.points[0].T, halved(8, 2)
    for i, near in enumerate(nearest(points, 4, torch.inf)):
        sums = [torch.zeros(widths[0], 2 * m + 1).double() for m in range(3)]
        for j in near:
            r = points[j] - points[i]
            centres = torch.linspace(0, 10, 6).double()
            gaussians = (-0.5 * ((r.norm() - centres) / 2).square()).exp()
            weights = radial(model.degree.radial, gaussians).reshape(3, -1)
            for degree, y in enumerate(harmonics(r)):
                sums[degree] = sums[degree] + torch.outer(weights[degree], y) / 2
        x = linear(model.degree.linear, sums)
        v, s = batch.vectors[0, :, :, i], batch.scalars[0, :, i]
        features = torch.cat([s, (1 + v.norm(dim=1)).log()])
        x[0] = x[0] + model.embed_scalars(features[None, :, None])[0]
        x[1] = x[1] + model.embed_vectors.weight @ v
        x = norm(model.norm, x[:2])
        step = model.read_vectors.weight @ x[1]
        change = model.read_scalars(x[0][None])[0, :, 0]
        assert torch.allclose(out.points[0, :, i], points[i] + step[0], atol=1e-7)
        assert torch.allclose(out.vectors[0, :, :, i], v + step[1:], atol=1e-7)
        assert torch.allclose(out.scalars[0, :, i], s + change, atol=1e-7)


@needs_e3nn
def test_a_layer_has_the_parameters_of_a_published_block():
    """128x0e+64x1e+32x2e, 4 heads of 32x0e+16x1e+8x2e, MLPs of edges 128-64-64: the authors' code
    has these linear maps, norms and paths' weights. With what their last block, head and first
    features have more, these are the 3.53 million of the paper."""
    options = {"lmax": 2, "channels": 128, "layers": 6, "head_channels": None, "basis": 128}
    options |= {"radial_hidden": 64, "separations": 0, "parity": False}
    model = build("equiformer", 0, 5, **options)
    assert isinstance(model, Equiformer)
    for layer in model.layers:
        assert sum(p.numel() for p in layer.parameters()) == 488_000
    count = sum(p.numel() for p in model.parameters())
    count -= sum(
        p.numel() for m in (model.read_vectors, model.read_scalars) for p in m.parameters()
    )
    head = (512 + 1) * 512 + 512 + 1 + 2 * 512 - (2 * 128 + 64)  # and its norm
    last = 512 * (384 + 1) + 512 * (128 + 1) - (128 * (384 + 1) + 64 * 192 + 32 * 96)
    paths = (960 - 384) * (64 + 1)  # of the first features, from degrees 1 and 2
    unused = paths + 96 * 128 + 256 * 64 + 224 * 32
    assert unused == 73_280
    first = 2 * 128 + 2 * 128 + 2  # a linear map of the number 1; learned Gaussians
    assert round((count + head + last + unused + first) / 1e6, 2) == 3.53


@needs_e3nn
@pytest.mark.parametrize("lmax", [1, 2])
@pytest.mark.parametrize("parity", [True, False])
def test_options_keep_the_symmetry_that_they_say(lmax, parity):
    model, batch = small_model("equiformer", lmax=lmax, parity=parity), small_batch([20, 9])
    assert model.symmetry == ("E(3)" if parity else "SE(3)")
    assert equivariance_error(model, batch) < 1e-12
    mirrored = equivariance_error(model, batch, mirrored=True)
    assert mirrored < 1e-12 if parity else mirrored > 1e-3


@needs_e3nn
def test_places_of_a_body_are_told_by_edges_alone():
    """Moved along the row as a whole, a body's answer stays; in another order it does not."""
    model, batch = small_model("equiformer"), small_batch([9])
    batch = batch.map(lambda x: x[..., 2:])
    bodies = ((4, 7),)
    late = batch.map(lambda x: torch.cat([x[..., 3:], x], -1)).replace(bodies=bodies)
    plain = model(batch).points
    assert torch.allclose(model(late).points[..., 4:], plain, atol=1e-12)
    turned = batch.map(lambda x: x.flip(-1))
    assert not torch.allclose(model(turned).points.flip(-1), plain, atol=1e-5)
    blind = small_model("equiformer", separations=0)
    same = blind(turned).points.flip(-1)
    assert torch.allclose(same, blind(batch).points, atol=1e-12)


@needs_e3nn
def test_copies_and_number_types_keep_the_symbols():
    """A float32 model turned float64 is as equivariant as one made so."""
    model = small_model("equiformer", torch.float32).double()
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    batch = small_batch([9])
    assert torch.equal(other(batch).points, model(batch).points)
    assert equivariance_error(model, batch) < 1e-12


@needs_e3nn
def test_impossible_options_are_refused():
    for options, said in [
        ({"heads": 3, "head_channels": None}, "heads=3: must divide channels=64"),
        ({"lmax": 3}, "lmax=3: must be 1 or 2"),
        ({"radius": 0.0}, "radius=0"),
        ({"basis": 1}, "basis=1"),
    ]:
        with pytest.raises(ConfigError, match=said):
            build("equiformer", 1, 1, **options)
    with pytest.raises(ConfigError, match=r"neighbours=5: .*5 tokens.* 4 others"):
        build("equiformer", 1, 1, neighbours=5).check_longest(5)
    together = GeometricBatch(torch.ones(1, 3, 4).double())
    with pytest.raises(ConfigError, match="all points of row 0 are at one place"):
        build("equiformer", 0, 0).double()(together)


def test_without_e3nn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "e3nn", None)
    with pytest.raises(ConfigError, match=r"needs e3nn.*longfold\[equiformer\]") as error:
        build("equiformer", 1, 1)
    assert "\n" not in str(error.value)
