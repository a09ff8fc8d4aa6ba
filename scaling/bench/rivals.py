"""What the long convolution is measured against."""

import torch
from jaxtyping import Float
from torch import Tensor

from scaling.ops import vector_long_conv
from scaling.parallel.collectives import Group, all_to_all, group_size


def expanded_vector_conv(q: Float[Tensor, "c 3 n"], k: Float[Tensor, "c 3 n"]) -> Tensor:
    """The vector convolution as the SE(3)-Hyena paper lists it (arXiv 2407.01049, Code 1).

    Tokens come first; both operands are expanded to the six products of a cross product by a matrix
    that is repeated for every token, six scalar convolutions of 18 transforms follow, and a third
    repeated matrix sums them.
    """
    c, _, n = q.shape
    left, right, total = q.new_zeros(6, 3), q.new_zeros(6, 3), q.new_zeros(3, 6)
    for i in range(3):
        after, before = (i + 1) % 3, (i + 2) % 3
        left[2 * i, after] = right[2 * i, before] = total[i, 2 * i] = 1
        left[2 * i + 1, before] = right[2 * i + 1, after] = 1
        total[i, 2 * i + 1] = -1

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
