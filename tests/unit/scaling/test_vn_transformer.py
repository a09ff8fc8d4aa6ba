"""VN-Transformer: layers and blocks against plain loops, and what its options promise."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import gradcheck

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import OptionError
from scaling.models import build, equivariance_error
from scaling.models.vector_neurons import (
    LatentBlock,
    Logits,
    Variant,
    VNBlock,
    VNLayerNorm,
    VNLinear,
    VNReLU,
)
from scaling.ops.masked_rows import MaskedRows
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import measuring
from tests.small_models import small_batch, small_model
from tests.threaded_ranks import run_threaded

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
    assert gradcheck(lambda x, *_: layer(x), (x.requires_grad_(), *layer.parameters()))


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


def attention(q: Tensor, k: Tensor, v: Tensor, block: VNBlock) -> Tensor:
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


def finished(block: VNBlock, x: Tensor, u: Tensor) -> Tensor:
    x = x + norm(block.attention_norm, linear(block.out, u))
    inner = relu(block.activation, linear(block.widen, x))
    return x + norm(block.feed_forward_norm, linear(block.narrow, inner))


def self_attention(block: VNBlock, tokens: list[Tensor]) -> list[Tensor]:
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
@pytest.mark.parametrize("kind", [VNBlock, LatentBlock])
def test_blocks_are_their_formulas(kind, logits: Logits, variant):
    """Bodies that do not see each other, a missing token, tokens behind a row's end."""
    more = (3,) if kind is LatentBlock else ()
    block, rows = kind(C, HEADS, HEAD, 2, logits, variant, *more).double(), masked_rows()
    x = rows.zero_invalid(0.5 * random(2, C, D, 7))
    (y,) = block(x, rows=rows)
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


OPTIONS = [{"latents": 3}, {"attention": "distance"}, {"reference_faults": True}]


def answers(options: dict[str, Any], batch: GeometricBatch, shard: Any = None) -> list[Tensor]:
    """Outputs and gradients of inputs, of all ranks' tokens, and gradients of parameters."""
    model, inputs = small_model("vn_transformer", **options), batch.map(lambda x: x)
    if shard is not None:
        inputs = batch.map(shard.scatter)
    names = ("points", "vectors", "scalars")
    leaves = [getattr(inputs, name).requires_grad_() for name in names]
    out = model(inputs, shard)
    fields = [getattr(out, name) for name in names]
    weights = [x.nan_to_num() * inputs.mask.reshape(3, *[1] * (x.ndim - 2), -1) for x in leaves]
    terms = [(x.cos() * w.detach()).sum() for x, w in zip(fields, weights, strict=True)]
    found = torch.autograd.grad(torch.stack(terms).sum(), [*leaves, *model.parameters()])
    tokens, sums = [*fields, *found[:3]], torch.cat([x.flatten() for x in found[3:]])
    if shard is None:
        return [*tokens, sums]
    dist.all_reduce(sums)
    return [*map(shard.gather, tokens), sums]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_no_option_shows_the_ranks(world):
    """Rows of several bodies, too."""

    def on_a_rank(group: Any, options: dict[str, Any], batch: GeometricBatch) -> list[Tensor]:
        return answers(options, batch, SequenceShard(16, group))

    for options, bodies in product(OPTIONS, (None, ((6, 1, 9), (5,), (4, 5)))):
        batch = small_batch([16, 5, 9], bodies=bodies)
        expected = answers(options, batch)
        for found in run_threaded(on_a_rank, world, options, batch):
            for ours, one in zip(found, expected, strict=True):
                assert (ours - one).norm() <= 1e-10 * one.norm(), (options, bodies)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [*OPTIONS[:2], {"features": None}], ids=str)
def test_every_exact_option_is_equivariant(options, dtype, tolerance):
    model, batch = small_model("vn_transformer", dtype, **options), small_batch([37, 20], dtype)
    assert model.symmetry == "E(3)"
    for mirrored in (False, True):
        assert equivariance_error(model, batch, mirrored=mirrored) <= tolerance


def test_latents_of_many_bodies_take_as_many_exchanges_as_those_of_one():
    """And as many bytes as are counted."""

    def sent(group: Any, bodies: Any) -> tuple[int, int]:
        shard = SequenceShard(16, group)
        batch = small_batch([16], torch.float32, bodies).replace(lengths=(16,))
        model = small_model("vn_transformer", torch.float32, latents=3)
        with measuring() as measured:
            out = model(batch.map(shard.scatter), shard)
            (out.points.sum() + out.vectors.sum() + out.scalars.sum()).backward()
        return sum(count.calls for count in measured.exchanges.values()), measured.sent_bytes

    one, many = (run_threaded(sent, 4, bodies) for bodies in (None, ((6, 1, 9),)))
    assert one[0][0] == many[0][0] > 0
    work = small_model("vn_transformer", latents=3).work(16, 4)
    assert sum(rank_bytes for _, rank_bytes in one) == round(16 * work.exchange_bytes)


def moved(batch: GeometricBatch, options: dict[str, Any]) -> Tensor:
    """What a small model adds to the valid points."""
    out = small_model("vn_transformer", **options)(batch)
    return (out.points - batch.points.nan_to_num()).masked_fill(~batch.mask[:, None], 0)


def test_biases_have_their_length_and_break_the_symmetry_in_proportion():
    errors = []
    for epsilon in (1e-3, 1e-5):
        model = small_model("vn_transformer", bias_epsilon=epsilon)
        assert model.symmetry == "none"
        errors.append(equivariance_error(model, small_batch([20])))
    assert 30 < errors[0] / errors[1] < 300 and errors[1] > 1e-7
    layer = VNLinear(C, 3, Variant(0.3)).double()
    bias = layer(torch.zeros(1, C, D, 1, dtype=torch.float64))[0, ..., 0]
    assert torch.allclose(bias.norm(dim=1), torch.full((3,), 0.3, dtype=torch.float64))
    assert bias[:, 3:].abs().max() == 0


def test_tokens_are_a_set_without_positions():
    batch, order = small_batch([16]), torch.randperm(16)
    shuffled = batch.map(lambda x: x[..., order]).replace(index=batch.index)
    for positions in (0, 4):
        options = {"positions": positions}
        error = moved(shuffled, options) - moved(batch, options)[..., order]
        assert (error.abs().max() < 1e-12) == (positions == 0)


@pytest.mark.parametrize("options", [{}, {"features": None}, {"latents": 2}], ids=str)
def test_what_padding_holds_does_not_matter(options):
    batch = small_batch([16, 12])
    behind = ~batch.mask[:, None]
    full = batch.replace(
        scalars=batch.scalars.masked_fill(behind, torch.nan),
        vectors=batch.vectors.masked_fill(behind.unsqueeze(1), torch.inf),
    )
    assert torch.equal(moved(full, options), moved(batch, options))


def test_rows_do_not_move_each_other_but_for_the_reference():
    batch = small_batch([16, 12])
    far = batch.replace(points=batch.points + torch.tensor([[[0.0]], [[5.0]]]))
    for faults in (False, True):
        before, after = (moved(x, {"reference_faults": faults})[0] for x in (batch, far))
        assert torch.allclose(before, after, atol=1e-9) == (not faults)


def test_only_the_reference_takes_scalars_for_coordinates():
    """A rotation of the plane of one coordinate and one scalar turns the answer's alike."""
    plane = torch.eye(4, dtype=torch.float64)
    plane[[0, 3], [0, 3]], plane[0, 3], plane[3, 0] = 0.6, 0.8, -0.8
    fields = random(1, 4, 9)
    for faults in (False, True):
        options = {"features": None, "positions": 0, "centred": False, "reference_faults": faults}
        torch.manual_seed(0)
        model = build("vn_transformer", 0, 1, **options).double()

        def step(x: Tensor, model: Any = model) -> Tensor:
            out = model(GeometricBatch(x[:, :3], scalars=x[:, 3:]))
            return torch.cat([out.points, out.scalars], 1) - x

        assert torch.allclose(step(plane @ fields), plane @ step(fields), atol=1e-9) == faults


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(OptionError, match=r"heads=4: must divide channels=6; or give head_channe"):
        build("vn_transformer", 0, 0, channels=6, heads=4, head_channels=None)
    model = build("vn_transformer", 0, 0, channels=6, heads=3, head_channels=None)
    (block, _) = [module for module in model.modules() if isinstance(module, VNBlock)]
    assert block.queries.weight.shape == (6, 6)


@pytest.mark.package("VN_transformer")
@pytest.mark.parametrize("distance", [False, True])
def test_the_package_has_the_same_latents(distance):
    """It has them in its attention, which its model does not offer."""
    from VN_transformer import VNAttention

    theirs = VNAttention(C, dim_head=HEAD, heads=HEADS, num_latents=3, l2_dist_attn=distance)
    block = LatentBlock(C, HEADS, HEAD, 2, "distance" if distance else "product", FAULTS, 3)
    names = {"queries": "to_q", "keys": "to_k", "values": "to_v", "latent_out": "to_out"}
    state = theirs.state_dict()
    for ours, name in names.items():
        getattr(block, ours).weight.data = state[f"{name}.weight"]
    block.pool.data = state["to_q_input.weight"]
    x, mask = 0.3 * torch.randn(2, 7, C, D), masked_rows().mask
    expected = theirs(x, mask=mask)
    for row in range(2):
        tokens = [x[row, t] for t in range(7) if mask[row, t]]
        found = torch.stack(latents(block, tokens))
        assert (found - expected[row]).norm() <= 1e-5 * expected[row].norm()
