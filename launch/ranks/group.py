"""A rank's cores and device, and the process group around a run."""

import contextlib
import os
from collections.abc import Iterator, MutableMapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import ConfigError
from launch.ranks.discovery import Ranks

if TYPE_CHECKING:
    import torch


met_others = False
"""Whether this process has had a process group."""


def share_cores(ranks: Ranks, environ: MutableMapping[str, str] = os.environ) -> None:
    """Threads of one rank = cores / ranks here, unless chosen; before torch is imported."""
    if ranks.local_world > 1 and "OMP_NUM_THREADS" not in environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environ["OMP_NUM_THREADS"] = str(max(1, (cores or 1) // ranks.local_world))


def choose_device(wanted: str, ranks: Ranks) -> "torch.device":
    """`auto`, `cpu` or `cuda` as this rank's device; tells DeepSpeed where there is no GPU.

    Raises:
        ConfigError: cuda wanted but absent, or more ranks here than GPUs.
    """
    import torch

    if wanted == "auto" and (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        or os.environ.get("DS_ACCELERATOR") == "cpu"
    ):
        wanted = "cpu"
    gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and gpus == 0:
        raise ConfigError("device=cuda, but PyTorch sees no GPU here; use device=auto or cpu")
    if gpus == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    if ranks.local_rank >= gpus:
        raise ConfigError(
            f"local rank {ranks.local_rank} has no GPU of its own, this machine shows {gpus}; "
            f"start {gpus} processes here, or use device=cpu"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(
    ranks: Ranks, device: "torch.device", timeout_s: float, needed: bool = False
) -> Iterator[None]:
    """The default process group for the body (gloo, or nccl on GPUs), gone afterwards; on a CPU
    the allocator is told to give large blocks back.

    Args:
        needed: a single process gets a group too (DeepSpeed wants one).

    Raises:
        ConfigError: the ranks did not meet within `timeout_s` seconds.
    """
    from scaling.observe.memory import return_large_blocks

    if device.type == "cpu":
        return_large_blocks()
    if ranks.world == 1 and not needed:
        yield
        return
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    places = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world, "LOCAL_RANK": ranks.local_rank,
              "LOCAL_WORLD_SIZE": ranks.local_world}  # fmt: skip
    os.environ.update({key: str(value) for key, value in places.items()})  # DeepSpeed reads them
    meeting: dict[str, Any] = {"init_method": "env://"}
    if ranks.master is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = ranks.master
    else:  # alone: no port, so that two such jobs never collide
        meeting = {"store": HashStore(), "rank": 0, "world_size": 1}
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **meeting)
    except (dist.DistError, TimeoutError, ValueError) as error:
        address = ":".join(ranks.master or ())
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"rank {ranks.rank} of {ranks.world} could not meet the others at {address} within "
            f"{timeout_s:g} s ({reason}); were all ranks started, is the port free?"
        ) from None
    global met_others
    met_others = True
    yield
    # Not in a finally: after an error the other ranks are elsewhere and would never come here.
    dist.barrier()
    dist.destroy_process_group()
