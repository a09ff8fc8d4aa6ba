"""EGNN against its equations token by token, against the package egnn-pytorch, and its counts."""

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError
from scaling.models import build
from scaling.models.egnn import EGNN, EGNNLayer, shortened
from scaling.models.virtual_nodes import VirtualNodes
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.neighbours import find_neighbours


def n_body() -> GeometricBatch:
    """Two systems of five charged particles."""
    charges = torch.randint(0, 2, (2, 1, 5)).double() * 2 - 1
    return GeometricBatch(torch.randn(2, 3, 5).double(), torch.randn(2, 1, 3, 5).double(), charges)


def test_the_published_configuration_has_the_published_count():
    model = build("egnn", vectors=1, scalars=1, neighbours=4, charges=True, points_only=True)
    assert sum(p.numel() for p in model.parameters()) == 134_020
    batch = n_body().to("cpu", torch.float32)
    out = model(batch)
    assert torch.equal(out.vectors, batch.vectors) and torch.equal(out.scalars, batch.scalars)
    assert not torch.equal(out.points, batch.points)


def test_the_n_body_model_is_its_equations():
    """As in the published code: every pair, mean of pushes, sum of messages, initial velocities."""
    model = build("egnn", 1, 1, neighbours=4, charges=True, points_only=True, hidden=5, layers=3)
    model, batch = model.double(), n_body()
    assert isinstance(model, EGNN)
    out = model(batch)
    for row in range(2):
        start, v, q = (t[row].movedim(-1, 0) for t in (batch.points, batch.vectors, batch.scalars))
        x, h = start, on_tokens(model.embed, v[:, 0].norm(dim=1, keepdim=True))
        for layer in model.layers:
            assert isinstance(layer, EGNNLayer)
            new_x, new_h = [], []
            for i in range(5):
                messages, pushes = [], []
                for j in [j for j in range(5) if j != i]:
                    edge = [square(x[i] - x[j]), q[i] * q[j], square(start[i] - start[j])]
                    m = torch.cat([h[i], h[j], *edge])
                    m = on_tokens(layer.phi_e, layer.first.weight @ m + layer.first.bias)
                    messages.append(m)
                    pushes.append((x[i] - x[j]) * on_tokens(layer.phi_x, m))
                assert layer.phi_v is not None
                moved = x[i] + torch.stack(pushes).mean(0) + on_tokens(layer.phi_v, h[i]) * v[i, 0]
                heard = torch.cat([h[i], torch.stack(messages).sum(0)])
                new_x.append(moved)
                new_h.append(h[i] + on_tokens(layer.phi_h, heard))
            x, h = torch.stack(new_x), torch.stack(new_h)
        assert torch.allclose(out.points[row].T, x, atol=1e-12)


def test_virtual_nodes_are_their_equations():
    """Features of tokens, positions and features of nodes, after two layers."""
    model = build("egnn", 1, 2, neighbours=3, virtual_nodes=2, hidden=4, layers=3)
    model = model.double()
    assert isinstance(model, EGNN)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    n, (x, v) = 6, (torch.randn(6, 3).double(), torch.randn(6, 3).double())
    s = torch.randn(6, 2).double()
    batch = GeometricBatch(x.T[None], v.T[None, None], s.T[None])
    out = model(batch)
    start, w = x, torch.zeros_like(v)
    h = on_tokens(model.embed, torch.cat([v.norm(dim=1, keepdim=True), s], 1))
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf)
    nearest = distance.argsort(1)[:, :3].tolist()
    first = model.layers[0].virtual
    assert isinstance(first, VirtualNodes) and first.learned is not None
    nodes, features = x.mean(0).expand(2, 3), first.learned[0, :, :, 0].T
    for layer in model.layers:
        assert isinstance(layer, EGNNLayer) and layer.virtual and layer.phi_v is not None
        around = nodes - x.mean(0)
        heard, new = [], ([], [], [])
        for i in range(n):
            m = []
            for c in range(2):
                products = around[c] @ around.T
                inputs = [h[i], features[c], (nodes[c] - x[i]).norm()[None], products]
                m.append(on_tokens(layer.virtual.phi_e, torch.cat(inputs)))
            heard.append(torch.stack(m))
            further = torch.stack(
                [torch.outer(on_tokens(layer.virtual.phi_x, m[c]), x[i] - nodes[c]) for c in (0, 1)]
            ).mean(0)
            sums, pushes = [], []
            for j in nearest[i]:
                edge = [square(x[i] - x[j]), square(start[i] - start[j])]
                message = layer.first.weight @ torch.cat([h[i], h[j], *edge]) + layer.first.bias
                sums.append(on_tokens(layer.phi_e, message))
                pushes.append(torch.outer(on_tokens(layer.phi_x, sums[-1]), x[i] - x[j]))
            push = torch.stack(pushes).mean(0) + further
            push = push + torch.outer(on_tokens(layer.phi_v, h[i]), v[i])
            new[0].append(x[i] + push[0])
            new[1].append(w[i] + push[1])
            read = torch.cat([h[i], torch.stack(sums).sum(0), heard[i].T.flatten()])
            new[2].append(h[i] + on_tokens(layer.phi_h, read))
        if layer.virtual.updated:
            m = torch.stack(heard)
            pull = on_tokens(layer.virtual.phi_out, m) * (nodes - x.unsqueeze(1))
            nodes = nodes + pull.mean(0)
            both = torch.cat([features, m.mean(0)], 1)
            features = features + on_tokens(layer.virtual.phi_h, both)
        x, w, h = (torch.stack(some) for some in new)
    assert model.read_scalars is not None
    assert torch.allclose(out.points[0].T, x, atol=1e-9)
    assert torch.allclose(out.vectors[0, 0].T, v + w, atol=1e-9)
    assert torch.allclose(out.scalars[0].T, s + on_tokens(model.read_scalars, h), atol=1e-9)


def square(x: Tensor) -> Tensor:
    return x.square().sum().unsqueeze(0)


def on_tokens(module: torch.nn.Module, x: Tensor) -> Tensor:
    """A map of channels, which are last here."""
    rows = x.reshape(-1, x.shape[-1])
    return module(rows.T.unsqueeze(0))[0].T.reshape(*x.shape[:-1], -1)


def test_a_layer_has_the_numbers_of_egnn_pytorch():
    """Its weights in float32; what it counts otherwise is said in the docstring, and put back."""
    package = pytest.importorskip("egnn_pytorch")
    n, dim = 9, 7
    theirs = package.EGNN(dim=dim, m_dim=dim, init_eps=0.3)
    h, x = torch.randn(2, n, dim), torch.randn(2, n, 3)
    wanted_h, wanted_x = theirs(h, x)

    def as_ours(sequence: torch.nn.Sequential) -> torch.nn.Sequential:
        """The same linear maps, tokens last."""
        return torch.nn.Sequential(
            *(_Last(m) if isinstance(m, torch.nn.Linear) else m for m in sequence)
        )

    layer = EGNNLayer(dim, 0, 0, 1, None, 1.0)
    first, *rest = theirs.edge_mlp
    layer.first.weight, layer.first.bias = first.weight, first.bias
    layer.phi_e = as_ours(torch.nn.Sequential(*rest))
    layer.phi_x, layer.phi_h = as_ours(theirs.coors_mlp), as_ours(theirs.node_mlp)
    rows = MaskedRows(torch.ones(2, n, dtype=torch.bool))
    points = x.mT.contiguous()
    neighbours = find_neighbours(points, rows, n - 1)
    (others,) = neighbours.gather(points)
    apart = points.unsqueeze(2) - others
    no_edges, no_v = points.new_zeros(2, 0, n - 1, n), points.new_zeros(2, 0, 3, n)
    tokens = h.mT.contiguous()
    own, other = layer.first.halves(tokens)
    (other_j,) = neighbours.gather(other)
    still = points.new_zeros(2, 1, 3, n)
    where = torch.zeros_like(apart), apart
    sums, push = layer.messages(own, still, other_j, *where, no_edges, neighbours.valid)
    itself = layer.phi_e(own + other)  # m_ii, at distance 0
    found_h, _ = layer.update(tokens, still, no_v, push, rows.mask, sums + itself)
    assert torch.allclose(found_h.mT, wanted_h, rtol=1e-5, atol=1e-5)
    found_x = x + (n - 1) * push[:, 0].mT
    assert torch.allclose(found_x, wanted_x, rtol=1e-5, atol=1e-5)


class _Last(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


def test_pushes_are_at_most_100_long_and_have_gradients_at_0():
    push = torch.tensor([[0.0, 0, 0], [3, 4, 0], [300, 400, 0]]).T.reshape(1, 1, 3, 3, 1)
    push.requires_grad_()
    short = shortened(push)
    assert torch.allclose(short.norm(dim=2).flatten(), torch.tensor([0.0, 5, 100]))
    short.sum().backward()
    assert push.grad is not None and push.grad.isfinite().all()


def test_a_radius_cuts_and_more_neighbours_than_atoms_are_refused():
    batch = n_body()
    far = build("egnn", 1, 1, neighbours=4, radius=100.0).double()
    near = build("egnn", 1, 1, neighbours=4, radius=1.0).double()
    near.load_state_dict(far.state_dict())
    assert not torch.allclose(far(batch).points, near(batch).points, atol=1e-7)
    with pytest.raises(ConfigError, match=r"neighbours=5: .*5 tokens.* 4 others"):
        build("egnn", 1, 1, neighbours=5).check_longest(5)
    far.check_longest(5)
    with pytest.raises(ConfigError, match="radius=0"):
        build("egnn", 1, 1, radius=0.0)
    with pytest.raises(ConfigError, match="radius=1e-09: no two"):
        build("egnn", 1, 1, radius=1e-9).double()(batch)
