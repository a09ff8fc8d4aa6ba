"""All pairs of tokens, in blocks: attention and sums of messages, memory linear in the length.

    u_i = sum_j w_ij m(q_i, k_j),   w_ij = softmax_j of a logit(q_i, k_j), or 1

over the valid tokens j of i's own body, causal or not. Blocks of pairs are computed with a running
maximum and sum (Dao et al., arXiv 2205.14135), and once more for the gradient. With a shard the
keys of a rank go around the ring of ranks (Liu et al., arXiv 2310.01889), in the backward pass with
their gradients one step behind; P - 1 blocks are sent forward, and a rank holds two of others.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.errors import OptionError, ShapeError
from scaling.ops.masked_rows import MaskedRows
from scaling.parallel.ring import GradientsHome, blocks_in_turn
from scaling.parallel.telemetry import timed
from scaling.work import work_counter

CPU_BLOCK = 256
"""Queries, and keys, of a block on a CPU: its pairs fit the cache."""
GPU_PAIRS = 1 << 23
"""Pairs of a block on a GPU, all rows and heads together: they keep all processors busy for longer
than it takes to start the next operator."""


def block_tokens(device_type: str, rows_and_heads: int) -> int:
    """Queries, and keys, of a block."""
    if device_type == "cpu":
        return CPU_BLOCK
    return max(math.isqrt(GPU_PAIRS // max(rows_and_heads, 1)), CPU_BLOCK)


class PairTerms(ABC):
    """What one pair contributes to a sum over all.

    Queries and keys are tuples of (b, h, ..., n), h heads that do not see each other; what they
    share with all pairs, such as weights, is `shared`.
    """

    @abstractmethod
    def weighted(
        self,
        w: Float[Tensor, "b h i j"],
        q: Sequence[Tensor],
        k: Sequence[Tensor],
        shared: Sequence[Tensor],
    ) -> Float[Tensor, "b h d i"]:
        """sum_j w_ij m(q_i, k_j); w is 1, or 0 where i does not see j."""


class SoftmaxTerms(PairTerms):
    """Pairs that are weighed by the softmax of logits over j."""

    @abstractmethod
    def logits(
        self, q: Sequence[Tensor], k: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> Float[Tensor, "b h i j"]:
        """Of each pair."""


def all_pairs(
    terms: PairTerms,
    q: Sequence[Float[Tensor, "_b _h ... _n"]],
    k: Sequence[Float[Tensor, "_b _h ... _n"]],
    rows: MaskedRows,
    shared: Sequence[Tensor] = (),
    causal: bool = False,
    block: int | None = None,
) -> Float[Tensor, "b h d n"]:
    """u for this rank's tokens; 0 where a token has nobody to attend to.

    Time O(N² / P), memory O(N / P + block²). No second derivative.

    Args:
        q: fields of this rank's tokens as queries; finite, also at tokens that are not valid.
        k: fields of the same tokens as keys; these travel.
        rows: valid tokens, bodies and shard.
        shared: further tensors that `terms` computes with; they get gradients.
        causal: token i attends to tokens j <= i.
        block: that many queries and keys at once; None: as suits the device.

    Raises:
        ShapeError: fields that are not of the rows' tokens, or not of one dtype.
        OptionError: block < 1.
    """
    if block is None:
        block = block_tokens(q[0].device.type, math.prod(q[0].shape[:2]))
    if block < 1:
        raise OptionError("block", block, "must be 1 or more")
    fields = (*q, *k)
    tokens, shapes = tuple(rows.mask.shape), [tuple(x.shape) for x in fields]
    if any((s[0], s[-1]) != tokens for s in shapes) or len({s[1] for s in shapes}) > 1:
        raise ShapeError(
            f"queries and keys must be (b, h, ..., n) with (b, n) = {tokens}, as the mask, and one "
            f"h; they are {', '.join(map(str, shapes))}"
        )
    if len({x.dtype for x in fields}) > 1:
        raise ShapeError(f"queries and keys must have one dtype, not {[x.dtype for x in fields]}")
    counts = (len(q), len(k))
    device = "cpu" if rows.mask.is_meta else q[0].device.type  # autocast knows no meta device
    with timed("pairs"), torch.autocast(device, enabled=False):
        half = q[0].dtype in (torch.float16, torch.bfloat16)  # too few digits for a long sum
        numbers = [x.float() if half else x for x in (*fields, *shared)]
        if rows.mask.is_meta:  # nothing is computed, so that one block may be everything
            block = max(block, tokens[-1])
        run = partial(_AllPairs.apply, terms, _Pairing(rows, causal, block), counts, *numbers)
        if counter := work_counter():
            keys = [x.nbytes for x in numbers[len(q) : sum(counts)]]
            validity = rows.mask.numel() * numbers[0].itemsize
            return counter.pairs(run, sum(keys), validity)
        return run()


class _Pairing:
    """Which of this rank's queries see which keys, and in which blocks they are taken."""

    def __init__(self, rows: MaskedRows, causal: bool, block: int) -> None:
        self.shard, self.valid, self.causal, self.block = rows.shard, rows.mask, causal, block
        self.tokens = range(rows.mask.shape[-1])
        if rows.shard is not None:
            self.tokens = rows.shard.tokens_of(rows.shard.rank)
        self._rows = rows
        self.ends = None
        if rows.bodies is not None:
            self.ends = [list(accumulate(row)) for row in rows.bodies]
        self.places, self.body = self.located(self.tokens)

    def located(self, tokens: range) -> tuple[Int[Tensor, " n"], Int[Tensor, "b n"] | None]:
        """Places of tokens, and the numbers of the bodies there in each row, if it has several."""
        places = torch.arange(tokens.start, tokens.stop, tokens.step, device=self.valid.device)
        return places, None if self.ends is None else self._rows.body_at(places)

    def blocks_of_keys(self, k: Sequence[Tensor]) -> Iterator["_Keys"]:
        """Those of every rank, this rank's first."""
        packed = [x.flatten(0, -2) for x in (*k, self.valid.to(k[0].dtype))]
        own = torch.cat(packed).T.contiguous()
        for tokens, block in blocks_in_turn(own, self.shard, "pairs"):
            *fields, valid = unpacked(block, (*k, self.valid))
            yield _Keys(self, tokens, fields, valid > 0)

    def cuts(self, tokens: int) -> list[slice]:
        """Blocks of so many tokens; one at least."""
        starts = range(0, max(tokens, 1), self.block)
        return [slice(start, min(start + self.block, tokens)) for start in starts]


class _Keys:
    """The keys of one rank."""

    def __init__(
        self, pairing: _Pairing, tokens: range, fields: list[Tensor], valid: Bool[Tensor, "b n"]
    ) -> None:
        self.fields, self._valid, self._pairing, self._tokens = fields, valid, pairing, tokens
        self._places, self._body = pairing.located(tokens)

    def blocks(self, i: slice) -> Iterator[tuple[slice, Bool[Tensor, "b 1 #i j"]]]:
        """Blocks of keys that some of the queries i may see, and which pairs do not see each other;
        at least one block of this rank's own."""
        queries, pairing = self._pairing.tokens[i], self._pairing
        for j in pairing.cuts(len(self._tokens)):
            if not self._may_see(queries, self._tokens[j]):
                continue
            hidden = ~self._valid[:, None, None, j]
            if pairing.body is not None and self._body is not None:
                apart = pairing.body[:, i, None] != self._body[:, None, j]
                hidden = hidden | apart.unsqueeze(1)
            if pairing.causal:
                hidden = hidden | (pairing.places[i, None] < self._places[j])
            yield j, hidden

    def _may_see(self, queries: range, keys: range) -> bool:
        if not queries or not keys:
            return True
        if self._pairing.causal and queries[-1] < keys[0]:
            return False

        def overlap(ends: list[int]) -> bool:
            q, k = ([bisect_right(ends, t) for t in (x[0], x[-1])] for x in (queries, keys))
            return q[0] <= k[1] and k[0] <= q[1]

        return self._pairing.ends is None or any(map(overlap, self._pairing.ends))


def unpacked(rows: Float[Tensor, "n f"], like: Sequence[Tensor]) -> list[Tensor]:
    """A row for each token as fields of the shapes of `like`, but for the number of tokens."""
    parts = rows.T.split([math.prod(x.shape[:-1]) for x in like])
    return [part.reshape(*x.shape[:-1], len(rows)) for part, x in zip(parts, like, strict=True)]


class _AllPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, terms: PairTerms, pairing: _Pairing, counts: tuple[int, int], *numbers: Tensor
    ) -> Tensor:
        q, k, shared = _cut(numbers, counts)
        cuts = pairing.cuts(len(pairing.tokens))
        sums = [_RunningSum(terms, [x[..., i] for x in q], shared) for i in cuts]
        for keys in pairing.blocks_of_keys(k):
            for i, running in zip(cuts, sums, strict=True):
                for j, hidden in keys.blocks(i):
                    running.add([x[..., j] for x in keys.fields], hidden)
        u, normaliser = (
            torch.cat(some, -1) for some in zip(*(each.result() for each in sums), strict=True)
        )
        ctx.save_for_backward(u, normaliser, *numbers)
        ctx.arguments = terms, pairing, counts
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With w_ij = exp(logit_ij - normaliser_i), block by block the gradient of
        sum_ij w_ij (g_i · m_ij - g_i · u_i), where the last term is held constant."""
        (u, normaliser, *numbers), g = ctx.saved_tensors, grads[0]
        terms, pairing, counts = ctx.arguments
        q, k, shared = _cut(numbers, counts)
        mean = (g * u).sum(2) if isinstance(terms, SoftmaxTerms) else torch.zeros_like(normaliser)
        dq, dshared = [[torch.zeros_like(x) for x in some] for some in (q, shared)]
        home = GradientsHome(pairing.shard, "pairs")
        with timed("pairs"):
            for keys in pairing.blocks_of_keys(k):
                dk = [torch.zeros_like(x) for x in keys.fields]
                for i in pairing.cuts(len(pairing.tokens)):
                    for j, hidden in keys.blocks(i):
                        cut = [x[..., i] for x in q], [x[..., j] for x in keys.fields], shared
                        goals = [x[..., i] for x in dq] + [x[..., j] for x in dk] + dshared
                        constants = g[..., i], normaliser[..., i], mean[..., i]
                        found = _gradients(terms, cut, hidden, *constants)
                        for goal, gradient in zip(goals, found, strict=True):
                            goal += gradient
                home.add(torch.cat([x.flatten(0, -2) for x in dk]).T)
            dk = unpacked(home.arrived(), k)
        return None, None, None, *dq, *dk, *dshared


def _cut(numbers: Sequence[Tensor], counts: tuple[int, int]) -> list[list[Tensor]]:
    """Queries, keys, and what is shared."""
    first, last = counts[0], sum(counts)
    return [list(numbers[:first]), list(numbers[first:last]), list(numbers[last:])]


def _gradients(
    terms: PairTerms,
    cut: tuple[list[Tensor], list[Tensor], list[Tensor]],
    hidden: Bool[Tensor, "b 1 #i j"],
    g: Float[Tensor, "b h d i"],
    normaliser: Float[Tensor, "b h i"],
    mean: Float[Tensor, "b h i"],
) -> tuple[Tensor, ...]:
    """What one block of pairs adds to the gradients of its queries, keys and what is shared."""
    q, k, shared = ([x.detach().requires_grad_() for x in some] for some in cut)
    with torch.enable_grad():
        w = _weights(_logits(terms, q, k, shared, hidden), hidden, normaliser)
        total = (g * terms.weighted(w, q, k, shared)).sum() - (mean * w.sum(-1)).sum()
    return torch.autograd.grad(total, [*q, *k, *shared], allow_unused=True, materialize_grads=True)


def _logits(
    terms: PairTerms, q: list[Tensor], k: list[Tensor], shared: list[Tensor], hidden: Tensor
) -> Float[Tensor, "b h i j"] | None:
    if not isinstance(terms, SoftmaxTerms):
        return None
    return terms.logits(q, k, shared).masked_fill(hidden, -torch.inf)


def _weights(
    logits: Float[Tensor, "b h i j"] | None,
    hidden: Bool[Tensor, "b 1 #i j"],
    less: Float[Tensor, "b h i"],
) -> Float[Tensor, "b h i j"]:
    """exp(logit_ij - less_i), or 1; 0 where a query does not see a key."""
    if logits is None:
        return (~hidden).to(less.dtype).expand(*less.shape, -1)
    return (logits - less.unsqueeze(-1)).exp()


class _RunningSum:
    """Of a block of queries over the keys so far: weighted values, weights, largest logit."""

    def __init__(self, terms: PairTerms, q: list[Tensor], shared: list[Tensor]) -> None:
        self._terms, self._q, self._shared = terms, q, shared
        x = q[0]
        self._most = x.new_full((*x.shape[:2], x.shape[-1]), torch.finfo(x.dtype).min)
        if not isinstance(terms, SoftmaxTerms):
            self._most.zero_()
        self._total, self._values = torch.zeros_like(self._most), None

    def add(self, k: list[Tensor], hidden: Bool[Tensor, "b 1 #i j"]) -> None:
        logits, most = _logits(self._terms, self._q, k, self._shared, hidden), self._most
        if logits is not None and logits.shape[-1]:
            most = torch.maximum(most, logits.amax(-1))
        w, shrink = _weights(logits, hidden, most), (self._most - most).exp()
        self._total, self._most = shrink * self._total + w.sum(-1), most
        values = self._terms.weighted(w, self._q, k, self._shared)
        before = 0 if self._values is None else shrink.unsqueeze(2) * self._values
        self._values = before + values

    def result(self) -> tuple[Float[Tensor, "b h d i"], Float[Tensor, "b h i"]]:
        """u, and log sum_j exp(logit), which is infinite where there are no keys."""
        assert self._values is not None  # a token's own block is always looked at
        if not isinstance(self._terms, SoftmaxTerms):
            return self._values, self._total
        none = self._total == 0
        u = self._values / self._total.masked_fill(none, 1).unsqueeze(2)
        return u, (self._most + self._total.log()).masked_fill(none, torch.inf)
