"""How much memory this process has held at most, and on what hardware."""

import ctypes
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LARGE_BLOCK = 4 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of malloc.h."""


def hardware() -> dict[str, Any]:
    """What torch knows of the machine, for `describe_environment`."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
    }


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: of CUDA's allocator, or resident memory of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> int:
    """Forgets the peak where the system lets us (CUDA, Linux); returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_bytes(device)
    return resident_bytes()


def resident_bytes() -> int:
    """What this process holds now, of whatever kind; 0 where the system does not say."""
    return _status("VmRSS")


def return_large_blocks() -> None:
    """Has glibc's malloc give large blocks back when they are freed, for good; elsewhere nothing.

    By default it learns to keep blocks of up to 32 MiB on its heap, where they leave holes: the
    memory of a step would follow its history instead of its tokens. Tiles stay on the heap.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, LARGE_BLOCK)
    _glibc("mallopt", _M_TRIM_THRESHOLD, LARGE_BLOCK)


def out_of_memory(error: Exception) -> str | None:
    """What a device or the system said when it had no more; None: the error is another."""
    text = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
    if isinstance(error, MemoryError) or re.search(r"out of memory|[Cc]an't allocate memory", text):
        return f"out of memory: {text or 'the system has no more'}"
    return None


def trim_heap() -> None:
    """Gives back what glibc's heap holds without need; elsewhere nothing."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    if call := getattr(ctypes.CDLL(None), function, None):
        call(*arguments)


def _status(key: str) -> int:
    """A size from the kernel's account of this process, 0 where there is none."""
    account = Path("/proc/self/status")
    found = re.search(rf"{key}:\s*(\d+)", account.read_text()) if account.exists() else None
    return int(found[1]) << 10 if found else 0
