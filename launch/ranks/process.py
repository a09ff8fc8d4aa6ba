"""A rank as a process: its cores and device, the process group around its work, how it ends."""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from data_pipeline.errors import ConfigError, LongfoldError
from launch.ranks.discovery import Ranks, discover

if TYPE_CHECKING:
    import torch

_PATIENCE_S = 3.0
"""Longer than a launcher needs to end the other ranks after one has failed."""

_met_others = False
"""Whether this process has had a process group."""


def share_cores(ranks: Ranks, environ: MutableMapping[str, str] = os.environ) -> None:
    """Threads of one rank = cores / ranks here, and large tensors on the CPU in huge pages, unless
    chosen; before torch is imported."""
    # A large block comes fresh from the system, whose 4 KiB pages take longer than the arithmetic.
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if ranks.local_world > 1 and "OMP_NUM_THREADS" not in environ:
        cores = len(os.sched_getaffinity(0))
        environ["OMP_NUM_THREADS"] = str(max(1, cores // ranks.local_world))


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
    from torch.distributed import distributed_c10d as c10d

    places = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world, "LOCAL_RANK": ranks.local_rank,
              "LOCAL_WORLD_SIZE": ranks.local_world}  # fmt: skip
    os.environ.update({key: str(value) for key, value in places.items()})  # DeepSpeed reads them
    meeting: dict[str, Any] = {"init_method": "env://"}
    if ranks.master is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = ranks.master
    else:  # alone: no port, so that two such jobs never collide
        meeting = {"store": HashStore(), "rank": 0, "world_size": 1}
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    # Groups made later, by us and by DeepSpeed, would not inherit it.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(c10d, name, timeout)
    try:
        dist.init_process_group(backend, timeout=timeout, **meeting)
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
    dist.barrier(device_ids=None if device.index is None else [device.index])
    dist.destroy_process_group()


def run_command(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a command; its exit code. A LongfoldError becomes one line on stderr and code 2.

    Every rank leaves at once, the launcher ends the others. Rank 0 speaks first; another rank
    speaks only if it is still there a moment later, that is, if rank 0 does not share the error.
    """
    code, text = 0, ""
    try:
        command(arguments)
    except LongfoldError as error:
        code, text = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, text = 130, "interrupted"
    except BrokenPipeError:  # whoever read our output has enough
        _silence(sys.stdout)
        code = 1
    except Exception as error:
        said = _lack_of_memory(error) or lost_rank(error)
        code, text = 1, said or traceback.format_exc().rstrip()
    return _leave(code, text)


class Unheard:
    """An output whose reader may go, as a launcher's pipe does with it; the command goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            _silence(self._stream)
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _silence(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _lack_of_memory(error: Exception) -> str | None:
    if "torch" not in sys.modules:
        return None
    from scaling.observe.memory import out_of_memory

    if lack := out_of_memory(error):
        return (f"error: {lack}; python -m launch plan with the same arguments says what takes "
                "how much, and with search=true memory_gib=... what fits")  # fmt: skip
    return None


def lost_rank(error: Exception) -> str | None:
    """One line where the cause is another rank, whose own message says more than our traceback."""
    text = str(error)
    if re.search(r"[Cc]onnection (closed|reset) by peer|Broken pipe", text):
        return "error: another rank ended first; its message says why"
    if re.search(r"Connection timed out|No route to host|(Network|Host) is unreachable", text):
        return (f"error: another rank's machine is out of reach ({text.splitlines()[0][:200]}); "
                "mend its network, or leave it out, and start the same command again")  # fmt: skip
    if re.search(r"[Tt]imed out (waiting|after)", text):
        return (
            f"error: another rank did not come within parallel.timeout_s ({text.splitlines()[0]}); "
            "its message, if any, says why"
        )
    return None


def _leave(code: int, text: str) -> int:
    ranks = Ranks()
    with contextlib.suppress(LongfoldError):
        ranks = discover()
    if text and ranks.rank > 0:
        time.sleep(_PATIENCE_S)
        text = f"rank {ranks.rank}: {text}"
    sys.stdout.flush()
    sys.stderr.write(text + "\n" * bool(text))  # one write, so that lines of ranks do not mix
    sys.stderr.flush()
    if _met_others or (code and ranks.world > 1):
        # No destructors: those of a process group may wait for ranks that never come, and a thread
        # of gloo that lets go of its last tensor during a shutdown aborts the process, rarely.
        os._exit(code)
    return code
