"""Times of several ways to the same end, taken in turn in one run."""

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch
import torch.distributed as dist

from scaling.parallel.collectives import Group, global_maxima, group_size

LEAST_ROUNDS = 3


def medians(
    sides: Mapping[str, Callable[[], object]],
    group: Group = None,
    device: torch.device | None = None,
    seconds: float = 2.0,
) -> dict[str, float]:
    """Median time of each side in s, that of the slowest rank; the same on every rank.

    Rounds in which every side runs once follow one another for about `seconds`, so that whatever
    else the machine does meets all sides alike. One round before them does not count.
    """
    device = device or torch.device("cpu")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    began, rounds = now(device), 0
    while rounds < LEAST_ROUNDS or _any_rank(now(device) - began < seconds, group, device):
        for name, side in sides.items():
            if group_size(group) > 1:
                dist.barrier(group)
            start = now(device)
            side()
            times[name].append(now(device) - start)
        rounds += 1
    found = global_maxima(*map(statistics.median, times.values()), group=group, device=device)
    return dict(zip(sides, found, strict=True))


def now(device: torch.device) -> float:
    """Time in s when everything started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _any_rank(answer: bool, group: Group, device: torch.device) -> bool:
    (most,) = global_maxima(float(answer), group=group, device=device)
    return most > 0
