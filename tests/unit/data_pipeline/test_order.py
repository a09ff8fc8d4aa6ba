"""The order of samples: each once, well shuffled, and the same for every history of ranks."""

from collections import Counter
from concurrent.futures import Future
from copy import copy
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import GeometricBatch, Sample
from data_pipeline.counter_rng import hash64
from data_pipeline.errors import RunError
from data_pipeline.stream.order import DataSlot, Order
from data_pipeline.stream.stream import Stream
from data_pipeline.tasks.protocol import Task
from data_pipeline.tasks.recall import Recall

KEY = (3, "train", "digest")


def length_of(item: Any) -> Any:
    return item * 37 % 11 + 9


class Trivial(Task):
    """A sample is its item and key: nothing else costs time."""

    name, vectors, scalars, unit, digest = "trivial", 0, 0, 1.0, "digest"

    def __init__(self, *parts: tuple[int, int]):
        self._parts = list(parts)

    def parts(self, split):
        return self._parts

    def lengths(self, split):
        return length_of(np.arange(sum(size for size, _ in self._parts)))

    def length(self, split, item):
        return length_of(item)

    def sample(self, split, items, keys, start, stop):
        sample: Any = copy(EMPTY)
        sample.given = (list(items), list(keys), (start, stop))
        return sample

    def baselines(self, split):
        return {}


EMPTY = Sample(GeometricBatch(torch.zeros(1, 3, 1)), torch.zeros(1, 3), torch.zeros(1))
MESHES = [(1, 1, 1), (1, 2, 4), (2, 1, 2), (2, 2, 1), (1, 3, 2), (4, 1, 1)]
"""dp, sp, micro-batch."""


def segments(data) -> list[tuple[tuple[int, int, int], int, int]]:
    """Of a run: its ranks, the steps whose result is kept, and those that a kill lost."""
    segment = st.tuples(st.sampled_from(MESHES), st.integers(0, 2), st.integers(0, 1))
    return data.draw(st.lists(segment, min_size=2, max_size=3))


BATCH = 4


class AtOnce:
    """Prepares steps ahead, but in no thread, whose waits would be most of 1,000 histories."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done

    def shutdown(self):
        pass


@cache
def order_of(parts: tuple[tuple[int, int], ...], bucket: int) -> Order:
    """One for all ranks and histories, for under the checks of types it is slow."""
    task = Trivial(*parts)
    order = Order(parts, KEY, BATCH, bucket, task.lengths("train"))
    options: Any = {"batch_size": BATCH, "micro_batch_size": 1, "seed": KEY[0], "max_length": 99}
    own = Stream(task, "train", bucket_steps=bucket, **options)._order
    assert own.samples(0, 50) == order.samples(0, 50)
    order.samples = cache(order.samples)
    return order


@patch("data_pipeline.stream.stream.ThreadPoolExecutor", AtOnce)
@patch("data_pipeline.stream.stream.AHEAD", 1)
@patch("data_pipeline.stream.stream.hash64", cache(hash64))
@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_any_history_of_ranks_kills_and_resumes_gives_each_sample_once(data):
    """1,000 histories of (dp, sp, micro-batch, kill, resume): the kept steps are those of one
    process that was never killed, every rank has its own slice, each item comes once an epoch."""
    parts = data.draw(st.sampled_from([((7, 1),), ((12, 1),), ((1, 1),), ((5, 2), (3, 1))]))
    bucket = data.draw(st.sampled_from([1, 1, 2, 3]))
    order, found, state = order_of(parts, bucket), [], None
    for mesh, kept, lost in segments(data):
        steps, state = run(
            Trivial(*parts), order_of(parts, bucket), bucket, mesh, kept, lost, state
        )
        found += steps
    order = order_of(parts, bucket)
    expected = [order.samples(n * BATCH, (n + 1) * BATCH) for n in range(len(found))]
    assert [sorted(item for item, _ in step) for step in found] == [
        sorted(item for item, _ in step) for step in expected
    ]
    keys = [key for step in found for _, key in step]
    assert len(set(keys)) == len(keys)
    if len(parts) == 1:
        items, size = [item for step in expected for item, _ in step], parts[0][0]
        for start in range(0, len(items) - size + 1, size):
            assert Counter(items[start : start + size]) == Counter(range(size))


def run(task, order, bucket, mesh, kept, lost, state):
    """The kept steps of a segment, and the state after them."""
    dp, sp, micro = mesh
    streams = {
        (d, s): Stream(
            task, "train", batch_size=BATCH, micro_batch_size=micro, seed=KEY[0], max_length=99,
            slot=DataSlot(d, dp, s, sp), bucket_steps=bucket,
        )
        for d in range(dp) for s in range(sp)
    }  # fmt: skip
    found = []
    for stream in streams.values():
        stream._order = order
        if state is not None:
            stream.load_state_dict(state)
    for step in range(kept + lost):
        parts = {place: next(stream) for place, stream in streams.items()}
        if step < kept:
            found.append(joined(parts, dp, sp))
            states = [stream.state_dict() for stream in streams.values()]
            assert all(each == states[0] for each in states)
            state = states[0]
    for stream in streams.values():
        stream.close()
    return found, state


def joined(steps, dp, sp) -> list[tuple[int, int]]:
    """(item, key) of a global step; slices of a micro-batch tile its length."""
    rows = []
    for number in range(len(steps[0, 0])):
        for d in range(dp):
            parts = [steps[d, s][number] for s in range(sp)]
            items, keys, _ = parts[0].given
            assert all(part.given[:2] == (items, keys) for part in parts)
            cuts = [part.given[2] for part in parts]
            assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
            assert cuts[-1][1] == max(map(length_of, items))
            rows += zip(items, keys, strict=True)
    return rows


def test_mixtures_keep_their_weights_and_walk_each_part_once_an_epoch():
    """Every round holds its weights; a part's own items come once in each of its epochs."""
    parts, bases = [(10, 3), (4, 1), (7, 2)], [0, 10, 14]
    items = [item for item, _ in Order(parts, KEY).samples(0, 6 * 140)]
    owner = np.searchsorted(bases, items, side="right") - 1
    for start in range(0, len(items), 6):
        assert Counter(owner[start : start + 6]) == {0: 3, 1: 1, 2: 2}
    assert len({tuple(owner[start : start + 6]) for start in range(0, len(items), 6)}) > 20
    for part, (size, _) in enumerate(parts):
        own = [item - bases[part] for item, p in zip(items, owner, strict=True) if p == part]
        epochs = [tuple(own[e : e + size]) for e in range(0, len(own) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) > 0.4 * len(epochs) > 10


def test_buckets_hold_like_lengths_and_lose_nothing():
    """Each epoch and each window holds the samples that it would; batches of one length are near,
    their order is random, and padding is a fraction of what it was."""
    size, batch, bucket = 1001, 8, 16
    lengths = np.random.default_rng(0).integers(30, 900, size)
    plain = Order([(size, 1)], KEY)
    order = Order([(size, 1)], KEY, batch, bucket, lengths)
    samples, expected = order.samples(0, 3 * size), plain.samples(0, 3 * size)
    window = batch * bucket
    for epoch in range(3):
        for start in range(epoch * size, (epoch + 1) * size, window):
            here = slice(start, min(start + window, (epoch + 1) * size))
            assert sorted(samples[here]) == sorted(expected[here])

    def padding(samples):
        rows = lengths[[item for item, _ in samples]][: 3 * size // batch * batch]
        rows = rows.reshape(-1, batch)
        return float(1 - rows.sum() / (rows.max(1) * batch).sum())

    assert padding(expected) > 0.4 and padding(samples) < 0.08
    firsts = lengths[[item for item, _ in samples[:size:batch]]]
    assert abs(np.corrcoef(firsts[1:], firsts[:-1])[0, 1]) < 0.2


@pytest.mark.parametrize("bucket", [1, 4])
def test_shuffle_knows_no_places_neighbours_or_epochs(bucket):
    """An item's place is uniform over epochs, neighbours in the store are not neighbours in the
    order, and consecutive epochs are not alike: correlations of 1,000 items are within 4 sigma."""
    size, epochs = 1000, 8
    order = Order([(size, 1)], KEY, 8, bucket, np.arange(size) * 7919 % 501)
    items = np.array([item for item, _ in order.samples(0, epochs * size)]).reshape(epochs, size)
    places = np.argsort(items, axis=1)
    limit = 4 / np.sqrt(size)
    for a in range(epochs):
        assert abs(np.corrcoef(items[a], np.arange(size))[0, 1]) < limit
        assert abs(np.corrcoef(items[a][1:], items[a][:-1])[0, 1]) < limit
        assert abs(np.corrcoef(items[a], items[a - 1])[0, 1]) < limit
        assert (abs(np.diff(items[a])) == 1).mean() < 0.01
    quarters = np.stack([np.bincount(p * 4 // size, minlength=4) for p in places.T])
    chi = ((quarters - epochs / 4) ** 2 / (epochs / 4)).sum(1).mean()
    assert 2.7 < chi < 3.3  # 3 degrees of freedom


def test_states_lead_back_and_those_of_buckets_know_their_batches():
    """Another window or batch size is another order; without buckets a batch size may change."""

    def stream(batch, bucket):
        return Stream(
            Recall(tokens=9, train_size=24), "train", batch_size=batch, micro_batch_size=2,
            seed=0, max_length=9, bucket_steps=bucket,
        )  # fmt: skip

    used, first = stream(4, 1), stream(4, 1)
    state, expected = used.state_dict(), next(first)
    next(used)  # what is prepared ahead is of another place
    used.load_state_dict(state)
    assert torch.equal(next(used)[0].target, expected[0].target)
    stream(4, 1).load_state_dict(stream(2, 1).state_dict())
    for one, other in (((2, 2), (2, 3)), ((2, 2), (4, 2)), ((2, 1), (2, 2)), ((2, 2), (2, 1))):
        with pytest.raises(RunError, match="data bucket is"):
            stream(*one).load_state_dict(stream(*other).state_dict())
