"""Rank, world and device under any launcher, and the process group around a run.

One module runs under `python -m`, torchrun, accelerate, deepspeed and srun; all that differs
between them is read from the environment here and nowhere else.
"""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import ConfigError, LongfoldError

if TYPE_CHECKING:
    import torch


BAD_INPUT = 2
"""Exit code of a LongfoldError."""

_met_others = False
"""Whether this process has had a process group."""

_PATIENCE_S = 3.0
"""Longer than a launcher needs to end the other ranks after one has failed."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """Processes on this machine."""
    master: tuple[str, str] | None = None
    """Address and port where the ranks meet; None for one process."""


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Rank and world from torchrun, accelerate, deepspeed, srun, or one plain process.

    Raises:
        ConfigError: a launcher that announced several processes started only this one, or gave no
            port to meet at.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        world = int(environ["WORLD_SIZE"])
        local = environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", world))
        master = environ.get("MASTER_ADDR", "127.0.0.1"), environ.get("MASTER_PORT", "29500")
        rank, local_rank = int(environ["RANK"]), int(environ.get("LOCAL_RANK", environ["RANK"]))
        if world > 1 and master[1] == "0":
            # Each rank would wait at a free port of its own.
            raise ConfigError(
                f"MASTER_PORT=0 is no port at which {world} ranks can meet: start torchrun with "
                "--standalone, or give --master_port a free port such as 29500"
            )
        return Ranks(rank, world, local_rank, int(local), master)
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        # Its "simple launcher" (distributed_type MULTI_CPU, or --cpu) starts one process without
        # a rank, however many were asked for: training on one would be silently wrong.
        raise ConfigError(
            "accelerate announced several processes but started one without a rank (its MULTI_CPU "
            "launcher does this): use distributed_type: MULTI_GPU with use_cpu: true, DEEPSPEED, "
            "or configs/accelerate/*.yaml"
        )
    if "SLURM_PROCID" in environ:
        world = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
        if world > 1:
            return _slurm_ranks(environ, world)
    return Ranks()


def _slurm_ranks(environ: Mapping[str, str], world: int) -> Ranks:
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    several = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1"))) > 1
    address = first_host(nodes) if several and nodes else "127.0.0.1"
    port = 10000 + int(environ.get("SLURM_JOB_ID", "0")) % 50000
    counts = tasks_per_node(
        environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", str(world)))
    )
    node = int(environ.get("SLURM_NODEID", "0"))
    return Ranks(
        rank=int(environ["SLURM_PROCID"]),
        world=world,
        local_rank=int(environ.get("SLURM_LOCALID", "0")),
        local_world=counts[node] if node < len(counts) else 1,
        master=(environ.get("MASTER_ADDR", address), environ.get("MASTER_PORT", str(port))),
    )


def first_host(nodes: str) -> str:
    """First name of SLURM's compressed list: `gpu[07-09,12],login` -> `gpu07`."""
    name = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if name is None:
        raise ConfigError(f"cannot read SLURM's node list {nodes!r}; set MASTER_ADDR")
    return "".join(part or "" for part in name.groups())


def tasks_per_node(text: str) -> list[int]:
    """SLURM's compressed counts: `4(x2),3` -> [4, 4, 3]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]


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

    _export(ranks)
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, timeout=wait, **_meeting_place(ranks))
    except (dist.DistError, TimeoutError, ValueError) as error:
        address = ":".join(ranks.master or ())
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"rank {ranks.rank} of {ranks.world} could not meet the others at {address} within "
            f"{timeout_s:g} s ({reason}); were all ranks started, is the port free?"
        ) from None
    global _met_others
    _met_others = True
    yield
    # Not in a finally: after an error the other ranks are elsewhere and would never come here.
    dist.barrier()
    dist.destroy_process_group()


def _export(ranks: Ranks) -> None:
    """What libraries below look for, whoever started us."""
    places = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world, "LOCAL_RANK": ranks.local_rank,
              "LOCAL_WORLD_SIZE": ranks.local_world}  # fmt: skip
    os.environ.update({key: str(value) for key, value in places.items()})
    if ranks.master is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = ranks.master


def _meeting_place(ranks: Ranks) -> dict[str, Any]:
    from torch._C._distributed_c10d import HashStore

    if ranks.master is None:  # alone: no port, so that two such jobs never collide
        return {"store": HashStore(), "rank": 0, "world_size": 1}
    return {"init_method": "env://"}


def run_command(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a command; its exit code. A LongfoldError becomes one line on stderr and code 2.

    Every rank leaves at once, the launcher ends the others. Rank 0 speaks first; another rank
    speaks only if it is still there a moment later, that is, if rank 0 does not share the error.
    """
    try:
        command(arguments)
        if _met_others:
            # A thread of gloo that lets go of its last tensor while the interpreter shuts down
            # aborts the process, rarely and on busy machines: no shutting down.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        return 0
    except LongfoldError as error:
        return _fail(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(_lost_rank(error) or traceback.format_exc().rstrip(), 1)


def _lost_rank(error: Exception) -> str | None:
    """One line where the cause is another rank, whose own message says more than our traceback."""
    text = str(error)
    if re.search(r"[Cc]onnection (closed|reset) by peer", text):
        return "error: another rank ended first; its message says why"
    if re.search(r"[Tt]imed out (waiting|after)", text):
        return (
            f"error: another rank did not come within parallel.timeout_s ({text.splitlines()[0]}); "
            "its message, if any, says why"
        )
    return None


def _fail(text: str, code: int) -> int:
    with contextlib.suppress(LongfoldError):
        ranks = discover()
        if ranks.rank > 0:
            time.sleep(_PATIENCE_S)
            text = f"rank {ranks.rank}: {text}"
        if ranks.world > 1:
            _print_line(text)
            # No destructors: those of a process group may wait for ranks that never come.
            os._exit(code)
    _print_line(text)
    return code


def _print_line(text: str) -> None:
    sys.stdout.flush()
    # One write, so that lines of several ranks do not mix.
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
