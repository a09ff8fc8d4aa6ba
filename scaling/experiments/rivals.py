"""What the long convolution is measured against."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from scaling.ops import vector_long_conv
from scaling.parallel.collectives import Group, all_to_all, group_size

_AXES = ((1, 2), (2, 0), (0, 1))
CROSS = [
    (left, right, axis, sign)
    for axis, (i, j) in enumerate(_AXES)
    for left, right, sign in ((i, j, 1), (j, i, -1))
]
"""The six products of a cross product: left, right and result component, sign."""
GEOMETRIC = [
    *((i, i, 0, 1) for i in range(4)),
    *(each for i in (1, 2, 3) for each in ((0, i, i, 1), (i, 0, i, 1))),
    *((left + 1, right + 1, axis + 4, sign) for left, right, axis, sign in CROSS),
]
"""The sixteen of (scalar, vector) operands: a scalar, a polar and an axial vector."""


def expanded_conv(
    products: Sequence[tuple[int, int, int, int]],
    q: Float[Tensor, "c m n"],
    k: Float[Tensor, "c m n"],
) -> Float[Tensor, "c l n"]:
    """A convolution of products of components as the SE(3)-Hyena paper lists that of a cross
    product (arXiv 2407.01049, Code 1).

    Tokens come first; both operands are expanded to the products' factors by a matrix that is
    repeated for every token, a scalar convolution for each product follows (18 transforms for a
    cross product), and a third repeated matrix sums them.
    """
    c, components, n = q.shape
    left, right = q.new_zeros(2, len(products), components)
    total = q.new_zeros(1 + max(result for _, _, result, _ in products), len(products))
    for number, (i, j, result, sign) in enumerate(products):
        left[number, i] = right[number, j] = 1
        total[result, number] = sign

    def each_token(matrix: Tensor, x: Tensor) -> Tensor:
        repeated = matrix.repeat(c * n, 1, 1)
        return (repeated @ x.reshape(c * n, -1, 1)).view(c, n, -1)

    a, b = each_token(left, q.transpose(1, 2)), each_token(right, k.transpose(1, 2))
    spectrum = torch.fft.rfft(a, dim=1) * torch.fft.rfft(b, dim=1)
    return each_token(total, torch.fft.irfft(spectrum, n, dim=1)).transpose(1, 2)


def transforms(tokens: list[Tensor], spectra: list[Tensor], length: int) -> list[Tensor]:
    """A convolution's FFTs alone: of tokens forward, of spectra back; all results are held."""
    there = [torch.fft.rfft(x) for x in tokens]
    return there + [torch.fft.irfft(x, length) for x in spectra]


def channel_all_to_all_conv(
    q: Float[Tensor, "c 3 n"], k: Float[Tensor, "c 3 n"], group: Group
) -> Float[Tensor, "c 3 n"]:
    """Sequence parallelism by channels, the Ulysses way: c/P whole channels on each of P ranks.

    q and k are contiguous shards of P·n tokens and travel together, so it needs as few exchanges as
    ours; P must divide c. Cf. DeepSpeed Ulysses, arXiv 2309.14509.
    """
    ranks, (c, _, n) = group_size(group), q.shape
    assert c % ranks == 0
    counts = [c // ranks] * ranks
    sent = torch.stack([q, k], 1).flatten(1)
    shards = all_to_all(sent, counts, counts, group, "channels").view(ranks, -1, 2, 3, n)
    whole = shards.permute(2, 1, 3, 0, 4).reshape(2, -1, 3, ranks * n)
    u = vector_long_conv(whole[0], whole[1])
    back = u.unflatten(-1, (ranks, n)).permute(2, 0, 1, 3).reshape(c, -1)
    return all_to_all(back, counts, counts, group, "channels").view(c, 3, n)
