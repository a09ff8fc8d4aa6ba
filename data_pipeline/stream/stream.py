"""Each rank's slices of the samples, in an order that is arithmetic on one integer.

Nothing but the cursor needs saving, and how many ranks share the work changes nothing.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipeline.batch import Sample
from data_pipeline.counter_rng import evaluation_key, hash64
from data_pipeline.errors import ConfigError, OptionError, RunError
from data_pipeline.stream.order import WHOLE, DataSlot, Order
from data_pipeline.tasks.protocol import Task

AHEAD = 2
"""Optimiser steps prepared while the model works."""


class Stream:
    """Endless optimiser steps for one rank: lists of micro-batches to accumulate.

    A micro-batch holds this rank's tokens of its rows, padded to the longest of them, and on the
    host the lengths and bodies of the whole rows.

    The batch of a step is `batch_size` consecutive samples of the order, so it depends on neither
    dp, sp nor micro_batch_size. An epoch's end may lie inside a batch; every sample comes once an
    epoch (of its store, in a mixture). One thread prepares steps ahead; only steps handed out move
    the cursor.

    Args:
        bucket_steps: steps whose samples are sorted by length and dealt out anew, so that a batch
            holds like lengths; 1: none.
        slot: which rows and tokens are this rank's.

    Raises:
        ConfigError: batch_size cannot be shared evenly, the split is empty, or its longest item
            exceeds max_length (names it).
    """

    def __init__(
        self,
        task: Task,
        split: str,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        max_length: int,
        bucket_steps: int = 1,
        slot: DataSlot = WHOLE,
    ):
        check_batches(batch_size, micro_batch_size, slot.dp)
        check_lengths(task, split, max_length)
        self.data_wait_s = 0.0
        """Seconds that the last step was waited for."""
        self._task, self._split, self._seed, self._bucket = task, split, seed, bucket_steps
        key, lengths = (seed, split, task.digest), task.lengths(split)
        self._order = Order(task.parts(split), key, batch_size, bucket_steps, lengths)
        self._batch_size, self._micro = batch_size, micro_batch_size
        self._slot, self._cursor = slot, 0
        self._ahead: deque[Future[list[Sample]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> list[Sample]:
        began = time.perf_counter()
        self._prepare()
        try:
            step = self._ahead.popleft().result()
        except BaseException:
            self._forget()
            raise
        self._cursor += self._batch_size
        self.data_wait_s = time.perf_counter() - began
        self._prepare()
        return step

    def names(self) -> list[list[str]]:
        """What the last step's rows are called, by micro-batch: item and place in the order."""
        return [
            [f"{self._task.describe(self._split, item)} (place {place})" for item, place in rows]
            for rows in self._rows(self._cursor - self._batch_size)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The place of the next step in the order, and what the order follows from."""
        state = {"cursor": self._cursor, "seed": self._seed, "digest": self._task.digest}
        # Without buckets the order knows no batches, so that another batch size may go on.
        return state | ({"bucket": [self._bucket, self._batch_size]} if self._bucket > 1 else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there.

        Raises:
            RunError: the state belongs to another seed or to other data.
        """
        mine = self.state_dict()
        for key in sorted((state.keys() | mine.keys()) - {"cursor"}):
            if state.get(key) != mine.get(key):
                raise RunError(
                    f"the checkpoint's data {key} is {state.get(key)}, this run's is "
                    f"{mine.get(key)}: start another run, or go back to the checkpoint's data and "
                    "task options"
                )
        self._forget()
        self._cursor = state["cursor"]

    def close(self) -> None:
        """Ends the thread; the stream gives nothing more."""
        self._forget()
        self._thread.shutdown()

    def _prepare(self) -> None:
        while len(self._ahead) < AHEAD:
            cursor = self._cursor + len(self._ahead) * self._batch_size
            self._ahead.append(self._thread.submit(self._step, cursor))

    def _forget(self) -> None:
        for step in self._ahead:
            step.cancel()
        self._ahead.clear()

    def _step(self, cursor: int) -> list[Sample]:
        return [
            _micro_batch(
                self._task,
                self._split,
                [(item, hash64("sample", self._seed, place)) for item, place in rows],
                self._slot,
            )
            for rows in self._rows(cursor)
        ]

    def _rows(self, cursor: int) -> list[list[tuple[int, int]]]:
        """(item, place) of this rank's rows, by micro-batch."""
        # A step's sum knows no order; rows of like length together need little padding.
        samples = sorted(
            self._order.samples(cursor, cursor + self._batch_size),
            key=lambda sample: -self._task.length(self._split, sample[0]),
        )
        rows = self._slot.rows(self._batch_size, self._micro)
        return [samples[row : row + self._micro] for row in rows]


def evaluation_batches(
    task: Task,
    split: str,
    *,
    micro_batch_size: int,
    max_length: int,
    slot: DataSlot = WHOLE,
) -> Iterator[Sample]:
    """Every sample of a split once, the longest first, with keys of its own for ever.

    Rows that the last micro-batches lack are empty, so that every data-parallel rank gets the
    same number of micro-batches.

    Raises:
        ConfigError: the split is empty or its longest item exceeds max_length (names it).
    """
    check_lengths(task, split, max_length)
    # Rows of like length together need little padding.
    order = np.argsort(-task.lengths(split), kind="stable").tolist()
    samples: list[tuple[int | None, int]] = [(i, evaluation_key(split, i)) for i in order]
    samples += [(None, 0)] * (-len(samples) % (slot.dp * micro_batch_size))
    for row in slot.rows(len(samples), micro_batch_size):
        yield _micro_batch(task, split, samples[row : row + micro_batch_size], slot)


def _micro_batch(
    task: Task, split: str, samples: Sequence[tuple[int | None, int]], slot: DataSlot
) -> Sample:
    items, keys = zip(*samples, strict=True)
    length = max(task.length(split, item) if item is not None else 1 for item in items)
    return task.sample(split, items, keys, *slot.tokens(length))


def check_lengths(task: Task, split: str, max_length: int) -> None:
    """Whether a split can be read at all; quick, so that a run can ask before it starts.

    Raises:
        ConfigError: the split is empty or its longest item exceeds max_length (names it).
    """
    if min(size for size, _ in task.parts(split)) < 1:
        raise ConfigError(
            f"{split} of task {task.name} holds no samples, or a store of its mixture none; leave "
            "that out, or give the task data or options that make one or more"
        )
    length = task.length(split, item := task.longest(split))
    if length > max_length:
        rule = f"{task.describe(split, item)} has {length} tokens"
        raise OptionError("max_length", max_length, f"{rule}; raise it, or leave the sample out")


def check_batches(batch_size: int, micro_batch_size: int, dp: int) -> None:
    """Raises OptionError unless a batch is the same number of micro-batches on every rank."""
    together = max(dp * micro_batch_size, 1)
    if batch_size < 1 or micro_batch_size < 1 or batch_size % together:
        times = batch_size // together
        near = [str(n * together) for n in (times, times + 1) if n > 0]
        rule = f"must be a multiple of dp({dp}) * micro_batch_size({micro_batch_size}); try "
        rule += " or ".join(near)
        if min(batch_size, micro_batch_size) > 0:  # a run that has begun keeps its batch
            key, share, most = "dp", batch_size, dp
            if batch_size % dp == 0:
                key, share, most = "micro_batch_size", batch_size // dp, micro_batch_size
            fitting = max(n for n in range(1, most + 1) if share % n == 0)
            rule += f", or {key}={fitting}, which keeps it"
        raise OptionError("batch_size", batch_size, rule)
