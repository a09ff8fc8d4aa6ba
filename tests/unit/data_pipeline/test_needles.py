"""Needles: the first token asks, values whose key it is answer, and slices tile at their price."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.tasks import needles
from data_pipeline.tasks.needles import Needles
from data_pipeline.tasks.registry import build_task

TOKENS = 201


@pytest.mark.parametrize("tokens, pairs, keys", [(3, 1, 1), (33, 16, 3), (201, 12, 6)])
def test_values_behind_the_asked_key_answer_themselves(tokens, pairs, keys):
    """One question in front, every pair in its own part, other keys' values answer zero."""
    task = Needles(tokens, pairs, keys, noise=0.5)
    for item in range(5):
        sample = task.sample("train", [item, None], [0, 0], 0, tokens + 2)
        inputs, x = sample.inputs, sample.inputs.vectors[0, 0, :, :tokens].T
        question, key, value = (mark.nonzero().flatten() for mark in inputs.scalars[0])
        assert question.tolist() == [0] and torch.equal(value, key + 1)
        bounds = [1 + pair * (tokens - 1) // pairs for pair in range(pairs + 1)]
        for low, high, place in zip(bounds[:-1], bounds[1:], key.tolist(), strict=True):
            assert low <= place < high - 1
        torch.testing.assert_close(x[key].norm(dim=1), torch.ones(pairs))
        cosines = x[key] @ x[key].T  # of one sequence's keys: the same, at right angles, opposite
        torch.testing.assert_close(cosines, cosines.round(), rtol=0, atol=1e-6)
        assert len(x[key].unique(dim=0)) <= keys
        magnitudes = x[value].norm(dim=1)
        assert ((magnitudes > 1) & (magnitudes < 2)).all() and len(magnitudes.unique()) == pairs
        asked = (x[key] == x[0]).all(1)
        assert torch.equal(sample.target[0, :, value].T, x[value] * asked[:, None])
        others = torch.ones(tokens, dtype=torch.bool)
        others[torch.cat([question, key, value])] = False
        torch.testing.assert_close(x[others].norm(dim=1), torch.full((int(others.sum()),), 0.5))
        assert torch.equal(sample.weight, inputs.scalars[:, 2]) and sample.per_token
        assert inputs.mask.sum(1).tolist() == [tokens, 0] and not inputs.points.any()
        assert not inputs.vectors[0, ..., tokens:].any() and not inputs.vectors[1].any()


def test_slices_tile_and_samples_follow_from_their_number():
    """Any cut gives the same tokens; splits, items and seeds differ."""
    task = Needles(TOKENS, 40)
    whole = task.sample("train", [5, None, 9], [1, 0, 2], 0, TOKENS + 3)
    for ranks in (2, 3, 8, 100):
        cuts = [(TOKENS + 3) * r // ranks for r in range(ranks + 1)]
        parts = [task.sample("train", [5, None, 9], [3, 0, 4], a, b) for a, b in pairwise(cuts)]
        for name in ("vectors", "scalars", "mask", "index", "points"):
            joined = torch.cat([getattr(p.inputs, name) for p in parts], -1)
            assert torch.equal(joined, getattr(whole.inputs, name)), name
        assert torch.equal(torch.cat([p.target for p in parts], -1), whole.target)
        assert torch.equal(torch.cat([p.weight for p in parts], -1), whole.weight)
    for other, split, item in (
        (task, "train", 6),
        (task, "validation", 5),
        (Needles(TOKENS, 40, seed=1), "train", 5),
    ):
        sample = other.sample(split, [item], [1], 0, TOKENS)
        assert not torch.allclose(sample.inputs.vectors[0, ..., 0], whole.inputs.vectors[0, ..., 0])


def test_a_slice_costs_its_own_tokens_and_pairs(monkeypatch):
    """No random number of another rank's tokens is drawn, but for the pairs that a cut meets."""
    drawn = []
    for name in ("uniforms", "normals"):
        real = getattr(needles, name)

        def counting(key, start, stop, real=real):
            drawn.append(stop - start)
            return real(key, start, stop)

        monkeypatch.setattr(needles, name, counting)
    task = Needles(1 << 40, 1 << 30)
    task.sample("train", [0], [0], (1 << 39) + 7, (1 << 39) + 7 + 4096)
    assert max(drawn) == 4096 and sorted(drawn)[-2] <= 4096 // 1024 + 2


def test_baselines_and_the_unit():
    """Zero scores 1 by the unit's meaning, and a share of every value 1 - 1/keys; exactly what the
    samples themselves say."""
    task = Needles(4001, 1000, keys=4, held_out_size=4)
    scores = task.baselines("validation")
    assert scores["zero"] == pytest.approx(1, abs=0.1)
    assert scores["share of every value"] == pytest.approx(0.75, abs=0.05)
    sample = task.sample("validation", range(4), [0] * 4, 0, 4001)
    for name, answer in (("zero", 0), ("share of every value", sample.inputs.vectors[:, 0] / 4)):
        error = (sample.weight * (answer - sample.target).square().sum(1) / 3).sum()
        assert error / sample.weight.sum() / task.unit == pytest.approx(scores[name], rel=1e-5)


def test_options_are_checked():
    for options, message in (
        ({"pairs": 0}, "pairs=0: must be .* 1$"),
        ({"keys": 7}, "keys=7: must be .* 6$"),
        ({"noise": -1.0}, "noise=-1.0: must be .* 0$"),
        ({"noise": float("nan")}, "noise=nan: must be .* 0$"),
        ({"held_out_size": 0}, "held_out_size=0: must be .* 1$"),
        ({"tokens": 8, "pairs": 4}, "tokens=8: a question and pairs=4 need 9 or more"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            build_task("needles", **options)
    assert len(np.unique([Needles(9, 2).digest, Needles(10, 2).digest])) == 2
