"""The least work of a training step, by part: what bounds its time on a given machine.

Counted as in the models' formulas, whatever the code does: nothing that is computed again, and no
element-wise operation beside the products. With n the length of a transform:

    matrix products      2 i o a token and component for i channels to o; backward twice as many
    geometric products   2 a term, d·e terms for d and e components; backward twice as many
    transforms           2.5 n log2 n each (real); every stream once forward and once backward
    frequency products   8 a complex term but 6 for each first one; backward by both operands
    bytes                every part reads what it is given and writes what it makes, once; a
                         transform and the frequency products are parts of their own
    exchange             what all ranks send to others: operands, results and their gradients
"""

from dataclasses import astuple, dataclass
from math import log2
from operator import add

from jaxtyping import Shaped
from torch import Tensor

from scaling.algebra.clifford import CliffordMLP, GeometricProduct, MVLayerNorm, MVLinear
from scaling.algebra.product import SIZES
from scaling.long_conv.form import ROLES, TrilinearForm, transform_length

NUMBER = 4
"""Bytes: float32."""


@dataclass(frozen=True)
class Work:
    """Of one training step on full rows, a token: forward and backward."""

    matrix_flops: float = 0.0
    product_flops: float = 0.0
    """Of geometric products."""
    projection_bytes: float = 0.0
    """Of the pointwise modules."""
    transform_flops: float = 0.0
    frequency_flops: float = 0.0
    transforms_bytes: float = 0.0
    """Of the long convolutions."""
    exchange_bytes: float = 0.0
    """Sent by all ranks together."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(add, astuple(self), astuple(other)))

    @staticmethod
    def clifford(mlp: CliffordMLP) -> "Work":
        """Its modules in order, with the number of components between them."""
        total, components = Work(), SIZES[1]
        for module in mlp:
            if isinstance(module, MVLinear):
                components = min(components, module.components)
                total += Work.matrix(module.weight, components)
            elif isinstance(module, GeometricProduct):
                for linear in (module.left, module.right):
                    total += Work.matrix(linear.weight, components)
                terms = components**2 * module.weights.shape[1]
                total += Work(product_flops=3 * 2.0 * terms)
                components = {1: 1, 4: 7}.get(components, 8)  # grades of a product
            elif isinstance(module, MVLayerNorm):
                components = min(components, module.components)
        return total

    @staticmethod
    def matrix(weight: Shaped[Tensor, "... o i"], components: int = 1) -> "Work":
        """A matrix that mixes channels, forward and backward."""
        channels_out, channels_in = weight.shape[-2:]
        return Work(matrix_flops=3 * 2.0 * components * channels_out * channels_in)

    @staticmethod
    def pointwise(numbers_in: int, numbers_out: int) -> "Work":
        """Moving what a pointwise part reads and writes of a token: the backward pass reads inputs
        and the results' gradients, and writes the inputs' gradients."""
        return Work(projection_bytes=float(NUMBER * (3 * numbers_in + 2 * numbers_out)))

    @staticmethod
    def convolution(
        form: TrilinearForm, channels: int, length: int, ranks: int, circular: bool
    ) -> "Work":
        """One long convolution of data with data."""
        n, _ = transform_length(length, ranks, [length] if circular else None)
        streams = {role: form.components(role) for role in ROLES}
        both, terms = sum(streams.values()), len(form.terms)
        complex_flops = sum(8 * terms - 2 * streams[role] for role in ROLES)
        # Transforms read and write every stream, twice; products read and write it: forward q, k
        # and u; backward u's gradient, q and k, and the gradients of these.
        moved = 4 * both + both + both + streams["q"] + streams["k"]
        # Of a rank's n / ranks numbers of a stream all bins travel but for its own share.
        travelling = 2 * NUMBER * (ranks - 1) * (n // ranks // 2 + 1)
        per_token = n / length * channels
        return Work(
            transform_flops=2 * both * 2.5 * log2(n) * per_token,
            frequency_flops=complex_flops / 2 * per_token,
            transforms_bytes=NUMBER * per_token * moved,
            exchange_bytes=2 * both * channels * travelling / length,
        )

    @staticmethod
    def shift(numbers: int, length: int, ranks: int, backward: bool = True) -> "Work":
        """Every token's predecessor's numbers: from one rank to the next."""
        sent = NUMBER * numbers * (length - 1) * (ranks > 1)
        return Work(exchange_bytes=(1 + backward) * sent / length)

    @staticmethod
    def row_sum(size: int, length: int, ranks: int, backward: bool = True) -> "Work":
        """A sum over the row of `size` bytes; a ring sends each byte twice, less the own share."""
        sent = ranks * (2 * (ranks - 1) * size // ranks)
        return Work(exchange_bytes=(1 + backward) * sent / length)
