"""VN-Transformer: layers against plain loops, the model against the package it is named after."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError, OptionError, ShapeError
from scaling.models import build, equivariance_error
from scaling.models.vector_neurons import (
    Block,
    LatentBlock,
    Logits,
    Variant,
    VNLayerNorm,
    VNLinear,
    VNReLU,
)
from scaling.models.vn_transformer import VNTransformer, from_package
from scaling.ops.masked_rows import MaskedRows
from tests.small_models import small_batch, small_model

C, D, HEADS, HEAD = 4, 5, 2, 3
MENDED, FAULTS = Variant(), Variant(faults=True)
VARIANTS = [MENDED, FAULTS, Variant(0.3), Variant(0.3, faults=True)]
BODIES = ((4, 3), (5,))
"""Of rows of 7 tokens; the second of the first row is missing."""


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def masked_rows() -> MaskedRows:
    mask = torch.arange(7) < torch.tensor([[7], [5]])
    mask[0, 1] = False
    return MaskedRows(mask, bodies=BODIES)


def bodies_of(rows: MaskedRows) -> list[tuple[int, list[int]]]:
    """Row and valid tokens of each body."""
    found = []
    for row, lengths in enumerate(BODIES):
        starts = [sum(lengths[:n]) for n in range(len(lengths))]
        found += [
            (row, [t for t in range(start, start + length) if rows.mask[row, t]])
            for start, length in zip(starts, lengths, strict=True)
        ]
    return found


def linear(layer: VNLinear, x: Tensor) -> Tensor:
    """Of one token's channels (i, d): y_o = sum_i W_oi x_i + bias."""
    y = []
    for o, weights in enumerate(layer.weight):
        total = sum((w * vector for w, vector in zip(weights, x, strict=True)), torch.zeros(1))
        if layer.bias is not None and layer.bias.ndim == 1:
            total = total + layer.epsilon * layer.bias[o] / layer.bias.norm()
        elif layer.bias is not None:
            bias = layer.epsilon * layer.bias[o] / layer.bias[o].norm()
            total = total + torch.cat([bias, torch.zeros(x.shape[1] - 3)])
        y.append(total)
    return torch.stack(y)


def relu(layer: VNReLU, x: Tensor) -> Tensor:
    y = []
    for weights, directions in zip(layer.W, layer.U, strict=True):
        q, k = weights @ x, directions @ x
        against = q.dot(k) / (k.norm() if layer.faults else k.norm() ** 2)
        y.append(q if q.dot(k) >= 0 else q - against * k)
    return torch.stack(y)


def norm(layer: VNLayerNorm, x: Tensor) -> Tensor:
    lengths = torch.stack([vector.norm() for vector in x])
    normed = torch.nn.functional.layer_norm(lengths, (len(x),), layer.gain, layer.shift)
    return torch.stack([n * v / v.norm() for n, v in zip(normed, x, strict=True)])


LAYERS: list[tuple[Callable[..., Any], Callable[..., Tensor]]] = [
    (lambda variant: VNLinear(C, 3, variant), linear),
    (lambda variant: VNReLU(C, variant), relu),
    (lambda variant: VNLayerNorm(C, variant), norm),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("make, in_loops", LAYERS, ids=["linear", "relu", "norm"])
def test_layers_are_their_formulas(make, in_loops, variant):
    layer, x = make(variant).double(), random(2, C, D, 6)
    for p in layer.parameters():
        p.data = random(*p.shape)
    y = layer(x)
    for row in range(2):
        for token in range(6):
            expected = in_loops(layer, x[row, ..., token])
            assert torch.allclose(y[row, ..., token], expected, atol=1e-12)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert gradcheck(lambda x, *_: layer(x), (x.requires_grad_(), *parameters))


def test_the_mended_non_linearity_is_a_projection():
    """What is left does not point against k, whatever the scale of U; the package's may."""
    x = random(1, C, D, 200)
    for variant in (MENDED, FAULTS):
        layer = VNReLU(C, variant).double()
        k = torch.einsum("oi,bidn->bodn", layer.U, x)
        y = layer(x)
        layer.U.data *= 3
        kept = (y * k).sum(2).min() > -1e-12 and torch.allclose(layer(x), y)
        assert kept == (variant is MENDED)


def test_initial_weights_keep_the_scale():
    x = random(1, 64, D, 100)
    for variant, scale in ((MENDED, 1), (FAULTS, 8)):
        rms = VNLinear(64, 64, variant).double()(x).square().mean().sqrt()
        assert 0.8 < rms / scale < 1.2


def attention(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
    """One query (e) over keys and values (tokens, e)."""
    scale = len(q) ** -0.5
    logits = []
    for other in k:
        if not block.distance:
            logits.append(scale * q.dot(other))
        elif block.faults:
            logits.append(2 * scale * q.dot(other) - q.dot(q) - other.dot(other))
        else:
            logits.append(-scale * (q - other).dot(q - other))
    return sum(
        (w * u for w, u in zip(torch.stack(logits).softmax(0), v, strict=True)),
        torch.zeros_like(v[0]),
    )


def heads(layer: VNLinear, tokens: list[Tensor]) -> Tensor:
    """(head, token, numbers): of each token its channels (i, d)."""
    mapped = torch.stack([linear(layer, x) for x in tokens])
    return mapped.reshape(len(tokens), HEADS, HEAD * D).transpose(0, 1)


def joined(u: list[Tensor]) -> Tensor:
    return torch.stack(u).reshape(HEADS * HEAD, D)


def finished(block: Block, x: Tensor, u: Tensor) -> Tensor:
    x = x + norm(block.attention_norm, linear(block.out, u))
    inner = relu(block.activation, linear(block.widen, x))
    return x + norm(block.feed_forward_norm, linear(block.narrow, inner))


def self_attention(block: Block, tokens: list[Tensor]) -> list[Tensor]:
    q, v = heads(block.queries, tokens), heads(block.values, tokens)
    k = q if block.keys is None else heads(block.keys, tokens)
    return [
        joined([attention(q[h, i], k[h], v[h], block) for h in range(HEADS)])
        for i in range(len(tokens))
    ]


def latents(block: LatentBlock, tokens: list[Tensor]) -> list[Tensor]:
    """What the latents of these tokens learn, before they tell."""
    assert block.keys is not None
    mean = torch.stack(tokens).mean(0)
    k, v = heads(block.keys, tokens), heads(block.values, tokens)
    z = []
    for pool in block.pool:
        (q,) = heads(block.queries, [pool.T @ mean]).transpose(0, 1)
        u = [attention(q[h], k[h], v[h], block) for h in range(HEADS)]
        z.append(linear(block.latent_out, joined(u)))
    return z


def latent_attention(block: LatentBlock, tokens: list[Tensor]) -> list[Tensor]:
    z, q = latents(block, tokens), heads(block.token_queries, tokens)
    k, v = heads(block.latent_keys, z), heads(block.latent_values, z)
    return [
        joined([attention(q[h, i], k[h], v[h], block) for h in range(HEADS)])
        for i in range(len(tokens))
    ]


@pytest.mark.parametrize("variant", [MENDED, FAULTS, Variant(0.3)], ids=str)
@pytest.mark.parametrize("logits", ["product", "distance"])
@pytest.mark.parametrize("kind", [Block, LatentBlock])
def test_blocks_are_their_formulas(kind, logits: Logits, variant):
    """Bodies that do not see each other, a missing token, tokens behind a row's end."""
    more = (3,) if kind is LatentBlock else ()
    block, rows = kind(C, HEADS, HEAD, 2, logits, variant, *more).double(), masked_rows()
    x = rows.zero_invalid(0.5 * random(2, C, D, 7))
    y = block(x, rows)
    in_loops: Any = latent_attention if kind is LatentBlock else self_attention
    for row, places in bodies_of(rows):
        tokens = [x[row, ..., t] for t in places]
        for t, token, u in zip(places, tokens, in_loops(block, tokens), strict=True):
            assert torch.allclose(y[row, ..., t], finished(block, token, u), atol=1e-11)
    assert y.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"latents": 2}, {"attention": "distance"}], ids=str)
def test_gradients_of_inputs_and_weights(options):
    model, mask = small_model("vn_transformer", blocks=1, **options), masked_rows().mask
    fields = [random(2, *shape, 7).requires_grad_() for shape in ((3,), (2, 3), (4,))]
    weights = list(model.parameters())[:6]

    def run(points, vectors, scalars, *_):
        batch = GeometricBatch(points, vectors, scalars, mask=mask, bodies=BODIES)
        out = model(batch)
        return out.points, out.vectors, out.scalars

    assert gradcheck(run, (*fields, *weights), fast_mode=True)
