"""The stream: one order for every history of ranks, each sample once an epoch, exact resume."""

from collections import Counter

import pytest
import torch

from data_pipeline.batch import Sample
from data_pipeline.counter_rng import permuted
from data_pipeline.errors import ConfigError, OptionError, RunError
from data_pipeline.prepare import ensure_bundled
from data_pipeline.stream.order import DataSlot
from data_pipeline.stream.stream import (
    Stream,
    check_batches,
    check_lengths,
    evaluation_batches,
)
from data_pipeline.tasks.denoising import Denoising
from data_pipeline.tasks.recall import Recall

TASK = Recall(tokens=9, train_size=24)
HISTORY = [(4, 2, 1), (2, 4, 2), (1, 8, 8), (8, 1, 1), (2, 3, 4), (1, 1, 8)]  # dp, sp, micro


@pytest.fixture(scope="module")
def denoising(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "bundled"
    ensure_bundled(path)
    return Denoising(str(path), neighbours=2)


def rows_of(step_of_rank: dict[tuple[int, int], list[Sample]], dp: int, sp: int) -> list[dict]:
    """The samples of a global step in order, slices joined and padding removed."""
    rows = []
    for accumulated in range(len(step_of_rank[0, 0])):
        for d in range(dp):
            parts = [step_of_rank[d, s][accumulated] for s in range(sp)]
            assert len({(p.length, p.tokens) for p in parts}) == 1
            points = torch.cat([p.inputs.points for p in parts], -1)
            vectors = torch.cat([p.inputs.vectors for p in parts], -1)
            mask = torch.cat([p.inputs.mask for p in parts], -1)
            assert points.shape[-1] == parts[0].length == mask.sum(1).max()
            for row in range(len(points)):
                valid = mask[row]
                rows.append({"x": points[row, :, valid], "v": vectors[row, ..., valid]})
                if not parts[0].per_token:
                    rows[-1]["target"] = parts[0].target[row]
    return rows


def steps(task, dp, sp, micro, state=None, count=1, batch=8, seed=3):
    """`count` global steps from `state`, and the state after them."""
    streams = {
        (d, s): Stream(
            task, "train", batch_size=batch, micro_batch_size=micro, seed=seed, max_length=4096,
            slot=DataSlot(d, dp, s, sp),
        )
        for d in range(dp) for s in range(sp)
    }  # fmt: skip
    found = []
    for stream in streams.values():
        if state is not None:
            stream.load_state_dict(state)
    for _ in range(count):
        found.append(rows_of({place: next(s) for place, s in streams.items()}, dp, sp))
    states = [s.state_dict() for s in streams.values()]
    assert all(s == states[0] for s in states)
    for stream in streams.values():
        stream.close()
    return found, states[0]


def assert_equal(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for name in row:
            torch.testing.assert_close(row[name], other[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["recall", "denoising"])
def test_steps_do_not_depend_on_ranks_or_their_history(name, denoising):
    """Changing (dp, sp, micro batch) between steps gives the one-rank order, values bit-equal.

    Denoising has no atom missing in the chains it reads here, so masked rows are whole rows.
    """
    task = TASK if name == "recall" else denoising
    reference, _ = steps(task, 1, 1, 8, count=len(HISTORY))
    state = None
    for (dp, sp, micro), expected in zip(HISTORY, reference, strict=True):
        (rows,), state = steps(task, dp, sp, micro, state)
        assert_equal(rows, expected)
    assert state is not None and state["cursor"] == 8 * len(HISTORY)


def test_every_sample_comes_once_an_epoch():
    """Also where epochs end inside a batch; each epoch and each seed has its own order."""
    numbers = {tuple(TASK.sample("train", [i], [0], 0, 9).target[0].tolist()): i for i in range(24)}

    def order(seed):
        found, _ = steps(TASK, 1, 1, 5, count=24, batch=10, seed=seed)
        return [numbers[tuple(row["target"].tolist())] for rows in found for row in rows]

    epochs = [order(3)[e * 24 : (e + 1) * 24] for e in range(10)]
    assert all(Counter(epoch) == Counter(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10
    assert order(4)[:24] != epochs[0]


def test_noise_is_new_each_epoch(denoising):
    """The same chain comes back with another noise."""
    size = denoising.size("train")
    first, _ = steps(denoising, 1, 1, 1, batch=1, count=1)
    last = {"cursor": 0, "seed": 3, "digest": denoising.digest}
    for epoch in (1, 2):
        stream = Stream(
            denoising, "train", batch_size=1, micro_batch_size=1, seed=3, max_length=9999
        )
        for place in range(epoch * size, (epoch + 1) * size):
            stream.load_state_dict(last | {"cursor": place})
            (batch,) = next(stream)
            if batch.length == first[0][0]["x"].shape[-1]:
                x = batch.inputs.points[0]
                assert not torch.equal(x, first[0][0]["x"])
        stream.close()


def test_resume_equals_uninterrupted_and_foreign_states_are_refused(denoising):
    """Prefetched steps are not counted; another seed or digest is an error."""
    straight, _ = steps(denoising, 1, 2, 4, count=5)
    _, state = steps(denoising, 2, 1, 4, count=2)
    resumed, _ = steps(denoising, 1, 2, 4, state, count=3)
    for rows, others in zip(resumed, straight[2:], strict=True):
        assert_equal(rows, others)
    with pytest.raises(RunError, match="digest"):
        steps(TASK, 1, 1, 8, state)
    with pytest.raises(RunError, match="seed is 3, this run's is 4"):
        steps(denoising, 1, 1, 8, state, seed=4)


def test_evaluation_gives_every_sample_once(denoising):
    """For any ranks the same rows; missing rows are empty; equally many batches a rank."""
    size = denoising.size("validation")
    lengths = sorted(denoising.length("validation", i) for i in range(size))
    reference = None
    for dp, sp, micro in ((1, 1, 4), (2, 2, 3), (3, 1, 5), (8, 3, 2)):
        ranks = {
            (d, s): list(
                evaluation_batches(
                    denoising, "validation", micro_batch_size=micro, max_length=4096,
                    slot=DataSlot(d, dp, s, sp),
                )
            )
            for d in range(dp) for s in range(sp)
        }  # fmt: skip
        batches = {len(found) for found in ranks.values()}
        assert batches == {-(-size // (dp * micro))}
        tokens = sum(b.tokens for (_, s), found in ranks.items() if s == 0 for b in found)
        assert tokens == sum(lengths)
        rows = [
            torch.cat([p.inputs.points[row] for p in parts], -1)
            for d in range(dp)
            for parts in zip(*(ranks[d, s] for s in range(sp)), strict=True)
            for row in range(micro)
        ]
        masks = [
            torch.cat([p.inputs.mask[row] for p in parts], -1)
            for d in range(dp)
            for parts in zip(*(ranks[d, s] for s in range(sp)), strict=True)
            for row in range(micro)
        ]
        for found in ranks.values():
            assert [b.length for b in found] == sorted((b.length for b in found), reverse=True)
        whole = sorted(
            (x[:, m].numpy().tobytes() for x, m in zip(rows, masks, strict=True) if m.any())
        )
        reference = reference or whole
        assert whole == reference and len(whole) == size


def test_bad_sizes_and_long_items_are_named(denoising):
    """Batches that cannot be shared name what can; a long chain is named, never cut."""
    with pytest.raises(ConfigError, match=r"batch_size=10: .*dp\(2\).*try 8 or 12"):
        Stream(
            TASK,
            "train",
            batch_size=10,
            micro_batch_size=2,
            seed=0,
            max_length=9,
            slot=DataSlot(0, 2),
        )
    for make in (
        lambda: Stream(
            denoising, "train", batch_size=1, micro_batch_size=1, seed=0, max_length=1000
        ),
        lambda: next(evaluation_batches(denoising, "train", micro_batch_size=1, max_length=1000)),
    ):
        with pytest.raises(ConfigError, match=r"max_length=1000: chain \S+/\S+ has 1611 tokens"):
            make()
    with pytest.raises(ConfigError, match=r"max_length=8: sequence 0 of validation has 9 "):
        check_lengths(TASK, "validation", 8)
    check_lengths(TASK, "validation", 9)

    class Sized(Recall):
        def size(self, split):
            return size

    for size in (0, -1):  # no task of ours, but one of these would never end
        message = r"^validation of task recall holds no samples"
        with pytest.raises(ConfigError, match=message):
            next(evaluation_batches(Sized(), "validation", micro_batch_size=1, max_length=99))
        with pytest.raises(ConfigError, match=r"^train of task recall holds no samples"):
            Stream(Sized(), "train", batch_size=1, micro_batch_size=1, seed=0, max_length=99)
        with pytest.raises(AssertionError, match=r"not in range"):
            permuted(0, size, 1)


def test_errors_of_the_thread_arrive_and_do_not_shift_the_order():
    """A failing sample raises in next(); the cursor stays."""

    class Failing(Recall):
        fail = True

        def sample(self, split, items, keys, start, stop):
            if self.fail:
                raise RuntimeError("disk")
            return super().sample(split, items, keys, start, stop)

    task = Failing(tokens=9, train_size=24)
    stream = Stream(task, "train", batch_size=2, micro_batch_size=2, seed=0, max_length=9)
    with pytest.raises(RuntimeError, match="disk"):
        next(stream)
    task.fail = False
    (batch,) = next(stream)
    assert stream.state_dict()["cursor"] == 2 and stream.data_wait_s > 0
    stream.close()
    other = Stream(task, "train", batch_size=2, micro_batch_size=2, seed=0, max_length=9)
    assert torch.equal(next(other)[0].target, batch.target)
    other.close()


@pytest.mark.parametrize(
    ("batch", "micro", "dp", "ways"),
    [
        (8, 4, 4, "try 16, or micro_batch_size=2, which keeps it"),
        (8, 2, 3, "try 6 or 12, or dp=2, which keeps it"),  # of 4 nodes one is lost
        (1, 1, 2, "try 2, or dp=1, which keeps it"),
    ],
)
def test_a_batch_that_ranks_cannot_share_says_how_they_can(batch, micro, dp, ways):
    with pytest.raises(OptionError, match=ways):
        check_batches(batch, micro, dp)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000])
def test_order_is_a_permutation(count):
    """A bijection for every size, different for keys."""
    orders = [[permuted(i, count, key) for i in range(count)] for key in (1, 2)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 4 or orders[0] != orders[1]
