"""Collectives with exact adjoints, every call counted.

Each differentiable collective's backward is its true transpose (all_to_all with swapped counts,
all_reduce(sum) with itself, all_gather with reduce_scatter(sum)) and is never scaled: then the sum
of the ranks' losses has the same gradient as one process computing it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaling.parallel.clock import clock

Group = dist.ProcessGroup | None
Number = float | int


@dataclass
class Count:
    calls: int = 0
    bytes: int = 0
    """Sent to other ranks by this one."""
    seconds: float = 0.0
    """Time in which this rank waited for the collective (host time; with NCCL only the launch)."""


class Traffic:
    """What this rank has exchanged since the last reset, by operator."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, Count] = defaultdict(Count)

    def record(self, operator: str, sent: int, seconds: float) -> None:
        count = self._counts[operator]
        count.calls += 1
        count.bytes += sent
        count.seconds += seconds

    def snapshot(self) -> dict[str, Count]:
        return {name: Count(**vars(count)) for name, count in self._counts.items()}

    def reset(self) -> None:
        self._counts.clear()


traffic = Traffic()


@contextmanager
def _waiting(operator: str, sent: int) -> Iterator[None]:
    """Counts a collective, and the time inside as waiting for it."""
    began = perf_counter()
    with clock.part("comm"):
        yield
    traffic.record(operator, sent, perf_counter() - began)


def group_size(group: Group) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group: Group) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def all_to_all_blocks(x: Tensor, group: Group, operator: str) -> Tensor:
    """Sends x[p] to rank p; block r of the result came from rank r. x: (size, ...), not recorded by
    autograd: its transpose is itself."""
    # A strided buffer would be scrambled silently; NCCL knows no complex numbers.
    send = torch.view_as_real(x.contiguous()) if x.is_complex() else x.contiguous()
    receive = torch.empty_like(send)
    with _waiting(operator, (send.shape[0] - 1) * send[0].nbytes):
        dist.all_to_all_single(receive, send, group=group)
    return torch.view_as_complex(receive) if x.is_complex() else receive


class Exchange:
    """An all-to-all of complex numbers under way; not recorded by autograd.

    Rank p gets the next send_counts[p] numbers of `wire`, which must stay as it is until `wait`.
    Only the time spent in `wait` counts as waiting: what runs in between hides the rest.
    """

    def __init__(
        self,
        wire: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        group: Group,
        operator: str,
    ) -> None:
        # A strided buffer would be scrambled silently; NCCL knows no complex numbers.
        assert wire.is_contiguous()
        self._wire = torch.view_as_real(wire)
        self._received = self._wire.new_empty(sum(receive_counts), 2)
        self._operator = operator
        self._sent = (sum(send_counts) - send_counts[group_rank(group)]) * wire.element_size()
        with clock.part("comm"):
            self._work = dist.all_to_all_single(
                self._received,
                self._wire,
                list(receive_counts),
                list(send_counts),
                group=group,
                async_op=True,
            )

    def wait(self) -> Tensor:
        """The numbers received, in the order of the ranks they came from."""
        assert self._work is not None
        with _waiting(self._operator, self._sent):
            self._work.wait()
        del self._work, self._wire  # what was sent is not needed any more
        return torch.view_as_complex(self._received)


def all_to_all(
    x: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: Group,
    operator: str,
) -> Tensor:
    """Sends send_counts[p] leading rows of x to rank p, in order; differentiable.

    x: (sum(send_counts), ...). Returns (sum(receive_counts), ...), ordered by source rank.
    """
    return _AllToAll.apply(x, list(send_counts), list(receive_counts), group, operator)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Group, operator: str
    ) -> Tensor:
        ctx.arguments = (receive, send, group, operator)
        return _exchange_rows(x, send, receive, group, operator)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange_rows(grads[0], *ctx.arguments), None, None, None, None


def _exchange_rows(
    x: Tensor, send: list[int], receive: list[int], group: Group, operator: str
) -> Tensor:
    source = x.contiguous()
    wire = source.view(torch.uint8) if x.dtype == torch.bool else source
    result = wire.new_empty(sum(receive), *x.shape[1:])
    row_bytes = wire[0].nbytes if len(wire) else 0
    foreign = sum(send) - send[group_rank(group)]
    with _waiting(operator, foreign * row_bytes):
        dist.all_to_all_single(result, wire, receive, send, group=group)
    return result.view(torch.bool) if x.dtype == torch.bool else result


def all_reduce_sum(x: Tensor, group: Group, operator: str) -> Tensor:
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


def all_reduce_max(x: Tensor, group: Group, operator: str) -> Tensor:
    """Largest value over the ranks of a group, the same on each; without a gradient."""
    return x if group_size(group) == 1 else _reduce(x.detach(), dist.ReduceOp.MAX, group, operator)


def _reduce(x: Tensor, operation: Any, group: Group, operator: str) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    size = group_size(group)  # a ring sends each byte twice, less the own share
    with _waiting(operator, 2 * (size - 1) * result.nbytes // size):
        dist.all_reduce(result, operation, group=group)
    return result


def all_gather(x: Tensor, group: Group, operator: str) -> Tensor:
    """Every rank's x, stacked: (size, ...); differentiable (its transpose sums over the ranks)."""
    return _AllGather.apply(x, group, operator)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, operator: str) -> Tensor:
        ctx.arguments = (group, operator)
        return all_to_all_blocks(x.expand(group_size(group), *x.shape), group, operator)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all_blocks(grads[0], *ctx.arguments).sum(0), None, None


def sum_over_ranks(numbers: Tensor, group: Group = None) -> Tensor:
    """Numbers about a step, summed in place and not counted as traffic; the host does not wait."""
    if dist.is_initialized():
        dist.all_reduce(numbers, group=group)
    return numbers


def global_sums(
    *values: Number | Tensor, group: Group = None, device: torch.device | str = "cpu"
) -> list[float]:
    """Each number summed over all ranks, in float64, by one exchange. Every rank must call it."""
    return _reduce_numbers(values, dist.ReduceOp.SUM, group, device)


def global_maxima(
    *values: Number | Tensor, group: Group = None, device: torch.device | str = "cpu"
) -> list[float]:
    """Each number's largest value over all ranks, by one exchange. Every rank must call it."""
    return _reduce_numbers(values, dist.ReduceOp.MAX, group, device)


def _reduce_numbers(
    values: Sequence[Number | Tensor], operation: Any, group: Group, device: torch.device | str
) -> list[float]:
    numbers = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(numbers, operation, group=group)
    return numbers.tolist()
