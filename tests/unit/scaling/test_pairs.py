"""All pairs in blocks against the sum written out in loops: values and every gradient, for any
length, ranks, masks and bodies, causal or not; what travels, and what a rank holds."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import OptionError, ShapeError
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.pairs import PairTerms, all_pairs
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import measuring
from tests.threaded_ranks import run_threaded


class Attention(PairTerms):
    """exp(q·k) v, and a scale that all pairs share."""

    def logits(self, q, k, shared):
        return shared[0] * (q[0].mT @ k[0])

    def weighted(self, w, q, k, shared):
        return (w @ k[1].mT).mT


class Messages(PairTerms):
    """tanh(a (q - k)), added up."""

    softmax = False

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
                tokens.append(
                    sum(torch.tanh(a * (q[row, ..., i] - k[row, ..., j])) for j in seen)
                )
        out.append(torch.stack(tokens, -1))
    return torch.stack(out)


def case(n: int, softmax: bool, causal: bool, bodies: Any) -> tuple[dict[str, Tensor], Any, Tensor]:
    """Operands, who sees whom, and the mask; in the second row a token is missing."""
    like = {"dtype": torch.float64}
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
@pytest.mark.parametrize("n", [1, 7, 23])
def test_pairs_are_the_sum_in_loops_on_any_number_of_ranks(n, causal, softmax):
    for bodies in (None, ((n - n // 3, n // 3), (n,)), ((1,) * n, (n // 2, n - n // 2))):
        operands, sees, mask = case(n, softmax, causal, bodies)
        whole = {name: x.clone().requires_grad_() for name, x in operands.items()}
        u = in_loops(softmax, *whole.values(), sees)
        g = torch.randn_like(u)
        used = [x for name, x in whole.items() if softmax or name != "v"]
        grads = torch.autograd.grad(u, used, g, allow_unused=True, materialize_grads=True)
        expected = [u.detach(), *grads]
        for block in (1, 4, 64):
            one = {name: x.clone().requires_grad_() for name, x in operands.items()}
            found = call(one, mask, softmax, causal, bodies, None, block)
            used = [x for name, x in one.items() if softmax or name != "v"]
            for a, b in zip([found, *torch.autograd.grad(found, used, g)], expected, strict=True):
                assert (a - b).norm() <= 1e-12 * u.norm()
        for world in (1, 2, 3, 4, 8):
            arguments = (operands, mask, g, expected, softmax, causal, bodies, 3)
            assert max(run_threaded(compare, world, *arguments)) < 1e-12
