"""Errors of rows, whole and by position, against plain loops over sequences."""

import pytest
import torch

from data_pipeline.errors import RunError
from scaling.parallel.shard import SequenceShard
from scaling.train.evaluate import PARTS, ErrorOfRows
from tests.threaded_ranks import run_threaded

UNIT = 0.5


def weighted_errors():
    """Errors of 5 rows of 37 tokens: nothing counts in the last row, nor behind token 30."""
    random = torch.Generator().manual_seed(0)
    error, weight = torch.rand(2, 5, 37, generator=random, dtype=torch.float64)
    weight[4], weight[:, 30:] = 0, 0
    return error * weight, weight


def error_of_rows():
    """Rows arrive as one micro-batch of two and one of three."""
    depth, shard = ErrorOfRows(37), SequenceShard(37)
    for rows in (slice(2), slice(2, None)):
        error, weight = (shard.scatter(t[rows]) for t in weighted_errors())
        depth.add(error, weight, shard)
    return depth.row(UNIT)


def check(_group):
    """Loss: sum of errors over sum of weights. Standard error: over rows, of that ratio."""
    error, weight = weighted_errors()
    whole = error_of_rows()
    assert whole["samples"] == 4
    parts = whole["error_by_position"]
    assert [(part["from"], part["to"]) for part in parts] == [
        (37 * p // PARTS, 37 * (p + 1) // PARTS) for p in range(7)
    ]
    for part in (whole | {"from": 0, "to": 37}, *parts):
        here = slice(part["from"], part["to"])
        e, w = error[:4, here].sum(1), weight[:4, here].sum(1)
        loss = e.sum() / w.sum()
        residual = (e - loss * w) / w.mean()
        assert part["loss"] == pytest.approx((loss / UNIT).item(), rel=1e-9)
        spread = residual.square().sum() / 3
        assert part["standard_error"] == pytest.approx((spread / 4).sqrt().item() / UNIT, rel=1e-9)


def test_parts_of_the_depth_have_their_own_loss_and_standard_error():
    check(None)


def test_also_sharded():
    run_threaded(check, 3)


def check_targets_per_sequence(_group):
    """Every rank of a sequence counts a share of a row's error; a row without weight is none."""
    shard, rows = SequenceShard(37), ErrorOfRows(37)
    error, weight = torch.tensor([0.5, 1.5, 4.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    for some in (slice(2), slice(2, None)):
        rows.add(error[some] / shard.size, weight[some], shard)
    row = rows.row(UNIT)
    assert row["samples"] == 3 and "error_by_position" not in row
    assert row["loss"] == pytest.approx(2.0 / UNIT, rel=1e-6)
    assert row["standard_error"] == pytest.approx((error[:3].std() / 3**0.5).item() / UNIT)


@pytest.mark.parametrize("world", [1, 3])
def test_targets_per_sequence(world):
    run_threaded(check_targets_per_sequence, world)


def test_a_single_sequence_has_no_standard_error():
    depth = ErrorOfRows(16)
    depth.add(torch.ones(1, 16), torch.full((1, 16), 2.0), SequenceShard(16))
    row = depth.row(1.0)
    assert (row["loss"], row["standard_error"], row["samples"]) == (0.5, None, 1)
    assert row["error_by_position"] == [
        {"from": 2 * p, "to": 2 * p + 2, "loss": 0.5, "standard_error": None} for p in range(PARTS)
    ]
    with pytest.raises(RunError, match="loss weights sum to 0"):
        ErrorOfRows(16).row(1.0)
