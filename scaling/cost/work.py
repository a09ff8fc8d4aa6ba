"""The least work of a training step, by part: what bounds its time on a given machine.

Counted as in the models' formulas, whatever the code does: nothing that is computed again, and no
element-wise operation beside the products. With n the length of a transform and rho = n / N:

    matrix products      2 i o a token and component for i channels to o; backward twice as many
    geometric products   2 a term, d·e terms for d and e components; backward twice as many
    transforms           2.5 n log2 n each (real); every stream once forward and once backward
    frequency products   8 a complex term but 6 for each first one; backward by both operands
    bytes                every part reads what it is given and writes what it makes, once; a
                         transform and the frequency products are parts of their own
"""

from dataclasses import dataclass, fields
from math import log2

from torch import nn

from data_pipeline.errors import ConfigError
from scaling.algebra.clifford import CliffordMLP, GeometricProduct, MVLayerNorm, MVLinear
from scaling.algebra.product import SIZES
from scaling.long_conv.form import PRODUCTS, ROLES, TrilinearForm, transform_length, trilinear_form
from scaling.models.se3_hyena import ChannelLinear, HyenaOperator, SE3Hyena
from scaling.models.se3_hyena_paper import PaperOperator, SE3HyenaPaper

NUMBER = 4
"""Bytes: float32."""
SCALARS_AND_VECTORS = trilinear_form((True, True), (True, True), PRODUCTS)
SCALARS = trilinear_form((True, True), (False, False), ("scalar",))
VECTORS = trilinear_form((False, False), (True, True), ("cross",))


@dataclass(frozen=True)
class Work:
    """Of one training step, a token: forward and backward."""

    matrix_flops: float = 0.0
    product_flops: float = 0.0
    """Of geometric products."""
    projection_bytes: float = 0.0
    """Of the pointwise modules."""
    transform_flops: float = 0.0
    frequency_flops: float = 0.0
    transforms_bytes: float = 0.0
    """Of the long convolutions."""

    def __add__(self, other: "Work") -> "Work":
        names = [each.name for each in fields(self)]
        return Work(*(getattr(self, name) + getattr(other, name) for name in names))


def training_work(model: nn.Module, length: int, ranks: int = 1) -> Work:
    """The work of a model on full rows of that many tokens, on every rank of `ranks` the same.

    Raises:
        ConfigError: a model that nobody has counted.
    """
    if isinstance(model, SE3Hyena):
        ends = [each for each in model.children() if isinstance(each, ChannelLinear)]
        total = sum((_channel_linear(each) for each in ends), Work())
    elif isinstance(model, SE3HyenaPaper):
        total = Work()
    else:
        raise ConfigError(f"the work of {type(model).__name__} is not known; see cost/work.py")
    return sum((_operator(each, length, ranks) for each in model.operators), total)


def _operator(operator: nn.Module, length: int, ranks: int) -> Work:
    scores = None  # what weighs queries: linear in scalars of its own
    if isinstance(operator, HyenaOperator):
        channels = operator.w.shape[1]
        convolutions = [(SCALARS_AND_VECTORS, channels)]
        circular, stream, convolved = operator.padding == "circular", 4 * channels, 7 * channels
        scores = operator.salience
    else:
        assert isinstance(operator, PaperOperator)
        linear = operator.phi[0]
        assert isinstance(linear, MVLinear)
        scalars = operator.scalars
        vectors = linear.weight.shape[2] - scalars
        convolutions = [(SCALARS, scalars), (VECTORS, vectors)]
        circular, stream = True, scalars + 3 * vectors
        convolved = stream
    total = sum((_convolution(*each, length, ranks, circular) for each in convolutions), Work())
    total += sum((_clifford(each) for each in (operator.phi, operator.gamma, operator.xi)), Work())
    # project: stream -> q, k, v; mix: stream, v and what was convolved -> stream. The backward
    # reads inputs and the result's gradients and writes the inputs' gradients.
    given, made = stream + (2 * stream + convolved), 3 * stream + stream
    if scores is not None:
        given += scores.shape[1]
        total += Work(matrix_flops=3 * 2.0 * scores.numel())
    return total + Work(projection_bytes=float(NUMBER * (3 * given + 2 * made)))


def _clifford(mlp: nn.Module) -> Work:
    """Modules in order, with the number of components between them."""
    assert isinstance(mlp, CliffordMLP)
    total, components = Work(), SIZES[1]
    for module in mlp:
        if isinstance(module, MVLinear):
            components = min(components, module.components)
            total += _matrices(components, module)
        elif isinstance(module, GeometricProduct):
            total += _matrices(components, module.left) + _matrices(components, module.right)
            terms = components**2 * module.weights.shape[1]
            total += Work(product_flops=3 * 2.0 * terms)
            components = {1: 1, 4: 7}.get(components, 8)  # grades of a product
        elif isinstance(module, MVLayerNorm):
            components = min(components, module.components)
    return total


def _matrices(components: int, linear: MVLinear) -> Work:
    _, channels_out, channels_in = linear.weight.shape
    return Work(matrix_flops=3 * 2.0 * components * channels_out * channels_in)


def _channel_linear(linear: ChannelLinear) -> Work:
    channels_out, channels_in = linear.weight.shape
    components = 3 if linear.bias is None else 1  # vectors have none
    return Work(
        matrix_flops=3 * 2.0 * components * channels_out * channels_in,
        projection_bytes=float(NUMBER * components * (3 * channels_in + 2 * channels_out)),
    )


def _convolution(
    form: TrilinearForm, channels: int, length: int, ranks: int, circular: bool
) -> Work:
    n, _ = transform_length(length, ranks, [length] if circular else None)
    streams = {role: form.components(role) for role in ROLES}
    both, terms = sum(streams.values()), len(form.terms)
    complex_flops = sum(8 * terms - 2 * streams[role] for role in ROLES)
    per_token = n / length * channels
    return Work(
        transform_flops=2 * both * 2.5 * log2(n) * per_token,
        frequency_flops=complex_flops / 2 * per_token,
        # Transforms read and write every stream, twice; products read and write it: forward q, k
        # and u; backward u's gradient, q and k, and the gradients of these.
        transforms_bytes=NUMBER
        * per_token
        * (4 * both + both + both + streams["q"] + streams["k"]),
    )
