"""The least work of a step beside what is executed."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import ConfigError
from scaling.models import MODELS, build
from scaling.parallel.shard import SequenceShard
from scaling.parallel.telemetry import measuring
from tests.small_models import NEAR, small_batch, small_model
from tests.threaded_ranks import run_threaded

N = 24


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("se3_hyena", {"channels": 5, "gate_hidden": 3, "hidden": 6, "salience": True}),
        ("se3_hyena_paper", {"gate_hidden": 2, "hidden": 7, "final": True}),
        *[(name, {}) for name in MODELS],
    ],
)
def test_matrix_products_are_those_that_are_executed(name, options):
    """Pairs are computed once more for their gradient."""
    model, batch = small_model(name, **options), small_batch([N])
    with FlopCounterMode(display=False) as counter:
        out = model(batch)
        (out.points.sum() + out.vectors.sum() + out.scalars.sum()).backward()
    work = model.work(N)
    executed = work.matrix_flops + 4 / 3 * work.pair_flops
    assert counter.get_total_flops() == round(N * executed)


def test_transforms_follow_their_definitions():
    """Scalar 7.5 n log2 n + 3 n, vector 22.5 n log2 n + 21 n flops forward, the first again and
    the second twice backward; other lengths are padded, other ranks share."""
    model = build("se3_hyena_paper", vectors=1, scalars=3, operators=1)
    work = model.work(64)
    assert work.transform_flops == 2 * (3 * 7.5 + 2 * 22.5) * 6
    assert work.frequency_flops == 3 * (3 * 3 + 2 * 21)
    assert replace(model.work(64, ranks=2), exchange_bytes=0.0) == work
    padded = model.work(67)  # 134 tokens -> 135
    assert padded.frequency_flops / work.frequency_flops == pytest.approx(135 / 67)
    assert padded.matrix_flops == work.matrix_flops
    with pytest.raises(ConfigError, match="length=0"):
        model.work(0)


def test_geometric_products_have_a_term_for_each_pair_of_components():
    """4 components of scalars and vectors make 7; 7 x 7 terms then. Widths of phi 1, 3; of gamma
    8, 2; of xi 1, 1."""
    model = build("se3_hyena_paper", vectors=0, scalars=1, operators=1, hidden=1)
    terms = 16 * (1 + 8 + 1) + 49 * (6 + 2 + 2)
    assert model.work(64).product_flops == 6 * terms


@pytest.mark.parametrize("world, length", [(1, 53), (2, 53), (3, 48), (4, 53), (8, 48)])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in NEAR])
def test_exchanged_bytes_are_those_that_are_counted(name, length, world):
    """Of all ranks together, in a training step of one row whose length is known."""
    sent = sum(run_threaded(bytes_of_a_step, world, name, length))
    assert sent == round(small_model(name).work(length, world).exchange_bytes * length)


def test_graph_models_state_a_halo():
    """What travels depends on the points. Stated are these, 24 bytes a token for each other rank,
    and of 4 tokens for each rank beside: 3 numbers of the points, and in each of 2 layers 6
    features and 3 of the displacement, whose gradients come back."""
    model, n = build("egnn", 0, 0, neighbours=4, layers=2, hidden=6), 48
    for ranks in (1, 2, 4):
        numbers = 2 * (ranks - 1) * 4 * (3 + 2 * 2 * (6 + 3))
        assert model.work(n, ranks).exchange_bytes * n == (ranks - 1) * 24 * n + 4 * numbers


def bytes_of_a_step(group, name, length) -> int:
    batch = small_batch([length], torch.float32).replace(lengths=(length,))
    shard = SequenceShard(length, group)
    with measuring() as measured:
        out = small_model(name, torch.float32)(batch.map(shard.scatter), shard)
        (out.points.sum() + out.vectors.sum() + out.scalars.sum()).backward()
    return measured.sent_bytes
