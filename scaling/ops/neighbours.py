"""Neighbours in space: who they are, and what they hold, on whichever rank.

They are found once, before the first layer, among the valid tokens of a token's own body: the k
nearest, of those within a radius if one is given, by (distance, place in the sequence). So there is
one answer, on any number of ranks. A token is not its own neighbour; where a body has fewer others,
or fewer are within the radius, it has fewer neighbours, and one that is not valid has none.

With a shard, which is contiguous, the points of every rank go around the ring of ranks, 24 bytes a
token (40 in float64), and each rank looks for its own tokens' neighbours in the block in hand: it
holds two of others at most. Then each rank says which tokens of others it needs; what these hold
comes by one exchange a layer, and its gradient goes back by one.

About 5 k distances a token are computed (12 for k = 1), on many ranks as many where ranks hold
different regions, as of a chain, and up to four times as many on 8 ranks where they do not.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.errors import ConfigError, OptionError, RunError, ShapeError
from scaling.ops.cells import NO_PLACE, Cells, Points, cell_order, limit_key, place_in
from scaling.ops.masked_rows import MaskedRows
from scaling.parallel.collectives import all_reduce_max
from scaling.parallel.halo import Halo
from scaling.parallel.ring import blocks_in_turn
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import timed
from scaling.work import work_counter

OPERATOR = "neighbours"
FARTHEST = 1e18
"""Squares of longer distances leave float32."""


@dataclass(frozen=True)
class Neighbours:
    """At most k neighbours of each of this rank's tokens, the nearest first."""

    valid: Bool[Tensor, "b k n"]
    """False: there is none."""
    distances: int
    """Between points, that this rank computed to find them."""
    _rows: Int[Tensor, "b k n"]
    """Of this rank's tokens (row by row), of the halo behind them, or of the zeros at the end."""
    _halo: Halo

    def gather(self, *fields: Float[Tensor, "b ... n"]) -> tuple[Float[Tensor, "b ... k n"], ...]:
        """What the neighbours hold, all fields by one exchange; 0 where there is none. Gradients
        flow back to their owners."""
        rows, k, n = self.valid.shape
        channels = [x.reshape(rows, math.prod(x.shape[1:-1]), n) for x in fields]
        own = torch.cat(channels, 1).movedim(1, 2).flatten(0, 1)
        if counter := work_counter():
            counter.halo(own, rows * min(k, n // counter.ranks))
        pool = self._halo.beside(own, OPERATOR)
        pool = torch.cat([pool, pool.new_zeros(1, pool.shape[1])])
        found = pool.index_select(0, self._rows.flatten()).unflatten(0, (rows, k, n)).movedim(-1, 1)
        split = found.split([x.shape[1] for x in channels], 1)
        return tuple(
            x.reshape(*like.shape[:-1], k, n) for x, like in zip(split, fields, strict=True)
        )


@torch.no_grad()
def find_neighbours(
    points: Float[Tensor, "b 3 n"], rows: MaskedRows, k: int, radius: float | None = None
) -> Neighbours:
    """The k nearest tokens of each token's body, within the radius if there is one.

    O(N log N) time; the host waits. On the meta device, which has no points, every token has k
    neighbours, and the halo is k tokens of the rank before and k of the rank behind.

    Args:
        points: of this rank's tokens; anything where they are not valid.
        rows: valid tokens, bodies and shard.

    Raises:
        OptionError: k < 1; a radius that is not positive, or within which nobody has a neighbour.
        ConfigError: all points of a row are at one place.
        RunError: a valid point is not finite, or 1e18 from the others.
        ShapeError: the shard is cyclic, or rows times their length is 2^32 or more.
    """
    shard = rows.shard
    if k < 1:
        raise OptionError("k", k, "must be 1 or more")
    if radius is not None and not 0 < radius < math.inf:
        raise OptionError("radius", radius, "must be greater than 0 and finite, or null for none")
    if shard is not None and shard.layout != "contiguous":
        raise ShapeError(f"neighbours need contiguous shards, and this is {shard}")
    length = points.shape[-1] if shard is None else shard.length
    if len(points) * length >= NO_PLACE:
        raise ShapeError(f"{len(points)} rows of {length} tokens: all together must be below 2^32")
    with timed(OPERATOR):
        if points.is_meta:
            if counter := work_counter():  # the points and their places, around the ring
                counter.add(exchange_bytes=(counter.ranks - 1) * rows.mask.numel() * 24)
            return _without_points(points, rows, k)
        points = rows.zero_invalid(
            points.double() if points.dtype == torch.float64 else points.float()
        )
        several = _check(points, rows)
        own = _points(points, rows, length)
        best, distances = _nearest(own, rows.shard, k, limit_key(radius), len(points))
        valid = best < limit_key(radius)
        if radius is not None and several and not _anywhere(valid.any(), rows):
            rule = "no two points of a body are that near; give a larger one"
            raise OptionError("radius", radius, rule)
        shape = (len(points), points.shape[-1], k)
        places, valid = (x.reshape(shape).movedim(1, 2) for x in (place_in(best), valid))
        found, halo = _rows_of(places, valid, length, shard)
        return Neighbours(valid, distances, found, halo)


def _check(points: Float[Tensor, "b 3 n"], rows: MaskedRows) -> bool:
    """Refuses, on every rank alike, points that nobody can look for neighbours among.

    Returns:
        Whether any row has two valid tokens.
    """
    tokens = torch.arange(points.shape[-1], device=points.device).double()
    if rows.shard is not None:
        tokens = rows.shard.index_on(points.device).double()
    numbers = torch.cat([points.double(), tokens.expand(len(points), 1, -1)], 1)
    both = torch.cat([numbers, -numbers], 1).nan_to_num(torch.inf)
    most = torch.full((*both.shape[:2], 1), -torch.inf, dtype=both.dtype, device=both.device)
    most = torch.cat([both.masked_fill(~rows.mask.unsqueeze(1), -torch.inf), most], -1).amax(-1)
    if rows.shard is not None:
        most = all_reduce_max(most, rows.shard.group, OPERATOR)
    spreads = (most[:, :4] + most[:, 4:]).tolist()  # of x, y, z and the place; -inf without tokens
    for row, (*spread, places) in enumerate(spreads):
        if places > -math.inf and not max(spread) < FARTHEST:
            raise RunError(
                f"row {row} has a valid point that is not finite, or {FARTHEST:.0e} from another; "
                "mask such tokens, or look where they come from"
            )
        if places > 0 and max(spread) == 0:
            raise ConfigError(
                f"all points of row {row} are at one place, so that none is nearer than another; "
                "take a model without neighbours, or data with positions"
            )
    return any(places > 0 for *_, places in spreads)


def _points(points: Float[Tensor, "b 3 n"], rows: MaskedRows, length: int) -> Points:
    """This rank's, row by row; places of different rows differ, too."""
    b, _, n = points.shape
    tokens = torch.arange(n, device=points.device)
    if rows.shard is not None:
        tokens = rows.shard.index_on(points.device)
    row = torch.arange(b, device=points.device).unsqueeze(1)
    body = row.expand(b, n)
    if rows.bodies is not None:
        body = row * (max(map(len, rows.bodies)) + 1) + rows.body_at(tokens)
    place = (row * length + tokens).masked_fill(~rows.mask, NO_PLACE)
    return Points.of_bodies(points.movedim(1, 2).flatten(0, 1), body.flatten(), place.flatten())


def _nearest(
    own: Points, shard: SequenceShard | None, k: int, limit: int, rows: int
) -> tuple[Int[Tensor, "n k"], int]:
    """Keys of the k nearest of each own point, ascending, and how many distances were computed."""
    order = cell_order(own, k)
    queries, n = own.some(order), len(own) // max(rows, 1)
    best = torch.full((len(own), k), limit, device=order.device)
    packed, distances = queries.packed(), 0
    for _, block in blocks_in_turn(packed.reshape(n, rows * packed.shape[1]), shard, OPERATOR):
        there = Points.unpacked(block.reshape(len(block) * rows, packed.shape[1]))
        distances += Cells(there, k).search(queries, best)
    return torch.empty_like(best).index_copy_(0, order, best), distances


def _rows_of(
    places: Int[Tensor, "b k n"],
    valid: Bool[Tensor, "b k n"],
    length: int,
    shard: SequenceShard | None,
) -> tuple[Int[Tensor, "b k n"], Halo]:
    """Where the neighbours' rows are among own ones and the halo's, and the halo."""
    b, _, n = places.shape
    row, token = places // length, places % length
    if shard is None or shard.size == 1:
        return torch.where(valid, row * n + token, b * n), Halo()
    ranks = [shard.tokens_of(rank) for rank in range(shard.size)]
    starts, counts = torch.tensor(
        [[r.start for r in ranks], [len(r) for r in ranks]], device=places.device
    )
    owner = torch.searchsorted(starts, token.contiguous(), right=True) - 1
    there = row * counts[owner] + token - starts[owner]
    foreign = valid & (owner != shard.rank)
    most = b * max(map(len, ranks))
    wanted, number = torch.unique((owner * most + there)[foreign], return_inverse=True)
    from_each = (wanted // most).bincount(minlength=shard.size)
    halo = Halo.asked_for(wanted % most, from_each, shard, OPERATOR)
    there[foreign] = b * n + number
    return torch.where(valid, there, b * n + len(wanted)), halo


def _without_points(points: Float[Tensor, "b 3 n"], rows: MaskedRows, k: int) -> Neighbours:
    """k neighbours of every token; the halo is that of a chain whose neighbours in space are those
    in the sequence."""
    b, _, n = points.shape
    shape, device, shard = (b, k, n), points.device, rows.shard
    halo = Halo()
    if shard is not None and shard.size > 1:
        held = [len(shard.tokens_of(rank)) for rank in range(shard.size)]
        near = [abs(rank - shard.rank) == 1 for rank in range(shard.size)]
        send, receive = (
            [b * min(k, count) * side for count, side in zip(counts, near, strict=True)]
            for counts in ([n] * shard.size, held)
        )
        sent = torch.empty(sum(send), dtype=torch.long, device=device)
        halo = Halo(shard, sent, send, receive)
    valid = torch.ones(shape, dtype=torch.bool, device=device)
    return Neighbours(valid, 0, torch.empty(shape, dtype=torch.long, device=device), halo)


def _anywhere(true: Bool[Tensor, ""], rows: MaskedRows) -> bool:
    numbers = true.long()
    if rows.shard is not None:
        numbers = all_reduce_max(numbers, rows.shard.group, OPERATOR)
    return bool(numbers)
