"""Features that turn by irreducible representations: linear maps, norm, gate and tensor product.

A token's features are a list by degree l of tensors (b, c, 2l + 1, ..., n): scalars, vectors,
traceless symmetric matrices, their components in e3nn's order.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from scaling.models.layers import ChannelNorm, Linear

Features = list[Float[Tensor, "b _ _ ..."]]
Flat = Float[Tensor, "b f n"]
"""All of a token's, one behind the other."""
Direction = Float[Tensor, "b 3 k n"]
"""From a token to its neighbours, of length 1."""
Path = tuple[int, int, int]
Terms = list[tuple[int, int, int, float]]
EPSILON = 1e-5


class Coupling:
    """Depth-wise tensor products with spherical harmonics of degrees up to lmax.

    Harmonics have norm sqrt(2l + 1); a path from l1 and l2 to l3 has e3nn's Wigner 3j symbols times
    sqrt(2 l3 + 1), so that features of variance 1 stay so. The symbols are Python's numbers, which
    lose nothing when the model goes to another number type.
    """

    def __init__(self, lmax: int, parity: bool) -> None:
        degrees = range(lmax + 1)
        self.lmax = lmax
        self.paths: list[Path] = [
            (l1, l2, l3)
            for l1 in degrees
            for l2 in degrees
            for l3 in degrees
            if abs(l1 - l2) <= l3 <= l1 + l2 and not (parity and (l1 + l2 + l3) % 2)
        ]
        self.terms = {path: wigner_3j(*path) for path in self.paths}

    def of_degree(self, l1: int) -> list[Path]:
        """The paths that begin there."""
        return [path for path in self.paths if path[0] == l1]

    def weights(self, widths: list[int]) -> int:
        """How many a product takes: one a path and channel."""
        return sum(widths[l1] for l1, _, _ in self.paths)

    def channels(self, widths: list[int]) -> list[int]:
        """That a product makes, by degree."""
        made = [0] * (self.lmax + 1)
        for l1, _, l3 in self.paths:
            made[l3] += widths[l1]
        return made

    def harmonics(self, direction: Direction) -> list[list[Float[Tensor, "b k n"]]]:
        """Components of each degree, of a direction's; e3nn's "component" normalisation."""
        u = direction.unbind(1)
        first = [3**0.5 * x for x in u]
        found = [[torch.ones_like(u[0])], first]
        if self.lmax == 2:
            second: list[Any] = [0.0] * 5
            for m1, m2, m3, value in self.terms[1, 1, 2]:
                second[m3] = second[m3] + 7.5**0.5 * value * u[m1] * u[m2]
            found.append(second)
        return found

    def matrices(self, direction: Direction) -> list[Float[Tensor, "b _ _ k n"]]:
        """For each l1 the maps of its components to those of all its paths."""
        y = self.harmonics(direction)
        none = torch.zeros_like(y[0][0])
        found = []
        for l1 in range(self.lmax + 1):
            columns = []
            for path in self.of_degree(l1):
                entries = [[none] * (2 * l1 + 1) for _ in range(2 * path[2] + 1)]
                for m1, m2, m3, value in self.terms[path]:
                    entries[m3][m1] = entries[m3][m1] + value * y[path[1]][m2]
                columns += [torch.stack(column, 1) for column in entries]
            found.append(torch.stack(columns, 2))
        return found

    def product(
        self,
        x: Features,
        matrices: list[Float[Tensor, "b _ _ k n"]],
        weights: Float[Tensor, "#b w #k #n"],
    ) -> Features:
        """x (x) Y on every edge; for each degree the paths that end there, one after the other."""
        made: list[list[Tensor]] = [[] for _ in x]
        start = 0
        for l1, (features, matrix) in enumerate(zip(x, matrices, strict=True)):
            paths = self.of_degree(l1)
            moved = torch.einsum("bcmkn,bmpkn->bcpkn", features, matrix)
            pieces = moved.split([2 * l3 + 1 for _, _, l3 in paths], 2)
            for (_, _, l3), piece in zip(paths, pieces, strict=True):
                stop = start + features.shape[1]
                made[l3].append(piece * weights[:, start:stop].unsqueeze(2))
                start = stop
        return [torch.cat(some, 1) for some in made]


def wigner_3j(l1: int, l2: int, l3: int) -> Terms:
    """The symbols that are not 0, times sqrt(2 l3 + 1), with their places (m1, m2, m3).

    Raises:
        ConfigError: e3nn is not installed.
    """
    try:
        from e3nn import o3
    except ImportError as error:
        raise ConfigError(
            "model equiformer needs e3nn: install the extra longfold[equiformer]"
        ) from error
    with torch.device("cpu"):  # also for models on the meta device
        symbols = (2 * l3 + 1) ** 0.5 * o3.wigner_3j(l1, l2, l3, dtype=torch.float64)
        places = (symbols.abs() > 1e-10).nonzero().tolist()
    return [(m1, m2, m3, symbols[m1, m2, m3].item()) for m1, m2, m3 in places]


class IrrepsLinear(nn.Module):
    """Mixes the channels of each degree; a bias for scalars alone."""

    def __init__(self, inputs: list[int], outputs: list[int], bias: bool = True) -> None:
        super().__init__()
        self.degrees = nn.ModuleList(
            Linear(i, o, bias=bias and degree == 0)
            for degree, (i, o) in enumerate(zip(inputs, outputs, strict=True))
        )

    def forward(self, x: Features) -> Features:
        return [linear(part) for linear, part in zip(self.degrees, x, strict=True)]


class IrrepsNorm(nn.Module):
    """Every degree of a token over the rms of its components; scalars as in ChannelNorm."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        scalars, *others = widths
        self.scalars = ChannelNorm(scalars)
        self.others = nn.ModuleList(DegreeNorm(c) for c in others)

    def forward(self, x: Features) -> Features:
        scalars, *others = x
        normed = [norm(part) for norm, part in zip(self.others, others, strict=True)]
        return [self.scalars(scalars.squeeze(2)).unsqueeze(2), *normed]


class DegreeNorm(nn.Module):
    """Each token's components over their rms, times a weight of every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Float[Tensor, "b c m n"]) -> Float[Tensor, "b c m n"]:
        return self.weight * x * (x.square().mean((1, 2), keepdim=True) + EPSILON).rsqrt()


def gate(x: Features) -> Features:
    """SiLU of the first scalars; the others' sigmoids times the channels of higher degrees."""
    scalars, *others = x
    counts = [part.shape[1] for part in others]
    first, *gates = scalars.split([scalars.shape[1] - sum(counts), *counts], 1)
    opened = [part * g.sigmoid() for part, g in zip(others, gates, strict=True)]
    return [nn.functional.silu(first), *opened]


def gated(widths: list[int]) -> list[int]:
    """Channels of which `gate` makes these."""
    return [sum(widths), *widths[1:]]


def halved(channels: int, lmax: int) -> list[int]:
    """Of each degree half as many as of the one below, and at least 1."""
    return [max(channels >> degree, 1) for degree in range(lmax + 1)]


def split(x: Float[Tensor, "b f ... n"], widths: list[int]) -> Features:
    """The parts of each degree."""
    sizes = [c * (2 * degree + 1) for degree, c in enumerate(widths)]
    parts = zip(x.split(sizes, 1), widths, sizes, strict=True)
    return [part.unflatten(1, (c, size // c)) for part, c, size in parts]


def flat(x: Features) -> Flat:
    """The inverse of `split`."""
    return torch.cat([part.flatten(1, 2) for part in x], 1)


def add(x: Features, y: Features) -> Features:
    """Degree by degree."""
    return [a + b for a, b in zip(x, y, strict=True)]
