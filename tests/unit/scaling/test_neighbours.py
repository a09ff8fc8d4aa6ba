"""Neighbours against plain loops over all pairs: who they are, what they hold and every gradient,
for any length, ranks, masks, bodies and ties; how much is computed; what cannot be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, OptionError, RunError, ShapeError
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.neighbours import find_neighbours
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import measuring
from tests.threaded_ranks import run_threaded


def uniform(n: int) -> Tensor:
    return torch.rand(3, n).double() * n ** (1 / 3)


def chain(n: int) -> Tensor:
    """A walk by steps of 3.8."""
    steps = torch.randn(3, n).double()
    return (3.8 * steps / steps.norm(dim=0)).cumsum(1)


def clusters(n: int) -> Tensor:
    """Of very different density."""
    centres = 100 * torch.randn(3, max(n // 200, 1)).double()
    spread = 10 ** -torch.randint(0, 6, (n,)).double()
    return centres[:, torch.randint(centres.shape[1], (n,))] + spread * torch.randn(3, n).double()


def lattice(n: int) -> Tensor:
    """Many neighbours are equally near."""
    side = round(n ** (1 / 3) + 0.5)
    axes = [torch.arange(side).double()] * 3
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)[:, torch.randperm(side**3)][
        :, :n
    ]


def half_at_one_place(n: int) -> Tensor:
    """As where atoms that are missing were put to the origin."""
    x = uniform(n)
    x[:, torch.randperm(n)[: n // 2]] = 0
    return x


SHAPES: list[Callable[[int], Tensor]] = [uniform, chain, clusters, lattice, half_at_one_place]


def in_loops(
    points: Tensor, mask: Tensor, bodies: Any, k: int, radius: float | None
) -> list[list[list[int]]]:
    """Token by token: all others of its body, sorted by (distance, place)."""
    found = []
    for row, x in enumerate(points):
        lengths = bodies[row] if bodies else (points.shape[-1],)
        body = [number for number, length in enumerate(lengths) for _ in range(length)]
        d = x.unsqueeze(1) - x.unsqueeze(2)
        squares = (d[0] * d[0] + d[1] * d[1] + d[2] * d[2]).float().tolist()
        there = mask[row].nonzero()[:, 0].tolist()
        lists: list[list[int]] = [[] for _ in body]
        for i in there:
            others = [(squares[i][j], j) for j in there if j != i and body[j] == body[i]]
            lists[i] = [j for d, j in sorted(others)[:k] if radius is None or d <= radius**2]
        found.append(lists)
    return found


def expected(lists: list[list[list[int]]], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """What the neighbours hold, and the gradient of its product with g."""
    values, gradient = torch.zeros_like(g), torch.zeros_like(x)
    for row, tokens in enumerate(lists):
        for i, neighbours in enumerate(tokens):
            for slot, j in enumerate(neighbours):
                values[row, ..., slot, i] = x[row, ..., j]
                gradient[row, ..., j] += g[row, ..., slot, i]
    return values, gradient


def found(
    group: Any, points: Tensor, mask: Tensor, bodies: Any, k: int, radius: float | None, *rest: Any
) -> list[Tensor]:
    """Neighbours' places, or -1; what they hold in both fields, and the gradients, of all ranks."""
    shard = SequenceShard(points.shape[-1], group, "contiguous")
    rows = MaskedRows(shard.scatter(mask), shard, bodies=bodies)
    neighbours = find_neighbours(shard.scatter(points), rows, k, radius)
    fields, goals = rest[:2], rest[2:]
    own = [shard.scatter(x).requires_grad_() for x in fields]
    held = neighbours.gather(*own)
    gradients = torch.autograd.grad(held, own, [shard.scatter(g) for g in goals])
    (places,) = neighbours.gather(shard.index.expand(len(points), -1).double())
    places = torch.where(neighbours.valid, places.long(), -1)
    return [shard.gather(x.detach()) for x in (places, *held, *gradients)]


CASES = [
    # shape, tokens, bodies of each of two rows, radius
    (chain, 1, None, None),
    (uniform, 7, None, None),
    (chain, 97, ((32, 1, 64), (97,)), None),
    (uniform, 97, None, 1.0),
    (lattice, 97, ((50, 47), (97,)), None),
    (lattice, 120, None, 1.0),
    (clusters, 120, None, None),
    (half_at_one_place, 120, None, None),
]


@pytest.mark.parametrize("shape, n, bodies, radius", CASES)
def test_neighbours_are_those_of_plain_loops(shape, n, bodies, radius):
    arguments, wanted = case(shape, n, bodies, radius)
    for world in (1, 2, 3, 4, 8):
        for ours in run_threaded(found, world, *arguments):
            check(ours, wanted)


def test_also_in_real_processes(distributed):
    arguments, wanted = case(chain, 97, ((50, 47), (97,)), None)
    for ours in distributed(found, 3, *arguments):
        check(ours, wanted)


def case(
    shape: Any, n: int, bodies: Any, radius: float | None
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments of `found`, and what it has to give."""
    k, mask = 5, torch.ones(2, n, dtype=torch.bool)
    mask[1, n // 2] = False
    points = torch.stack([shape(n), shape(n)]).masked_fill(~mask.unsqueeze(1), torch.nan)
    fields = torch.randn(2, 4, n).double(), torch.randn(2, 2, 3, n).double()
    goals = [torch.randn(*x.shape[:-1], k, n).double() for x in fields]
    lists = in_loops(points, mask, bodies, k, radius)
    padded = [[[*near, *[-1] * (k - len(near))] for near in row] for row in lists]
    both = [expected(lists, x, g) for x, g in zip(fields, goals, strict=True)]
    wanted = [values for values, _ in both] + [gradient for _, gradient in both]
    wanted = [torch.tensor(padded).movedim(1, 2), *wanted]
    return (points, mask, bodies, k, radius, *fields, *goals), wanted


def check(ours: list[Tensor], wanted: list[Tensor]) -> None:
    for x, y in zip(ours[:3], wanted[:3], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(ours[3:], wanted[3:], strict=True):  # gradients are added in another order
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_distances_are_computed(shape, k):
    """Also where cells are not full, and tokens are missing."""
    for n, missing in ((1 << 12, 0), ((1 << 12) - 1, 0), (1 << 12, 50)):
        mask = torch.ones(1, n, dtype=torch.bool)
        mask[0, torch.randperm(n)[:missing]] = False
        found = find_neighbours(shape(n).float().unsqueeze(0), MaskedRows(mask), k)
        assert n <= found.distances <= 50 * n * k


@pytest.mark.parametrize("shape", [uniform, chain])
def test_few_distances_are_computed_by_all_ranks_together(shape):
    n, k = 1 << 11, 4
    points = shape(n).float().unsqueeze(0)

    def computed(group):
        shard = SequenceShard(n, group, "contiguous")
        rows = MaskedRows(torch.ones(1, shard.n_local, dtype=torch.bool), shard)
        return find_neighbours(shard.scatter(points), rows, k).distances

    assert n <= sum(run_threaded(computed, 4)) <= 50 * n * k


def test_what_travels():
    """Points go around the ring once; then what neighbours on other ranks hold, and back."""

    def traffic(group):
        torch.manual_seed(0)
        shard = SequenceShard(64, group, "contiguous")
        points = shard.scatter(chain(64).float().unsqueeze(0))
        rows = MaskedRows(torch.ones(1, shard.n_local, dtype=torch.bool), shard)
        with measuring() as search:
            neighbours = find_neighbours(points, rows, 4)
        x = torch.randn(1, 10, shard.n_local, requires_grad=True)
        with measuring() as layer:
            (held,) = neighbours.gather(x)
            held.sum().backward()
        return search.exchanges["neighbours"], layer.exchanges["neighbours"], neighbours

    sent = [run_threaded(traffic, world) for world in (1, 4)]
    ((search, layer, _),) = sent[0]
    assert search.calls == layer.calls == search.bytes == layer.bytes == 0
    halo = sum(layer.bytes for _, layer, _ in sent[1])
    needed = sum(sum(neighbours._halo.receive_counts) for *_, neighbours in sent[1])
    assert halo == 2 * 4 * 10 * needed and 0 < needed < 64
    for search, layer, _ in sent[1]:
        assert (search.calls, layer.calls) == (1 + 3 + 2, 2)
        assert search.bytes <= 3 * 16 * 24 + 3 * 8 + 64 * 8 + 2 * 64


def test_half_precision_is_compared_in_float32():
    points = uniform(50).unsqueeze(0)
    rows = MaskedRows(torch.ones(1, 50, dtype=torch.bool))
    for dtype in (torch.bfloat16, torch.float16):
        half = points.to(dtype)
        held = [find_neighbours(x, rows, 3).gather(points)[0] for x in (half, half.float())]
        assert torch.equal(*held)


def test_the_meta_device_is_told_its_halo():
    """As rank 1 of 3: k tokens of each rank beside it."""

    def counts(group):
        shard = SequenceShard(30, group, "contiguous")
        rows = MaskedRows(torch.ones(2, 10, dtype=torch.bool, device="meta"), shard)
        neighbours = find_neighbours(torch.empty(2, 3, 10, device="meta"), rows, 4)
        assert neighbours.valid.shape == (2, 4, 10) and neighbours.valid.device.type == "meta"
        return neighbours._halo.send_counts, neighbours._halo.receive_counts

    assert run_threaded(counts, 3)[1] == ([8, 0, 8], [8, 0, 8])


@pytest.mark.parametrize(
    "change, options, error, said",
    [
        ("", {"k": 0}, OptionError, "k=0: must be 1 or more"),
        ("", {"radius": -1.0}, OptionError, r"radius=-1\.0: must be greater than 0"),
        ("", {"radius": 1e-6}, OptionError, r"radius=1e-06: no two points .* larger one"),
        ("nan", {}, RunError, "row 1 has a valid point that is not finite"),
        ("far", {}, RunError, "row 1 has a valid point .* 1e.18 from another"),
        ("one place", {}, ConfigError, "all points of row 1 are at one place"),
        ("cyclic", {}, ShapeError, "contiguous"),
    ],
)
def test_every_rank_says_what_cannot_be(change, options, error, said):
    points = torch.stack([uniform(20), uniform(20)])
    if change == "one place":
        points[1] = 3.0
    elif change:
        points[1, 0, 4] = {"nan": torch.nan, "far": 1e30, "cyclic": 0.0}[change]

    def refused(group):
        shard = SequenceShard(20, group, "cyclic" if change == "cyclic" else "contiguous")
        rows = MaskedRows(torch.ones(2, shard.n_local, dtype=torch.bool), shard)
        with pytest.raises(error, match=said) as caught:
            find_neighbours(shard.scatter(points), rows, **({"k": 4} | options))
        return str(caught.value)

    texts = [text for world in (1, 3) for text in run_threaded(refused, world)]
    assert "\n" not in texts[0] and (len(set(texts)) == 1 or change == "cyclic")


def test_few_atoms_have_few_neighbours():
    """One has none, two have each other, also if they are at one place with a third that is not."""
    points = torch.tensor([[0.0, 1, 1, 5], [2, 9, 9, 9], [0, 0, 0, 0]]).expand(2, 3, 4)
    mask = torch.tensor([[True] * 3 + [False], [True] + [False] * 3])
    neighbours = find_neighbours(points, MaskedRows(mask), 16)
    assert neighbours.valid.sum(1).tolist() == [[2, 2, 2, 0], [0, 0, 0, 0]]
