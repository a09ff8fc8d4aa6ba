"""The k nearest points of each query among those of its body, exactly, by cells.

Points are cut at medians along their widest axis, again and again, into cells of a few points each:
cells are small where points are dense, whatever their distribution. A query goes down to the cell
nearest to it, and then back through those whose box is nearer than the worst of its k.

What is compared is a key: the squared distance, rounded to float32, and behind it the point's place
in the sequence. Keys of two points never agree, so that the answer depends on nothing else; and a
box has a key, too, no greater than those of its points. Where many points are at one place, the
first of them are found in as little time as any others.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LEAST_IN_A_CELL = 4
QUERIES = 1 << 17
"""That many are under way at once: some 200 MB."""
PLACE_BITS = 32
NO_PLACE = (1 << PLACE_BITS) - 1
"""Behind all places."""
APART = 1e30
"""Distance of bodies along a fourth axis: its square is infinite in float32."""


def key_of(squares: Float[Tensor, "*s"], places: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    """Orders by squared distance, then by place. Floats from 0 are ordered as their bits are."""
    return (squares.float().view(torch.int32).long() << PLACE_BITS) | places


def place_in(key: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    return key & NO_PLACE


def limit_key(radius: float | None) -> int:
    """Greater than the keys of all points within the radius, and of none beyond it."""
    most = torch.tensor(torch.finfo(torch.float32).max if radius is None else radius**2)
    return int(key_of(most, torch.tensor(NO_PLACE)))


@dataclass
class Points:
    """Points in any order."""

    x: Float[Tensor, "n 4"]
    """Coordinates, and the number of the point's body times APART."""
    place: Int[Tensor, " n"]
    """Of each point another; NO_PLACE: it neither asks nor is found."""

    @classmethod
    def of_bodies(
        cls, xyz: Float[Tensor, "n 3"], body: Int[Tensor, " n"], place: Int[Tensor, " n"]
    ) -> "Points":
        return cls(torch.cat([xyz, APART * body.to(xyz.dtype).unsqueeze(1)], 1), place)

    def __len__(self) -> int:
        return len(self.place)

    @property
    def hidden(self) -> Bool[Tensor, " n"]:
        return self.place == NO_PLACE

    def some(self, which: Tensor | slice) -> "Points":
        return Points(self.x[which], self.place[which])

    def padded(self, cells: int) -> "Points":
        """With hidden ones behind the last, so that all cells hold as many, and one at least."""
        more = (0, -len(self) % cells if len(self) else cells)
        pad = torch.nn.functional.pad
        return Points(pad(self.x, (0, 0, *more)), pad(self.place, more, value=NO_PLACE))

    def packed(self) -> Int[Tensor, "n f"]:
        """Their bits, 24 bytes a point (40 in float64)."""
        integer = torch.int32 if self.x.dtype == torch.float32 else torch.long
        return torch.cat([self.x.view(integer), self.place.unsqueeze(1).view(integer)], 1)

    @classmethod
    def unpacked(cls, bits: Int[Tensor, "n f"]) -> "Points":
        dtype = torch.float32 if bits.dtype == torch.int32 else torch.float64
        x, place = (part.contiguous() for part in (bits[:, :4], bits[:, 4:]))
        return cls(x.view(dtype), place.view(torch.long)[:, 0])


def depth_of(points: int, k: int) -> int:
    """Of the tree over so many points, of which k nearest will be asked for."""
    return max(points // max(LEAST_IN_A_CELL, k // 2), 1).bit_length() - 1


def cell_order(points: Points, k: int) -> Int[Tensor, " n"]:
    """The order in which points fill the cells one after the other."""
    depth, count = depth_of(len(points), k), len(points)
    points = points.padded(1 << depth)
    order = points.x[:, 3].masked_fill(points.hidden, torch.inf).argsort(stable=True)
    for level in range(depth):
        order = order[_halves(points.some(order), 1 << level)]
    return order[:count]


class Cells:
    """A balanced tree over points; node 1 is its root, 2n and 2n + 1 are n's children.

    Args:
        points: in `cell_order`.
        k: as there.
    """

    def __init__(self, points: Points, k: int) -> None:
        self.depth = depth_of(len(points), k)
        padded = points.padded(1 << self.depth)
        self._x = padded.x.T.reshape(4, 1 << self.depth, -1).movedim(1, 0).contiguous()
        self._place = padded.place.reshape(1 << self.depth, -1)
        self._boxes, self._first = self._of_nodes()

    def _of_nodes(self) -> tuple[Float[Tensor, "nodes 2 4"], Int[Tensor, " nodes"]]:
        """Lowest and highest coordinates of the points in each node, and their first place."""
        hidden = (self._place == NO_PLACE).unsqueeze(1)
        low = self._x.masked_fill(hidden, torch.inf).amin(-1)
        high = self._x.masked_fill(hidden, -torch.inf).amax(-1)
        first = self._place.amin(-1)
        levels = [(low, high, first)]
        for _ in range(self.depth):
            low = low.unflatten(0, (-1, 2)).amin(1)
            high = high.unflatten(0, (-1, 2)).amax(1)
            first = first.unflatten(0, (-1, 2)).amin(1)
            levels.append((low, high, first))
        low, high, first = (torch.cat([x[-1][:1], *x[::-1]]) for x in zip(*levels, strict=True))
        return torch.stack([low, high], 1), first  # node 0 is there to be counted from

    def search(self, queries: Points, best: Int[Tensor, "n k"]) -> int:
        """Puts keys of points that are nearer than the worst of a query's `best` among these,
        ascending. A query is not its own neighbour.

        Returns:
            How many distances between points were computed.
        """
        cuts = [slice(i, i + QUERIES) for i in range(0, len(queries), QUERIES)]
        return sum(_Search(self, queries.some(cut), best[cut]).run() for cut in cuts)

    def keys_of_children(
        self, x: Float[Tensor, "n 4"], node: Int[Tensor, " n"]
    ) -> Int[Tensor, "n 2"]:
        box = self._boxes.view(-1, 2, 2, 4).index_select(0, node)
        x = x.unsqueeze(1)
        outside = torch.maximum(box[:, :, 0] - x, x - box[:, :, 1]).clamp_(min=0)
        return key_of(_square(outside.unbind(-1)), self._first.view(-1, 2).index_select(0, node))

    def keys_in(
        self, x: Float[Tensor, "n 4"], place: Int[Tensor, " n"], cell: Int[Tensor, " n"]
    ) -> Int[Tensor, "n m"]:
        """Of a cell's points."""
        away = self._x.index_select(0, cell) - x.unsqueeze(2)
        places = self._place.index_select(0, cell)
        nobody = (places == NO_PLACE) | (places == place.unsqueeze(1))
        squares = _square(away.unbind(1)).masked_fill_(nobody, torch.inf)
        return key_of(squares, places)


def _square(d: tuple[Float[Tensor, "*s"], ...]) -> Float[Tensor, "*s"]:
    """Always added in this order: rounding is then the same for a pair on any rank, and what is no
    farther along any axis is no farther."""
    return d[0] * d[0] + d[1] * d[1] + d[2] * d[2] + d[3] * d[3]


def _halves(points: Points, nodes: int) -> Int[Tensor, " n"]:
    """The order in which every node's points are sorted along its widest axis, hidden ones last.
    Nodes of several bodies stay as they are: sorted by body."""
    x, hidden = points.x.T.reshape(4, nodes, -1), points.hidden.reshape(nodes, -1)
    highest = x.masked_fill(hidden, -torch.inf).amax(-1)
    width = highest - x.masked_fill(hidden, torch.inf).amin(-1)
    widest = width[:3].argmax(0).reshape(1, -1, 1).expand(1, -1, x.shape[-1])
    along = x.gather(0, widest)[0].masked_fill(hidden, torch.inf)
    along = along.masked_fill(width[3].unsqueeze(1) > 0, 0)
    starts = torch.arange(nodes, device=x.device) * x.shape[-1]
    return (along.argsort(dim=-1, stable=True) + starts.unsqueeze(1)).flatten()


class _Search:
    """Queries on their way through the tree; each has a stack of nodes that it must still visit."""

    def __init__(self, cells: Cells, queries: Points, best: Int[Tensor, "n k"]) -> None:
        self.cells, self.queries, self.best = cells, queries, best
        self.worst = best[:, -1].clone()
        self.most = cells.depth + 2
        self.nodes = queries.place.new_zeros(len(queries) * self.most)
        self.keys = torch.zeros_like(self.nodes)
        self.height = torch.zeros_like(queries.place)

    def run(self) -> int:
        distances, first = 0, 1 << self.cells.depth
        some = (~self.queries.hidden).nonzero()[:, 0]
        node = torch.full_like(some, 1)
        while len(some):
            is_cell = node >= first
            inner = (~is_cell).nonzero()[:, 0]
            self._open(some[inner], node[inner])
            if len(inner) < len(some):
                outer = is_cell.nonzero()[:, 0]
                distances += self._compare(some[outer], node[outer] - first)
            some, node = self._next(some)
        return distances

    def _next(self, some: Int[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """Queries that have not yet seen all, and the node on top of their stack that is nearer
        than the worst of their best."""
        found = [(some[:0], some[:0])]
        while len(some):
            top = self.height.index_select(0, some) - 1
            left = (top >= 0).nonzero()[:, 0]
            some, top = some[left], top[left]
            self.height.index_copy_(0, some, top)
            at = some * self.most + top
            near = self.keys.index_select(0, at) < self.worst.index_select(0, some)
            there = near.nonzero()[:, 0]
            found.append((some[there], self.nodes.index_select(0, at[there])))
            some = some[(~near).nonzero()[:, 0]]
        queries, nodes = zip(*found, strict=True)
        return torch.cat(queries), torch.cat(nodes)

    def _open(self, some: Int[Tensor, " n"], node: Int[Tensor, " n"]) -> None:
        """Puts the children on the stack, the nearer one on top, if they are near enough."""
        left, right = self.cells.keys_of_children(
            self.queries.x.index_select(0, some), node
        ).unbind(1)
        worst, top = self.worst.index_select(0, some), self.height.index_select(0, some)
        second = (left <= right).long()
        for child, key in (
            (second, torch.maximum(left, right)),
            (1 - second, torch.minimum(left, right)),
        ):
            at = some * self.most + top
            self.nodes.index_copy_(0, at, 2 * node + child)
            self.keys.index_copy_(0, at, key)
            top = top + (key < worst)
        self.height.index_copy_(0, some, top)

    def _compare(self, some: Int[Tensor, " n"], cell: Int[Tensor, " n"]) -> int:
        x, place = (t.index_select(0, some) for t in (self.queries.x, self.queries.place))
        keys = self.cells.keys_in(x, place, cell)
        both = torch.cat([self.best.index_select(0, some), keys], 1)
        best = both.topk(self.best.shape[1], largest=False).values
        self.best.index_copy_(0, some, best)
        self.worst.index_copy_(0, some, best[:, -1])
        return keys.numel()
