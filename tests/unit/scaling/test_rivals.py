"""Rivals are their formulas, written out in loops; and what is known to be wrong with them."""

import math
from typing import Any

import pytest
import torch

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import OptionError
from scaling.algebra.clifford import embed, grade_0, grade_1
from scaling.algebra.vectors import principal_axes
from scaling.models import build
from scaling.models.equivariant_transformer import DotAttention
from scaling.models.hyena import HyenaBlock
from scaling.models.layers import LocalWeights
from scaling.models.messages import LocalMessages
from scaling.models.transformer import AttentionBlock
from scaling.models.vector_transformer import VectorAttention
from scaling.ops.masked_rows import MaskedRows
from tests.small_models import small_model

N = 7
VALID = torch.tensor([[True] * 3 + [False] + [True] * 3])


def streams(channels: int) -> tuple[torch.Tensor, torch.Tensor, MaskedRows]:
    f, x = torch.randn(1, channels, N).double(), torch.randn(1, channels, 3, N).double()
    rows = MaskedRows(VALID, known_lengths=(N,))
    return rows.zero_invalid(f), rows.zero_invalid(x), rows


def valid_tokens() -> list[int]:
    return [i for i in range(N) if VALID[0, i]]


@pytest.mark.parametrize("values", ["others", "own"])
@pytest.mark.parametrize("scale", ["mean", "none"])
def test_vector_attention_is_its_formulas(values, scale):
    block = VectorAttention(4, 3, values, scale).double()
    f, x, rows = streams(4)
    projected = block.phi(embed(f, x))
    qs, ks, vs = grade_0(projected)[0].chunk(3, 0)
    q, k, v = grade_1(projected)[0].movedim(1, 2).chunk(3, 0)  # (channel, token, 3)
    a, u = torch.zeros_like(f[0]), torch.zeros_like(x[0])
    for c in range(4):
        for i in valid_tokens():
            pairs = [torch.linalg.cross(q[c, i], k[c, j]) for j in valid_tokens()]
            w = torch.softmax(torch.stack([p.norm() / math.sqrt(N) for p in pairs]), 0)
            crossed = [v[c, j if values == "others" else i] for j in valid_tokens()]
            terms = [
                w[n] * torch.linalg.cross(p, y)
                for n, (p, y) in enumerate(zip(pairs, crossed, strict=True))
            ]
            u[c, :, i] = torch.stack(terms).sum(0) / (N if scale == "mean" else 1)
            ws = torch.softmax(torch.stack([qs[c, i] * ks[c, j] for j in valid_tokens()]), 0)
            a[c, i] = (ws * vs[c, valid_tokens()]).sum()
    update = block.xi(embed(f + a, x + u))
    new_f, new_x = block(f, x, rows=rows, features=())
    for ours, expected in ((new_f, f + grade_0(update)), (new_x, x + grade_1(update))):
        assert torch.allclose(ours[..., VALID[0]], expected[..., VALID[0]], atol=1e-10)


def test_equivariant_attention_is_its_formulas():
    block = DotAttention(4, 3, heads=2, causal=False).double()
    f, x, rows = streams(4)
    q, k, v = block.phi(embed(f, x))[0].transpose(0, 1).chunk(3, 0)  # (channel, 4, token)
    both = torch.zeros(4, 4, N).double()
    for head in (slice(0, 2), slice(2, 4)):
        for i in valid_tokens():
            logits = [(q[head, :, i] * k[head, :, j]).sum() / math.sqrt(8) for j in valid_tokens()]
            w = torch.softmax(torch.stack(logits), 0)
            for n, j in enumerate(valid_tokens()):
                both[head, :, i] += w[n] * v[head, :, j]
    update = block.xi(embed(f + both[None, :, 0], x + both[None, :, 1:]))
    new_f, new_x = block(f, x, rows=rows, features=())
    assert torch.allclose(new_f[..., VALID[0]], (f + grade_0(update))[..., VALID[0]], atol=1e-10)
    assert torch.allclose(new_x[..., VALID[0]], (x + grade_1(update))[..., VALID[0]], atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_a_transformer_block_is_torchs_own(causal):
    """With the same weights as torch.nn.TransformerEncoderLayer, on valid tokens."""
    block = AttentionBlock(6, heads=2, causal=causal).double()
    theirs = torch.nn.TransformerEncoderLayer(
        6, 2, 24, dropout=0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    y, _, rows = streams(6)
    attention, norm, mlp = theirs.self_attn, block.norm, block.mlp
    assert attention.in_proj_weight is not None and attention.in_proj_bias is not None
    same: dict[torch.Tensor, Any] = {
        attention.in_proj_weight: block.project_all.weight,
        attention.out_proj.weight: block.out.weight,
        attention.in_proj_bias: torch.zeros(18),
        attention.out_proj.bias: torch.zeros(6),
        theirs.linear1.weight: mlp.get_parameter("1.up.weight"),
        theirs.linear1.bias: mlp.get_parameter("1.up.bias")[:, 0],
        theirs.linear2.weight: mlp.get_parameter("1.down.weight"),
        theirs.linear2.bias: mlp.get_parameter("1.down.bias")[:, 0],
        theirs.norm1.weight: norm.weight[:, 0],
        theirs.norm1.bias: norm.bias[:, 0],
        theirs.norm2.weight: mlp.get_parameter("0.weight")[:, 0],
        theirs.norm2.bias: mlp.get_parameter("0.bias")[:, 0],
    }
    with torch.no_grad():
        for parameter, value in same.items():
            parameter.copy_(value)
    (found,) = block(y, rows=rows, features=())
    later = torch.ones(N, N, dtype=torch.bool).triu(1) if causal else None
    expected = theirs(y.mT, src_mask=later, src_key_padding_mask=~VALID).mT
    assert torch.allclose(found[..., VALID[0]], expected[..., VALID[0]], atol=1e-10)


@pytest.mark.parametrize("padding", ["causal", "circular"])
def test_a_hyena_block_is_its_formulas(padding):
    block = HyenaBlock(3, 4, 2, 5.0, padding).double()
    torch.nn.init.normal_(block.filters.bias)
    y, _, rows = streams(3)
    linear = rows.zero_invalid(block.project_all(block.norm(y)))[0]
    taps = block.short[..., 0]
    short = torch.zeros_like(linear)
    for i in range(N):
        for back in range(3):
            if i >= back:
                short[:, i] += taps[back] * linear[:, i - back]
    v, x1, x2 = short.chunk(3, 0)
    h1, h2 = block.filters(torch.arange(N), y).chunk(2, 0)

    def convolved(z, h, bias):
        z = torch.where(VALID[0], z, 0)
        u = torch.zeros_like(z)
        for i in range(N):
            for j in range(N):
                if padding == "circular" or j <= i:
                    u[:, i] += h[:, (i - j) % N] * z[:, j]
        return u + bias * z

    first, second = block.filters.bias.chunk(2, 0)
    mixed = x2 * convolved(x1 * convolved(v, h1, first), h2, second)
    expected = y + block.out(mixed[None])
    expected = expected + block.mlp(expected)
    (found,) = block(y, rows=rows, features=())
    assert torch.allclose(found[..., VALID[0]], expected[..., VALID[0]], atol=1e-10)


@pytest.mark.parametrize("kind", ["pairs", "neighbours"])
def test_messages_are_their_formulas(kind):
    branch = LocalMessages(3, kind, neighbours=N - 1).double()
    f, x, _ = streams(3)
    batch = GeometricBatch(3 * torch.randn(1, 3, N).double(), mask=VALID, lengths=(N,))
    rows = MaskedRows.of(batch, None)
    p = batch.points[0]
    new_f, new_x = branch(f, x, batch, rows)
    silu = torch.nn.functional.silu
    for i in valid_tokens():
        df, dx = torch.zeros(3).double(), torch.zeros(3, 3).double()
        for j in valid_tokens():
            if kind == "neighbours" and i == j:
                continue
            apart = p[:, i] - p[:, j]
            m = branch.own.weight @ f[0, :, i] + branch.other.weight @ f[0, :, j]
            m = silu(m + branch.distance * torch.log1p(apart.square().sum()))
            m = silu(branch.inner.weight @ m + branch.bias[:, 0])
            df += m
            dx += (branch.push.weight @ m)[:, None] * apart / (1 + apart.norm())
        count = N if kind == "pairs" else len(valid_tokens()) - 1
        expected = f[0, :, i] + branch.read_scalars.weight @ df / count
        assert torch.allclose(new_f[0, :, i], expected, atol=1e-10)
        assert torch.allclose(new_x[0, :, :, i], x[0, :, :, i] + dx / count, atol=1e-6)


def test_local_weights_are_their_formulas():
    """Values and every gradient; vectors of any lengths, a zero one too."""
    torch.manual_seed(0)
    module = LocalWeights(3, 2, 4, hidden=5).double()
    y, scalars = torch.randn(2, 3, 3, N).double() * 3, torch.randn(2, 2, N).double()
    y[0, 1, :, 2] = 0.0
    weight, bias, last_weight, last_bias = parameters = list(module.parameters())
    leaves = [y.requires_grad_(), scalars.requires_grad_(), *parameters]
    expected = torch.zeros(2, 4, 3, N).double()
    for b in range(2):
        for i in range(N):
            features = [scalars[b, 0, i], scalars[b, 1, i]]
            for m in range(3):
                for other in range(m, 3):
                    product = y[b, m, :, i].dot(y[b, other, :, i])
                    features.append(product.sign() * torch.log1p(product.abs()))
            h = torch.nn.functional.silu(weight @ torch.stack(features) + bias)
            w = (last_weight @ h + last_bias).reshape(4, 3)
            for c in range(4):
                for m in range(3):
                    expected[b, c, :, i] = expected[b, c, :, i] + w[c, m] * y[b, m, :, i]
    weights = torch.randn_like(expected)
    out = module(y, scalars)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_principal_axes_are_eigenvectors():
    y = torch.randn(5, 3, 9).double()
    c = (y @ y.mT).unsqueeze(-1)
    round_ones = torch.diag(torch.tensor([1.0, 2.0, 2.0]).double()).expand(5, 3, 3)
    c = torch.cat([c, round_ones.unsqueeze(-1)], -1)
    axes = principal_axes(c).movedim(-1, 1)
    lengths, _ = torch.linalg.eigh(c.movedim(-1, 1))
    assert torch.allclose(axes.mT @ axes, torch.eye(3).double().expand_as(axes), atol=1e-12)
    assert torch.allclose(torch.linalg.det(axes), torch.ones(5, 2).double(), atol=1e-12)
    found = axes.mT @ c.movedim(-1, 1) @ axes
    assert torch.allclose(found, torch.diag_embed(lengths.flip(-1)), atol=1e-11)


def test_frames_jump_where_two_axes_are_equally_long():
    """Two squares that differ by a billionth in either direction: the answers are far apart."""
    model = small_model("frame_averaged_hyena")
    corners = torch.tensor([[1.0, 1, 0], [-1, 1, 0], [-1, -1, 0], [1, -1, 0]]).double().T[None]
    scalars = torch.arange(16).reshape(1, 4, 4).double()

    def answer(change: float) -> torch.Tensor:
        stretch = torch.tensor([1 + change, 1 - change, 1], dtype=torch.float64).view(1, 3, 1)
        vectors = torch.zeros(1, 2, 3, 4).double()
        return model(GeometricBatch(stretch * corners, vectors, scalars)).points

    assert (answer(1e-9) - answer(2e-9)).norm() < 1e-6
    assert (answer(1e-9) - answer(-1e-9)).norm() > 1e-3


def test_straight_motion_is_straight():
    model = build("linear_motion", vectors=1, scalars=0, time=0.5)
    points, velocities = torch.randn(1, 3, 4), torch.randn(1, 1, 3, 4)
    out = model(GeometricBatch(points, velocities))
    assert torch.equal(out.points, points + 0.5 * velocities[:, 0])
    assert torch.equal(out.vectors, velocities)


def test_too_few_others_are_refused_where_neighbours_are_asked_for():
    with pytest.raises(OptionError, match="neighbours=5: no sequence is longer than 5 tokens"):
        build("geometric_hyena", 1, 1, neighbours=5).check_longest(5)
    build("geometric_hyena", 1, 1, neighbours=5).check_longest(6)
    build("geometric_hyena", 1, 1, neighbours=5, messages="pairs").check_longest(2)
