"""Time and memory of what is measured, the same answer on every rank."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling.observe.memory import peak_bytes, reset_peak
from scaling.parallel.collectives import global_maxima, group_size

LEAST_ROUNDS = 3


def medians(
    sides: Mapping[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, float]:
    """Median time of each side in s, that of the slowest rank.

    Rounds in which every side runs once follow one another for about `seconds`, so that whatever
    else the machine does meets all sides alike. One round before them does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    began, rounds = now(device), 0
    while rounds < LEAST_ROUNDS or any(global_maxima(now(device) - began < seconds, device=device)):
        for name, side in sides.items():
            if group_size(None) > 1:
                dist.barrier()
            start = now(device)
            side()
            times[name].append(now(device) - start)
        rounds += 1
    found = global_maxima(*map(statistics.median, times.values()), device=device)
    return dict(zip(sides, found, strict=True))


def now(device: torch.device) -> float:
    """Time in s when everything started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def available_cores() -> int:
    """Of this process, which may not use all of the machine's."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a rank holds at most meanwhile, everything in the process included."""
    reset_peak(device)
    run()
    return int(*global_maxima(peak_bytes(device), device=device))


def both_ways(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    module: nn.Module | None = None,
) -> Callable[[], list[Tensor]]:
    """Forward and backward: the results, and the gradients of inputs and module's parameters.

    Args:
        grads: of the results.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    wanted = [*inputs, *(module.parameters() if module else ())]

    def step() -> list[Tensor]:
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        return [*results, *torch.autograd.grad(results, wanted, grads)]

    return step
