"""Collectives with exact adjoints, every call counted.

Each differentiable collective's backward is its true transpose (all_to_all with swapped counts,
all_reduce(sum) with itself, all_gather with reduce_scatter(sum)) and is never scaled: then the sum
of the ranks' losses has the same gradient as one process computing it.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from data_pipeline.errors import LongfoldError, RunError
from scaling.parallel.telemetry import Transfer, exchanging, is_measured, timed

Group = dist.ProcessGroup | None
Number = float | int


def group_size(group: Group) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group: Group) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


class Exchange:
    """An all-to-all under way, of any dtype; not recorded by autograd.

    Rank p gets the next send_counts[p] rows of x, which must stay as it is until `wait`.
    Only the time spent in `wait` counts as waiting: what runs in between hides the rest.
    """

    def __init__(
        self,
        x: Shaped[Tensor, "rows ..."],
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        group: Group,
        operator: str,
    ) -> None:
        # A strided buffer would be scrambled silently; NCCL knows no complex numbers.
        assert x.is_contiguous()
        self._dtype = x.dtype
        self._wire = torch.view_as_real(x) if x.is_complex() else x
        self._wire = x.view(torch.uint8) if x.dtype == torch.bool else self._wire
        self._received = self._wire.new_empty(sum(receive_counts), *self._wire.shape[1:])
        self._operator = operator
        self._sent = (sum(send_counts) - send_counts[group_rank(group)]) * x[:1].nbytes
        self._transfer = Transfer()
        with timed("comm"):
            self._work = dist.all_to_all_single(
                self._received,
                self._wire,
                list(receive_counts),
                list(send_counts),
                group=group,
                async_op=True,
            )
        if is_measured() and self._work is not None and dist.get_backend(group) == "gloo":
            self._work.get_future().add_done_callback(self._transfer.arrived)

    def wait(self) -> Shaped[Tensor, "received ..."]:
        """The rows received, in the order of the ranks they came from."""
        assert self._work is not None
        with exchanging(self._operator, self._sent, self._transfer):
            self._work.wait()
        del self._work, self._wire  # what was sent is not needed any more
        if self._dtype.is_complex:
            return torch.view_as_complex(self._received)
        return self._received.view(self._dtype)


def all_to_all(
    x: Shaped[Tensor, "rows ..."],
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: Group,
    operator: str,
) -> Shaped[Tensor, "received ..."]:
    """Sends send_counts[p] leading rows of x to rank p, in order; differentiable.

    The result is ordered by source rank, receive_counts[p] rows from rank p.
    """
    return _AllToAll.apply(x, send_counts, receive_counts, group, operator)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        group: Group,
        operator: str,
    ) -> Tensor:
        ctx.arguments = (receive, send, group, operator)
        return Exchange(x.contiguous(), send, receive, group, operator).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        received = Exchange(grads[0].contiguous(), *ctx.arguments).wait()
        return received, None, None, None, None


def all_gather(x: Shaped[Tensor, "..."], group: Group, operator: str) -> Shaped[Tensor, "p ..."]:
    """Every rank's x, stacked; differentiable (its transpose sums over the ranks)."""
    ones = [1] * group_size(group)
    return all_to_all(x.expand(len(ones), *x.shape), ones, ones, group, operator)


def all_reduce_sum(
    x: Shaped[Tensor, "*shape"], group: Group, operator: str
) -> Shaped[Tensor, "*shape"]:
    """Sum over the ranks of a group, the same on each; differentiable."""
    return x if group_size(group) == 1 else _AllReduceSum.apply(x, group, operator)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, operator: str) -> Tensor:
        ctx.arguments = (group, operator)
        return _reduce(x, dist.ReduceOp.SUM, group, operator)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce(grads[0], dist.ReduceOp.SUM, *ctx.arguments), None, None


def all_reduce_max(
    x: Shaped[Tensor, "*shape"], group: Group, operator: str
) -> Shaped[Tensor, "*shape"]:
    """Largest value over the ranks of a group, the same on each; without a gradient."""
    return x if group_size(group) == 1 else _reduce(x.detach(), dist.ReduceOp.MAX, group, operator)


def _reduce(x: Tensor, operation: Any, group: Group, operator: str) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    size = group_size(group)  # a ring sends each byte twice, less the own share
    wire = torch.view_as_real(result) if result.is_complex() else result
    with exchanging(operator, 2 * (size - 1) * result.nbytes // size):
        dist.all_reduce(wire, operation, group=group)
    return result


def sum_over_ranks(numbers: Tensor, group: Group = None) -> Tensor:
    """Numbers about a step, summed in place and not counted as traffic; the host does not wait."""
    if dist.is_initialized():
        dist.all_reduce(numbers, group=group)
    return numbers


def global_sums(
    *values: Number | Tensor,
    group: Group = None,
    device: torch.device | str = "cpu",
    operation: Any = dist.ReduceOp.SUM,
) -> list[float]:
    """Each number summed over all ranks, in float64, by one exchange. Every rank must call it."""
    numbers = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(numbers, operation, group=group)
    return numbers.tolist()


global_maxima = partial(global_sums, operation=dist.ReduceOp.MAX)
"""Each number's largest value over all ranks, by one exchange. Every rank must call it."""


def first_rank_gives(tensors: Iterable[Tensor]) -> None:
    """Fills tensors, alike on every rank, with the first rank's values. Collective."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.broadcast(tensor, src=0)


def first_rank_says(function: Callable[[], Any]) -> Any:
    """Calls it on the first rank; every rank gets its result, or its error. Collective."""
    answer = [_answer(function) if group_rank(None) == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    return _results(answer)[0]


def every_rank_says(function: Callable[[], Any]) -> list[Any]:
    """Calls it on every rank; each gets the results of all, or the first error. Collective."""
    answers: list[Any] = [_answer(function)]
    if dist.is_initialized():
        answers, own = [None] * group_size(None), answers[0]
        dist.all_gather_object(answers, own)
    return _results(answers)


def _answer(function: Callable[[], Any]) -> tuple[Any, LongfoldError | None]:
    """A result or an error; a full disk must not leave the other ranks waiting."""
    try:
        return function(), None
    except LongfoldError as error:
        return None, error
    except OSError as error:
        fix = f"cannot write to the run directory: {error}; make room and rerun"
        return None, RunError(fix)


def _results(answers: list[Any]) -> list[Any]:
    for _, error in answers:
        if error is not None:
            raise error
    return [result for result, _ in answers]
