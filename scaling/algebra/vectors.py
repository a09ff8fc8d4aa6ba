"""Products and axes of vectors."""

import torch
from jaxtyping import Float
from torch import Tensor

SWEEPS = 6
"""Of Jacobi rotations; convergence is quadratic, and 3 x 3 matrices of float64 need 5."""


def cross(a: Tensor, b: Tensor, dim: int = -2) -> Tensor:
    """Cross product along `dim`; measured faster than torch.linalg.cross."""
    (a0, a1, a2), (b0, b1, b2) = a.unbind(dim), b.unbind(dim)
    components = [
        torch.addcmul(a1 * b2, a2, b1, value=-1),
        torch.addcmul(a2 * b0, a0, b2, value=-1),
        torch.addcmul(a0 * b1, a1, b0, value=-1),
    ]
    return torch.stack(components, dim)


def principal_axes(c: Float[Tensor, "b 3 3 n"]) -> Float[Tensor, "b 3 3 n"]:
    """Eigenvectors of symmetric matrices as columns, the longest axis first, right-handed.

    By Jacobi's rotations, a fixed number of them: the host need not wait for the device, as it does
    for torch.linalg.eigh.
    """
    a = [[c[:, i, j] for j in range(3)] for i in range(3)]
    v = [[torch.full_like(a[0][0], float(i == j)) for j in range(3)] for i in range(3)]
    for _ in range(SWEEPS):
        for p, q in ((0, 1), (0, 2), (1, 2)):
            apart, twice = a[q][q] - a[p][p], 2 * a[p][q]
            sign = torch.where(apart < 0, -1.0, 1.0).to(apart)
            size = torch.hypot(apart, twice) + apart.abs()
            t = sign * twice / torch.where(size == 0, 1.0, size)  # tan of the angle
            cos = (1 + t.square()).rsqrt()
            sin = t * cos
            for m in (a, v):  # columns of both, then rows of a
                for row in m:
                    row[p], row[q] = cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]
            for j in range(3):
                a[p][j], a[q][j] = cos * a[p][j] - sin * a[q][j], sin * a[p][j] + cos * a[q][j]
    order = torch.stack([a[i][i] for i in range(3)], 1).argsort(1, descending=True)
    axes = torch.stack([torch.stack(row, 1) for row in v], 1)
    axes = axes.gather(2, order.unsqueeze(1).expand_as(axes))
    first, second = axes[:, :, 0], axes[:, :, 1]
    return torch.stack([first, second, cross(first, second)], 2)
