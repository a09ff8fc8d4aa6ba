"""The models against their formulas, written once more as plain loops over tokens."""

from typing import Any

import pytest
import torch

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError, LongfoldError
from scaling.algebra.clifford import embed, grade_0, grade_1
from scaling.models import MODELS, build
from scaling.models.se3_hyena import HyenaOperator
from scaling.models.se3_hyena_paper import PaperOperator
from scaling.ops.masked_rows import MaskedRows
from scaling.parallel.shard import SequenceShard
from tests.small_models import SCALARS, VECTORS, small_batch, small_model

LENGTHS, GAP = [7, 5], (0, 2)  # row 0 misses token 2


def case():
    """Scalars (2, 4, 7), vectors (2, 4, 3, 7) and which tokens are valid."""
    f, x = torch.randn(2, 4, 7).double(), torch.randn(2, 4, 3, 7).double()
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    mask[GAP] = False
    return f, x, MaskedRows(mask)


def convolve(product, q, k, length):
    """u_i = sum_j product(q_j, k_{i-j}), indices modulo the row's length; tokens first."""
    rows = [
        torch.stack([product(q[j], k[(i - j) % length]) for j in range(length)]).sum(0)
        for i in range(length)
    ]
    return torch.stack(rows)


def cross(a, b):
    return torch.linalg.cross(a, b, dim=-1)


def rows_of(tokens, *tensors):
    """Row by row: its length, and the tensors with tokens first, (n, c) or (n, c, 3), where tokens
    that are not valid hold 0."""
    for row, length in enumerate(LENGTHS):
        yield (
            row,
            length,
            [tokens.zero_invalid(t)[row, ..., :length].movedim(-1, 0) for t in tensors],
        )


@pytest.mark.parametrize("chiral, salient", [(False, 0), (True, 3)])
def test_the_default_operator_is_its_formulas(chiral, salient):
    operator = HyenaOperator(4, 5, 3, "circular", chiral, salient).double()
    torch.nn.init.normal_(operator.w)
    f, x, tokens = case()
    s = torch.randn(2, salient, 7).double()
    new_f, new_x = operator(f, x, rows=tokens, features=(s,))
    weight = torch.ones_like(f)
    if operator.salience is not None:
        weight = operator.salience @ s
    projected = operator.phi(embed(f, x))
    scalars, vectors = grade_0(projected).chunk(3, 1), grade_1(projected).chunk(3, 1)
    w = operator.w.squeeze(-1)
    for row, length, (qs, ks, vs, q, k, v, r) in rows_of(tokens, *scalars, *vectors, weight):
        qs, q = r * qs, r.unsqueeze(-1) * q
        qs, ks, vs = (t.unsqueeze(-1) for t in (qs, ks, vs))
        a = convolve(torch.mul, qs, ks, length) + convolve(torch.mul, q, k, length).sum(-1, True)
        u = convolve(torch.mul, qs, k, length) + convolve(torch.mul, q, ks, length)
        axial = convolve(cross, q, k, length)
        a, u, axial = (t / length**0.5 for t in (a, u, axial))
        invariants = embed(a.squeeze(-1).T[None], u.movedim(0, -1)[None])
        gates = torch.sigmoid(grade_0(operator.gamma(invariants)))[0].T.unsqueeze(-1)
        gate_a, gate_u = gates.chunk(2, 1)
        a, u, axial = gate_a * a, gate_u * u, gate_u * axial
        here_f, here_x = f[row, :, :length].T, x[row, ..., :length].movedim(-1, 0)
        g = here_f + (w[0] * (a * vs).squeeze(-1)) + w[1] * (u * v).sum(-1)
        y = here_x + w[2, :, None] * a * v + w[3, :, None] * u * vs
        y = y + w[4, :, None] * cross(axial, v)
        y = y + w[5, :, None] * axial if chiral else y
        update = operator.xi(embed(g.T[None], y.movedim(0, -1)[None]))
        assert torch.allclose(new_f[row, :, :length], (here_f.T + grade_0(update)[0]), atol=1e-12)
        expected = here_x.movedim(0, -1) + grade_1(update)[0]
        assert torch.allclose(new_x[row, ..., :length], expected, atol=1e-12)


def test_standardised_scalars_have_mean_0_and_rms_1_and_constant_ones_are_0():
    f, _, tokens = case()
    f[:, 0] = 0.3
    s = tokens.standardise(f.masked_fill(~tokens.mask.unsqueeze(1), torch.nan))
    assert torch.equal(s, tokens.zero_invalid(s)) and s[:, 0].abs().max() < 1e-9
    for row in range(len(LENGTHS)):
        there = f[row, 1:][:, tokens.mask[row]]
        expected = (there - there.mean(1, True)) / there.std(1, correction=0, keepdim=True)
        assert torch.allclose(s[row, 1:][:, tokens.mask[row]], expected, atol=1e-9)


@pytest.mark.parametrize("residual", [False, True])
def test_the_paper_operator_is_its_formulas(residual):
    operator = PaperOperator(4, 4, 5, 3, residual, final=False).double()
    f, x, tokens = case()
    new_f, new_x = operator(f, x, rows=tokens)
    no_scalars, no_vectors = torch.zeros_like(f), torch.zeros_like(x)

    def as_channels(scalars, vectors):  # scalars and vectors are channels of their own
        return torch.cat(
            [
                embed(scalars, no_vectors[: len(scalars), ..., : scalars.shape[-1]]),
                embed(no_scalars[: len(vectors), :, : vectors.shape[-1]], vectors),
            ],
            2,
        )

    projected = operator.phi(as_channels(f, x))
    scalars = grade_0(projected)[:, :12].chunk(3, 1)
    vectors = grade_1(projected)[:, 12:].chunk(3, 1)
    for row, length, (qs, ks, vs, q, k, v) in rows_of(tokens, *scalars, *vectors):
        a = convolve(torch.mul, qs, ks, length)
        u = convolve(cross, q, k, length) / length
        gates = torch.sigmoid(
            grade_0(operator.gamma(as_channels(a.T[None], u.movedim(0, -1)[None])))
        )[0].T
        a, u = gates[:, :1] * a, gates[:, 1:, None] * u
        here_f, here_x = f[row, :, :length].T, x[row, ..., :length].movedim(-1, 0)
        mixed = operator.xi(
            as_channels((here_f + a * vs).T[None], (here_x + cross(u, v)).movedim(0, -1)[None])
        )
        g, y = grade_0(mixed)[0, :4], grade_1(mixed)[0, 4:]
        if residual:
            g, y = g + here_f.T, y + here_x.movedim(0, -1)
        assert torch.allclose(new_f[row, :, :length], g, atol=1e-12)
        assert torch.allclose(new_x[row, ..., :length], y, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_smallest_batches(name):
    """No token, no row, one token, no valid token."""
    model = small_model(name)
    for rows, n in ((2, 0), (0, 5), (1, 1)):
        out = model(
            GeometricBatch(
                torch.randn(rows, 3, n).double(),
                torch.randn(rows, VECTORS, 3, n).double(),
                torch.randn(rows, SCALARS, n).double(),
                mask=torch.ones(rows, n, dtype=torch.bool),
            )
        )
        assert out.points.shape == (rows, 3, n) and out.points.isfinite().all()
    nothing = GeometricBatch(torch.full((1, 3, 4), torch.nan).double(), mask=torch.zeros(1, 4) > 0)
    if name != "linear_motion":
        assert build(name, vectors=0, scalars=0).double()(nothing).points.isfinite().all()


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("se3_hyenas", {}, "unknown model 'se3_hyenas'.*se3_hyena"),
        ("se3_hyena", {"hiden": 3}, "hiden; it has.*hidden"),
        ("se3_hyena", {"channels": 0}, "channels=0"),
        ("se3_hyena", {"padding": "mirror"}, "mirror.*'circular' or 'causal'"),
        ("se3_hyena_paper", {"hidden": -1}, "hidden=-1"),
        ("transformer", {"heads": 3}, "heads=3: must divide channels=32"),
        ("equivariant_transformer", {"heads": 3}, "heads=3: must divide channels=16"),
        ("linear_motion", {"parameters": 100}, "parameters=100: linear_motion has no width"),
    ],
)
def test_impossible_models_are_refused(name, options, said):
    with pytest.raises(ConfigError, match=said):
        build(name, vectors=1, scalars=1, **options)
    with pytest.raises(ConfigError, match=r"salience=True: needs scalars"):
        build("se3_hyena", vectors=1, scalars=0, salience=True)


def largest_gradient(name: str) -> float:
    """Of the parameters, where all points coincide and all scalars are 0."""
    torch.manual_seed(0)
    model = build(name, vectors=0, scalars=4).double()
    zeros = torch.zeros(1, 4, 16, dtype=torch.float64)
    out = model(GeometricBatch(3 + zeros[:, :3], scalars=zeros))
    (out.points.square().sum() + out.scalars.sum()).backward()
    gradients = [p.grad.abs().max() for p in model.parameters() if p.grad is not None and p.numel()]
    return torch.stack(gradients).max().item()


def test_gradients_at_coincident_points_are_as_large_as_documented():
    assert 1e15 < largest_gradient("se3_hyena_paper") < 1e25
    assert largest_gradient("se3_hyena") < 1e9


@pytest.mark.parametrize("name", MODELS)
def test_wrong_inputs_are_said_in_one_sentence(name):
    model, batch = small_model(name), small_batch([5, 3])
    half = small_model(name)
    parameter = list(half.parameters())[-1]
    parameter.data = parameter.data.half()
    shard = SequenceShard(7)
    wrong: list[tuple[Any, tuple[Any, ...], str]] = [
        (model, (batch.replace(vectors=batch.vectors[:, :1]),), "1 vector and 4 scalar channels"),
        (model, (batch.replace(points=batch.points.float()),), "points are torch.float32"),
        (model, (batch.to("meta"),), "on meta"),
        (model, (batch, shard), "5 tokens"),
        (half, (batch,), "float16 parameters"),
    ]
    for called, arguments, said in wrong:
        with pytest.raises(LongfoldError, match=said) as error:
            called(*arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("parameters", [20_000, 200_000])
@pytest.mark.parametrize("name", [name for name, kind in MODELS.items() if kind.width])
def test_the_width_comes_nearest_to_the_parameters(name, parameters):
    model = build(name, vectors=2, scalars=4, parameters=parameters)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(parameters, rel=0.06)
    with pytest.raises(ConfigError, match="parameters=0"):
        build(name, vectors=2, scalars=4, parameters=0)
    width: Any = MODELS[name].width
    with pytest.raises(ConfigError, match=f"chooses {width}"):
        build(name, vectors=2, scalars=4, parameters=parameters, **{width: 8})
