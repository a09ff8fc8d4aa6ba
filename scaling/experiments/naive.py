"""The training step as one writes it down first: the baseline that ours is measured against.

The same modules with the same parameters give the same numbers, but Clifford MLPs are those of
their authors' published code (multivectors last, products by the dense 8x8x8 table with the paths'
weights expanded: Ruhe et al., arXiv 2305.11141), convolutions expand their channels as the
SE(3)-Hyena paper lists it (arXiv 2407.01049, Code 1), nothing is cut into tiles, and whatever
autograd wants is kept.
"""

import math
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scaling.algebra import clifford
from scaling.execution import Execution
from scaling.experiments.rivals import CROSS, GEOMETRIC, expanded_conv
from scaling.models.se3_hyena import HyenaOperator
from scaling.models.se3_hyena_paper import PaperOperator
from scaling.ops.masked_rows import MaskedRows
from scaling.ops.tiles import Tiled

GRADE = (0, 1, 1, 1, 2, 2, 2, 3)
"""Of the components s, v1 ... v3, b1 ... b3, p."""
BLADES = (0b000, 0b001, 0b010, 0b100, 0b110, 0b101, 0b011, 0b111)
"""Their basis blades as bit masks of e1, e2, e3."""
SIGN = (1, 1, 1, 1, 1, -1, 1, 1)
"""The second component of b is -e13."""
PATHS = (
    *("000", "110", "220", "330", "011", "101", "321", "231", "121", "211"),
    *("022", "202", "312", "132", "112", "222", "033", "303", "123", "213"),
)
"""Grades of left, right and result, in the order of a product's weights."""

Multivectors = Float[Tensor, "t c 8"]
"""Tokens of all rows, channels, components."""


def straightforward(model: nn.Module) -> None:
    """Makes a model on one process compute in the straightforward way, for rows that are full."""
    for module in model.modules():
        if isinstance(module, Tiled):
            module.execution, module.runs_whole = Execution(), True
        if isinstance(module, clifford.CliffordMLP):
            vars(module)["forward"] = partial(clifford_mlp, module)
        elif isinstance(module, HyenaOperator):
            vars(module)["across"] = expanded
        elif isinstance(module, PaperOperator):
            vars(module)["across"] = expanded_paper


def expanded(rows: MaskedRows, *projected: Tensor) -> tuple[Tensor, ...]:
    """The default model's convolutions, on whole rows in one piece."""
    qs, ks, vs, q, k, v = projected
    return vs, v, rows.length_to(-0.5, qs), *geometric_conv((qs, q), (ks, k))


def expanded_paper(rows: MaskedRows, *projected: Tensor) -> tuple[Tensor, ...]:
    """The paper's convolutions, as it lists them."""
    qs, ks, vs, q, k, v = projected
    scalars = torch.fft.irfft(torch.fft.rfft(qs) * torch.fft.rfft(ks), qs.shape[-1])
    vectors = expanded_conv(CROSS, q.flatten(0, 1), k.flatten(0, 1)).view(q.shape)
    return vs, v, rows.length_to(-1.0, qs), scalars, vectors


def clifford_mlp(mlp: Any, x: Float[Tensor, "b d i n"]) -> Float[Tensor, "b 8 o n"]:
    """All grades, whichever are given and read."""
    rows, given, _, n = x.shape
    y = torch.nn.functional.pad(x.permute(0, 3, 2, 1).flatten(0, 1), (0, 8 - given))
    for layer in mlp:
        y = _LAYERS[type(layer)](layer, y)
    return y.unflatten(0, (rows, n)).permute(0, 3, 2, 1)


def linear(layer: Any, x: Float[Tensor, "t i 8"]) -> Float[Tensor, "t o 8"]:
    y = torch.einsum("tmi,inm->tni", x, _by_component(layer.weight, 0))
    if layer.bias is None:
        return y
    return torch.cat([y[..., :1] + layer.bias[0], y[..., 1:]], -1)


def gate(layer: Any, x: Multivectors) -> Multivectors:
    invariant = torch.cat([x[..., :1], _squared_norms(x)[..., 1:]], -1)
    return x * _by_component(torch.sigmoid(_grades(layer.a) * invariant + _grades(layer.b)), -1)


def product(layer: Any, x: Multivectors) -> Multivectors:
    right = linear(layer.right, x)
    norms = (_squared_norms(right).square() + 1e-16) ** 0.25
    share = torch.sigmoid(_grades(layer.normalization.a))
    right = right / _by_component(share * (norms - 1) + 1 + 1e-6, -1)
    return (linear(layer.left, x) + dense_product(x, right, layer.weights)) / math.sqrt(2)


def dense_product(x: Multivectors, y: Multivectors, weights: Float[Tensor, "20 c"]) -> Multivectors:
    """By the whole table, of which 64 of 512 entries are not 0."""
    table = torch.einsum("pc,pijk->cijk", weights, _table().to(x))
    return torch.einsum("tci,cijk,tcj->tck", x, table, y)


def norm(layer: Any, x: Multivectors) -> Multivectors:
    norms = (x.square().sum(-1, True).square() + 1e-16) ** 0.25
    return layer.a * x / (norms.mean(1, True) + 1e-6)


_LAYERS = {
    clifford.MVLinear: linear,
    clifford.MVSiLU: gate,
    clifford.GeometricProduct: product,
    clifford.MVLayerNorm: norm,
}


@lru_cache
def _table() -> Float[Tensor, "20 8 8 8"]:
    """Path, left and right component -> result, by counting swaps of basis vectors: with nothing of
    the product that it is compared with."""
    table = torch.zeros(len(PATHS), 8, 8, 8)
    for i, left in enumerate(BLADES):
        for j, right in enumerate(BLADES):
            k = BLADES.index(left ^ right)
            swaps = sum((left >> e + 1).bit_count() * (right >> e & 1) for e in range(3))
            path = PATHS.index(f"{GRADE[i]}{GRADE[j]}{GRADE[k]}")
            table[path, i, j, k] = (-1) ** swaps * SIGN[i] * SIGN[j] * SIGN[k]
    return table


def _by_component(values: Tensor, axis: int) -> Tensor:
    """One number a grade -> one a component."""
    return values.index_select(axis, torch.tensor(GRADE, device=values.device))


def _grades(parameter: Float[Tensor, "4 c 1"]) -> Float[Tensor, "c 4"]:
    return parameter[..., 0].T


def _squared_norms(x: Multivectors) -> Float[Tensor, "t c 4"]:
    return torch.stack([part.square().sum(-1) for part in x.split((1, 3, 3, 1), -1)], -1)


def geometric_conv(
    q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    def four(scalars: Tensor, vectors: Tensor) -> Tensor:
        return torch.cat([scalars.unsqueeze(2), vectors], 2).flatten(0, 1)

    u = expanded_conv(GEOMETRIC, four(*q), four(*k)).unflatten(0, q[0].shape[:2])
    return u[:, :, 0], u[:, :, 1:4], u[:, :, 4:]
