"""All pairs in blocks against the sum written out in loops: values and every gradient, for any
length, ranks, masks and bodies, causal or not; what travels, and what a rank holds."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import OptionError, ShapeError
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.pairs import (
    CPU_BLOCK,
    GPU_PAIRS,
    PairTerms,
    SoftmaxTerms,
    all_pairs,
    block_tokens,
)
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import measuring
from tests.threaded_ranks import run_threaded

WIDE = 67
"""Numbers of a value, by which its blocks are known among all tensors of the process."""


class Attention(SoftmaxTerms):
    """exp(q·k) v, and a scale that all pairs share."""

    def logits(self, q, k, shared):
        return shared[0] * (q[0].mT @ k[0])

    def weighted(self, w, q, k, shared):
        return (w @ k[1].mT).mT


class Messages(PairTerms):
    """tanh(a (q - k)), added up."""

    def weighted(self, w, q, k, shared):
        apart = q[0].unsqueeze(-1) - k[0].unsqueeze(-2)
        return (w.unsqueeze(2) * torch.tanh(shared[0] * apart)).sum(-1)


def in_loops(softmax: bool, q: Tensor, k: Tensor, v: Tensor, a: Tensor, sees: Any) -> Tensor:
    """Token by token, over the tokens that it sees."""
    out = []
    for row in range(q.shape[0]):
        tokens = []
        for i in range(q.shape[-1]):
            seen = [j for j in range(q.shape[-1]) if sees(row, i, j)]
            if not seen:
                tokens.append(torch.zeros_like(v[row, ..., 0] if softmax else q[row, ..., 0]))
            elif softmax:
                logits = [(a * q[row, ..., i] * k[row, ..., j]).sum(-1) for j in seen]
                w = torch.softmax(torch.stack(logits), 0)
                tokens.append(sum(w[n, :, None] * v[row, ..., j] for n, j in enumerate(seen)))
            else:
                tokens.append(sum(torch.tanh(a * (q[row, ..., i] - k[row, ..., j])) for j in seen))
        out.append(torch.stack(tokens, -1))
    return torch.stack(out)


def case(n: int, softmax: bool, causal: bool, bodies: Any) -> tuple[dict[str, Tensor], Any, Tensor]:
    """Operands, who sees whom, and the mask; in the second row a token is missing."""
    like: dict[str, Any] = {"dtype": torch.float64}
    operands = {
        "q": 3 * torch.randn(2, 2, 3, n, **like),
        "k": torch.randn(2, 2, 3, n, **like),
        "v": torch.randn(2, 2, 5, n, **like),
        "a": torch.tensor(1.3, **like),
    }
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, n // 2] = False
    body = [[b for b, length in enumerate(row) for _ in range(length)] for row in bodies or []]

    def sees(row: int, i: int, j: int) -> bool:
        apart = bool(body) and body[row][i] != body[row][j]
        return bool(mask[row, j]) and not apart and not (causal and j > i)

    return operands, sees, mask


def call(operands, mask, softmax, causal, bodies, shard, block) -> Tensor:
    q, k, v, a = operands.values()
    terms, keys = (Attention(), [k, v]) if softmax else (Messages(), [k])
    rows = MaskedRows(mask, shard, bodies=bodies)
    return all_pairs(terms, [q], keys, rows, [a], causal=causal, block=block)


def compare(group, operands, mask, g, expected, softmax, causal, bodies, block) -> float:
    n = mask.shape[-1]
    shard = SequenceShard(n, group)
    local = {name: x if x.ndim == 0 else shard.scatter(x) for name, x in operands.items()}
    local = {name: x.clone().requires_grad_() for name, x in local.items()}
    u = call(local, shard.scatter(mask), softmax, causal, bodies, shard, block)
    used = [x for name, x in local.items() if softmax or name != "v"]
    found = torch.autograd.grad(u, used, shard.scatter(g))
    errors = []
    for a, b in zip([u.detach(), *found], expected, strict=True):
        if b.ndim == 0:  # each rank has its own share
            torch.distributed.all_reduce(a, group=group)
        else:
            b = shard.scatter(b)
        errors.append(float((a - b).norm() / expected[0].norm()))
    return max(errors)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 5, 11])
def test_pairs_are_the_sum_in_loops_on_any_number_of_ranks(n, causal, softmax):
    for bodies in (None, ((n - n // 3, n // 3), (n // 2, n - n // 2))):
        operands, sees, mask = case(n, softmax, causal, bodies)
        whole = {name: x.clone().requires_grad_() for name, x in operands.items()}
        u = in_loops(softmax, *whole.values(), sees)
        g = torch.randn_like(u)
        used = [x for name, x in whole.items() if softmax or name != "v"]
        grads = torch.autograd.grad(u, used, g, allow_unused=True, materialize_grads=True)
        expected = [u.detach(), *grads]
        for block in (3, 64):
            one = {name: x.clone().requires_grad_() for name, x in operands.items()}
            found = call(one, mask, softmax, causal, bodies, None, block)
            used = [x for name, x in one.items() if softmax or name != "v"]
            for a, b in zip([found, *torch.autograd.grad(found, used, g)], expected, strict=True):
                assert (a - b).norm() <= 1e-12 * u.norm()
        for world in (1, 2, 3, 8):
            arguments = (operands, mask, g, expected, softmax, causal, bodies, 4)
            assert max(run_threaded(compare, world, *arguments)) < 1e-12


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_travels_and_what_a_rank_holds(distributed, world):
    """Forward P - 1 blocks of keys, backward as many and P of their gradients; at no time are more
    than two blocks of others there, nor more than two of their gradients."""
    n = 48
    for sent, exchanges, foreign in distributed(traffic, world, n):
        block = n // world * 4 * (3 + WIDE + 1)  # keys, values and validity, float32
        steps = 2 * (world - 1) + (world if world > 1 else 0)
        gradients = (world if world > 1 else 0) * n // world * 4  # which need no validity
        assert (sent, exchanges) == (steps * block - gradients, steps)
        assert foreign <= 4


def traffic(group: Any, n: int) -> tuple[int, int, int]:
    shard = SequenceShard(n, group)
    q, k, v = (torch.randn(1, 1, c, shard.n_local, requires_grad=True) for c in (3, 3, WIDE))
    rows = MaskedRows(torch.ones(1, shard.n_local, dtype=torch.bool), shard)
    most = 0

    class Watched(Attention):
        def weighted(self, w, q, k, shared):
            nonlocal most
            rows = [x for x in gc.get_objects() if type(x) is Tensor and x.ndim == 2]
            blocks = {
                x.untyped_storage().data_ptr() for x in rows if x.shape[1] in (3 + WIDE, 4 + WIDE)
            }
            most = max(most, len(blocks) - 1)  # one is its own
            return super().weighted(w, q, k, shared)

    with measuring() as measured:
        all_pairs(Watched(), [q], [k, v], rows, [torch.ones(())], block=16).sum().backward()
    count = measured.exchanges["pairs"]
    return count.bytes, count.calls, most


def test_pairs_of_other_bodies_are_not_computed():
    n, calls = 96, 0

    class Counted(Attention):
        def weighted(self, w, q, k, shared):
            nonlocal calls
            calls += 1
            return super().weighted(w, q, k, shared)

    x = torch.randn(1, 1, 3, n)
    rows = MaskedRows(torch.ones(1, n, dtype=torch.bool), bodies=((8,) * 12,))
    all_pairs(Counted(), [x], [x, x], rows, [torch.ones(())], block=8)
    assert calls == 12
    calls = 0
    whole = MaskedRows(torch.ones(1, n, dtype=torch.bool))
    all_pairs(Counted(), [x], [x, x], whole, [torch.ones(())], causal=True, block=8)
    assert calls == 12 * 13 // 2


def test_what_cannot_be_paired_is_refused():
    x = torch.randn(1, 1, 3, 4)
    rows = MaskedRows(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(OptionError, match="block=0"):
        all_pairs(Attention(), [x], [x, x], rows, block=0)
    with pytest.raises(ShapeError, match=r"\(1, 4\), as the mask.*\(1, 1, 3, 3\)"):
        all_pairs(Attention(), [x[..., :3]], [x, x], rows)
    with pytest.raises(ShapeError, match="one dtype"):
        all_pairs(Attention(), [x], [x.double(), x], rows)


@pytest.mark.parametrize("rows_and_heads", [1, 4, 12, 1000])
def test_a_block_on_a_gpu_holds_as_many_pairs_as_it_may(rows_and_heads):
    """Of all rows and heads together, but no fewer than a CPU's."""
    assert block_tokens("cpu", rows_and_heads) == CPU_BLOCK
    block = block_tokens("cuda", rows_and_heads)
    assert (block + 1) ** 2 * rows_and_heads > GPU_PAIRS
    assert block == CPU_BLOCK or block**2 * rows_and_heads <= GPU_PAIRS
