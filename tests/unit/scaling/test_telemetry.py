"""Every moment and every byte belongs to who measures, and to nobody else."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from scaling.ops import scalar_long_conv
from scaling.parallel.telemetry import (
    Transfer,
    exchanging,
    innermost_range,
    measuring,
    timed,
    timed_both_ways,
)
from tests.processes import run as run_command

ROOT = Path(__file__).parents[3]


@pytest.fixture
def counted_moments(monkeypatch):
    """Every look at the clock is a second later than the one before."""
    moments = map(float, range(1000))
    monkeypatch.setattr("scaling.parallel.telemetry.perf_counter", lambda: next(moments))


def test_each_moment_counts_for_the_innermost_range_and_for_all_around_it(counted_moments):
    """Also in a backward, after an error inside, and with nobody measuring."""
    q = torch.randn(2, 8, requires_grad=True)
    with timed("comm"):
        scalar_long_conv(q, q)  # nobody measures
    with measuring() as forward:
        u = scalar_long_conv(q, q)
    assert forward.innermost() == {None: 2, "transforms": 1} and forward.total_s == 3
    with measuring() as backward:
        with pytest.raises(RuntimeError), timed("projection"):
            u.backward(torch.ones(1))
        with timed("backward"), timed("projection"):
            u.sum().backward()
    assert backward.innermost() == {None: 3, "backward": 2, "projection": 3, "transforms": 1}
    assert backward.within("backward") == 5 and backward.within("projection") == 4
    assert backward.within("comm") == 0 and backward.total_s == 9


def test_a_measurement_sees_what_another_inside_sees(counted_moments):
    with measuring() as outer:
        with timed("forward"), measuring() as inner, timed("comm"), exchanging("test", 7):
            pass
        with exchanging("test", 5):
            pass
    assert (inner.sent_bytes, outer.sent_bytes) == (7, 12)
    assert outer.exchanges["test"].calls == 2 and inner.exchanges["test"].calls == 1
    assert inner.within("forward") == 0 and outer.within("forward") > inner.total_s
    with exchanging("test", 3):
        pass
    assert outer.sent_bytes == 12


def test_what_arrives_before_anybody_waits_was_hidden(counted_moments):
    """Begun at 1, arrived at 2, waited for from 3 to 6; the other arrives only while waited for."""
    with measuring() as measured:
        early = Transfer()
        early.arrived()
        with exchanging("early", 8, early):
            pass
        late = Transfer()
        with exchanging("late", 8, late):
            pass
    counts = measured.exchanges
    assert counts["early"].transfer_s == 1 < counts["early"].seconds
    assert counts["late"].transfer_s > counts["late"].seconds
    assert measured.waited_s == counts["early"].seconds + counts["late"].seconds
    assert measured.transfer_s == 1 + counts["late"].transfer_s


def test_an_error_ends_a_measurement():
    with pytest.raises(ValueError), measuring() as measured, timed("forward"):
        raise ValueError
    with timed("backward"), exchanging("test", 1):
        assert innermost_range() is None
    assert measured.sent_bytes == 0


def test_threads_that_measure_at_one_time_share_nothing():
    """As the ranks of a threaded process group do."""
    together = threading.Barrier(4, timeout=20)

    def rank(number: int) -> tuple[int, set[str | None]]:
        with measuring() as measured:
            for _ in range(number):
                with timed(f"range{number}"), exchanging("test", number):
                    pass
            together.wait()
        return measured.sent_bytes, set(measured.innermost()) - {"comm", None}

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(rank, range(1, 5)))
    assert found == [(n * n, {f"range{n}"}) for n in range(1, 5)]


class Seen(torch.autograd.Function):
    """Notes the range that its gradient passes in."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(innermost_range())
        return grad, None


def test_the_backward_of_a_function_belongs_to_its_range():
    """And nothing before or behind it; inputs that have no gradient get none."""
    before, inside, behind = [], [], []
    x, data = torch.ones(3, requires_grad=True), torch.ones(3)

    def run(x, data):
        assert not data.requires_grad
        y = Seen.apply(x * data, inside)
        return y, data + 1, 2 * y

    with measuring() as measured:
        first, untrained, second = timed_both_ways("projection", run, Seen.apply(x, before), data)
        assert not untrained.requires_grad
        (Seen.apply(first, behind) + second).sum().backward()
        with torch.no_grad():
            timed_both_ways("projection", run, x, data)
        timed_both_ways("projection", run, data, data)[0].sum()
        assert innermost_range() is None
    assert (before, inside, behind) == ([None], ["projection"], [None])
    assert x.grad is not None and x.grad.tolist() == [3.0] * 3
    assert set(measured.innermost()) == {None, "projection"}


class Deep(torch.autograd.Function):
    """Its backward runs a backward pass, so often that autograd goes on in threads of its own, as
    it does for the kernels of a GPU."""

    @staticmethod
    def forward(ctx, x, depth, threads):
        ctx.depth, ctx.threads = depth, threads
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.threads.add(threading.get_ident())
        with timed("projection"), exchanging("test", 1):
            pass
        if ctx.depth:
            with torch.enable_grad():
                again = Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.threads)
                again.sum().backward()
        return grad, None, None


def test_a_backward_pass_in_another_thread_belongs_to_who_started_it():
    """In a process of its own: one whose autograd has started threads cannot be forked."""
    ended = run_command([sys.executable, __file__], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr


def backward_in_threads() -> None:
    threads: set[int] = set()
    with measuring() as measured:
        Deep.apply(torch.ones(1, requires_grad=True), 70, threads).sum().backward()
    assert len(threads) > 1 and measured.exchanges["test"].calls == 71
    assert measured.within("projection") > 0


if __name__ == "__main__":
    backward_in_threads()
