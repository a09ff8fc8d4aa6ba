"""Vector attention: both forms against the sum as it is written, with gradients."""

import math

import pytest
import torch

from data_pipeline.errors import OptionError, ShapeError
from scaling.ops.attention import vector_attention


def as_written(q, k, v):
    """Eq. (5), query by query."""
    n, rows = q.shape[-1], []
    for i in range(n):
        pairs = torch.linalg.cross(q[..., i, None].expand_as(k), k, dim=-2)
        w = torch.softmax(pairs.norm(dim=-2, keepdim=True) / math.sqrt(n), -1)
        rows.append((w * torch.linalg.cross(pairs, v, dim=-2)).mean(-1))
    return torch.stack(rows, -1)


@pytest.mark.parametrize("block", [None, 1, 5, 13, 64])
def test_every_form_is_the_sum_as_written(block):
    """Blocks that divide 13 tokens, that do not, and one for all; two channels of one row."""
    q, k, v, g = torch.randn(4, 1, 2, 3, 13, dtype=torch.float64)
    q[..., 3] = 2 * k[..., 3]  # no plane: the norm has no slope
    q = 16 * q  # weights far from uniform: the maximum moves
    given = [x.requires_grad_() for x in (q.detach(), k, v)]
    expected, found = as_written(*given), vector_attention(*given, block=block)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(u, given, g) for u in (found, expected)), strict=True):
        assert (a - b).norm() <= 1e-7 * b.norm()


def test_the_softmax_is_nearly_uniform():
    """But for it u is linear in q, so that q -> 0 leaves the mean of all pairs."""
    q, k, v = torch.randn(3, 8, 3, 1024, dtype=torch.float64)
    uniform = vector_attention(1e-6 * q, k, v, 256) / 1e-6
    error = (vector_attention(q, k, v, 256) - uniform).norm() / uniform.norm()
    assert 1e-3 < error < 0.2


def test_what_cannot_be_attended_to_is_refused():
    q = torch.randn(3, 4)
    with pytest.raises(ShapeError, match=r"\(3, 4\) torch.float32, \(3, 4\) torch.float64"):
        vector_attention(q, q.double(), q)
    with pytest.raises(OptionError, match="block=0"):
        vector_attention(q, q, q, 0)
