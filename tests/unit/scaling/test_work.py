"""The least work of a step beside what is executed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import GeometricBatch
from data_pipeline.errors import ConfigError
from scaling.cost.work import training_work
from scaling.models import build

N = 24


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("se3_hyena", {"channels": 5, "gate_hidden": 3, "hidden": 6}),
        ("se3_hyena", {"channels": 3, "salience": True}),
        ("se3_hyena_paper", {"gate_hidden": 2, "hidden": 7}),
        ("se3_hyena_paper", {"hidden": 4, "final": True}),
    ],
)
def test_matrix_products_are_those_that_are_executed(name, options):
    model = build(name, vectors=1, scalars=3, operators=2, **options)
    fields = [torch.randn(2, *shape, N, requires_grad=True) for shape in ((3,), (1, 3), (3,))]
    batch = GeometricBatch(*fields, torch.arange(N).expand(2, -1).contiguous())
    with FlopCounterMode(display=False) as counter:
        out = model(batch)
        (out.points.sum() + out.vectors.sum() + out.scalars.sum()).backward()
    assert counter.get_total_flops() == 2 * N * training_work(model, N).matrix_flops


def test_transforms_follow_their_definitions():
    """Scalar 7.5 n log2 n + 3 n, vector 22.5 n log2 n + 21 n flops forward, the first again and
    the second twice backward; other lengths are padded, other ranks share."""
    model = build("se3_hyena_paper", vectors=1, scalars=3, operators=1)
    work = training_work(model, 64)
    assert work.transform_flops == 2 * (3 * 7.5 + 2 * 22.5) * 6
    assert work.frequency_flops == 3 * (3 * 3 + 2 * 21)
    assert training_work(model, 64, ranks=2) == work
    padded = training_work(model, 67)  # 134 tokens -> 135
    assert padded.frequency_flops / work.frequency_flops == pytest.approx(135 / 67)
    assert padded.matrix_flops == work.matrix_flops
    with pytest.raises(ConfigError, match="the work of Linear is not known"):
        training_work(torch.nn.Linear(2, 2), 64)


def test_geometric_products_have_a_term_for_each_pair_of_components():
    """4 components of scalars and vectors make 7; 7 x 7 terms then. Widths of phi 1, 3; of gamma
    8, 2; of xi 1, 1."""
    model = build("se3_hyena_paper", vectors=0, scalars=1, operators=1, hidden=1)
    terms = 16 * (1 + 8 + 1) + 49 * (6 + 2 + 2)
    assert training_work(model, 64).product_flops == 6 * terms
