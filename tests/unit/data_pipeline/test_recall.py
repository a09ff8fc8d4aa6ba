"""Recall: the answer stands behind the query's earlier occurrence, and slices tile."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from data_pipeline.counter_rng import evaluation_key
from data_pipeline.errors import ConfigError
from data_pipeline.store.build import build
from data_pipeline.tasks.recall import Recall
from data_pipeline.tasks.registry import build_task
from data_pipeline.tasks.stored import ProceduralSource
from data_pipeline.tasks.window import edges


@pytest.mark.parametrize("tokens", [3, 4, 5, 32, 33, 200])
@pytest.mark.parametrize("vocabulary", ["random", "fixed"])
def test_the_answer_follows_the_query_where_it_occurred(tokens, vocabulary):
    """Keys and values alternate, one token of noise leads even lengths, nothing else is marked."""
    task = Recall(tokens, vocabulary=vocabulary)
    for item in range(10):
        sample = task.sample("train", [item, None], [item, 0], 0, tokens + 2)
        inputs, front = sample.inputs, 1 - tokens % 2
        x = inputs.vectors[0, 0].T[:tokens]
        keys, values = x[front:-1:2], x[front + 1 : -1 : 2]
        places = (keys == x[-1]).all(1)
        assert places.any() and (values[places] == sample.target[0]).all()
        assert len(keys) == len(values) == (tokens - 1) // 2
        assert (
            len(keys.unique(dim=0)) <= 4
            and ((x.norm(dim=1) <= 4.01) & (x.norm(dim=1) > 0.99)).all()
        )
        parity = inputs.scalars[0, 0, :tokens]
        assert (parity[front::2] == 1).all() and (parity[front + 1 :: 2] == -1).all()
        assert inputs.scalars[0, -1].nonzero().flatten().tolist() == [tokens - 1]
        assert inputs.mask.sum(1).tolist() == [tokens, 0] and not inputs.points.any()
        assert not inputs.vectors[0, ..., tokens:].any() and not inputs.scalars[1].any()
        assert sample.weight.tolist() == [1, 0] and not sample.per_token


@pytest.mark.parametrize("tokens", [7, 32, 97])
def test_slices_tile_and_samples_follow_from_their_number(tokens):
    """Any cut gives the same tokens; targets come with each slice; splits and items differ."""
    task = Recall(tokens, vocabulary="fixed")
    whole = task.sample("train", [5, 9], [1, 2], 0, tokens)
    for ranks in (2, 3, 4, 8, tokens):
        cuts = [tokens * r // ranks for r in range(ranks + 1)]
        parts = [task.sample("train", [5, 9], [1, 2], a, b) for a, b in pairwise(cuts)]
        for name in ("vectors", "scalars", "mask", "index", "points"):
            joined = torch.cat([getattr(p.inputs, name) for p in parts], -1)
            assert torch.equal(joined, getattr(whole.inputs, name)), name
        assert all(torch.equal(p.target, whole.target) for p in parts)
    others = [("train", 6, 1), ("validation", 5, 1)]
    for split, item, key in others:
        sample = task.sample(split, [item], [key], 0, tokens)
        assert not torch.allclose(sample.target[0], whole.target[0])


def test_vocabularies_are_fresh_or_fixed_and_turned():
    """Random: unrelated. Fixed: the same lengths and angles, turned in training alone."""

    def words(task, split, item, key):
        x = task.sample(split, [item], [key], 0, 201).inputs.vectors[0, 0].T.double()
        return torch.unique(x.round(decimals=5), dim=0)

    def lengths(x):
        return x.norm(dim=1).sort().values

    fixed, fresh = Recall(201, vocabulary="fixed"), Recall(201)
    one, other = words(fixed, "train", 0, 1), words(fixed, "train", 1, 2)
    torch.testing.assert_close(lengths(one), lengths(other), rtol=0, atol=1e-4)
    assert not torch.allclose(one, other, atol=0.1)
    held_out = [words(fixed, split, 0, 5) for split in ("validation", "test")]
    torch.testing.assert_close(*held_out, rtol=0, atol=0)
    determinants = [torch.linalg.det(x[:3]) for x in held_out]
    assert determinants[0] == determinants[1] != 0
    assert not torch.allclose(
        lengths(words(fresh, "train", 0, 1)), lengths(words(fresh, "train", 1, 1)), atol=0.01
    )


def test_a_marked_read_out_marks_the_query_and_changes_nothing_else(tmp_path):
    """Also out of a store; an option that came later leaves the digest of earlier runs alone."""
    mean, marked = Recall(9, train_size=3), Recall(9, train_size=3, readout="marked")
    build(tmp_path / "store", ProceduralSource(marked))
    stored = build_task("materialised", store=str(tmp_path / "store"))
    keys = [evaluation_key("test", item) for item in (1, 0)]
    plain = mean.sample("test", [1, None, 0], [keys[0], 0, keys[1]], 4, 12)
    assert plain.marked is None and plain.answer == "vectors"
    for task in (marked, stored):
        sample = task.sample("test", [1, None, 0], [keys[0], 0, keys[1]], 4, 12)
        assert sample.marked is not None and sample.answer == "vectors"
        assert sample.marked.nonzero().tolist() == [[0, 4], [2, 4]]
        assert sample.inputs.lengths == (9, 0, 9) and torch.equal(sample.target, plain.target)
        assert torch.equal(sample.inputs.vectors, plain.inputs.vectors)
    assert Recall().digest.startswith("ed94ed0cdb09") and mean.digest != marked.digest


def test_baselines_and_the_unit():
    """Zero scores 1 by the unit's meaning; the mean of the values scores about 0.7."""
    task = Recall(held_out_size=2000)
    scores = task.baselines("validation")
    assert scores["zero"] == pytest.approx(1, abs=0.05)
    assert scores["mean of the values"] == pytest.approx(0.70, abs=0.05)
    assert task.unit == pytest.approx(21 / 9) and Recall(pairs=16).unit == pytest.approx(273 / 9)


def test_options_are_checked():
    """Names and values that cannot be are one-line errors."""
    for option, value, limit in (
        ("tokens", 2, "greater than or equal to 3"),
        ("pairs", 0, "greater than or equal to 1"),
        ("pairs", 1 << 21, "less than or equal to 1048576"),
        ("train_size", -1, "greater than or equal to 1"),
        ("train_size", 0, "greater than or equal to 1"),
        ("held_out_size", 0, "greater than or equal to 1"),
    ):
        with pytest.raises(ConfigError, match=rf"^{option}={value}: must be {limit}$"):
            build_task("recall", **{option: value})
    with pytest.raises((ConfigError, TypeCheckError), match="sometimes"):
        build_task("recall", vocabulary="sometimes")
    with pytest.raises(ConfigError, match="there are denoising, recall"):
        build_task("recal")
    with pytest.raises(ConfigError, match="task recall has no length"):
        build_task("recall", length=3)
    assert build_task("recall", tokens=9).size("train") == 1 << 20
    assert np.unique([Recall(9).digest, Recall(10).digest, Recall(9, seed=1).digest]).size == 3


def test_edge_features_decay_from_both_ends():
    """Parity, then exp(-d/decay) of the distance from either end; zero outside the row."""
    found = edges(np.arange(2, 12)[None], np.array([9, 5, 0])[:, None])
    for row, length in enumerate((9, 5, 0)):
        for column, i in enumerate(range(2, 12)):
            both = [(np.exp(-i / d), np.exp(-(length - 1 - i) / d)) for d in (2, 8, 32)]
            expected = [(-1) ** i, *(x for pair in both for x in pair)] if i < length else [0] * 7
            np.testing.assert_allclose(found[row, :, column], expected, rtol=1e-6)
