"""How a model runs: settings that models, training and configuration share. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from data_pipeline.options import check_options

CPU_TILE_BYTES = 32 << 20
"""A tile stays in the caches."""
GPU_TILE_BYTES = 4 << 30
"""A tile keeps all processors busy for longer than it takes to start the next operator."""


@dataclass(frozen=True)
class Execution:
    """How a model runs. Nothing here changes a result beyond the order of sums."""

    tile_bytes: Annotated[int, Ge(1)] | None = None
    """Activations that a tile of tokens keeps, bytes. A part that keeps less in all is neither cut
    nor run again. null: 32 MiB on a CPU, 4 GiB on a GPU."""
    recompute_operators: bool = False
    """Keep nothing of an operator but its inputs, and run it again, exchanges too, for its
    gradient."""
    workspace_bytes: Annotated[int, Ge(1)] = 1 << 30
    """Buffers of the long convolutions' channels under way, bytes."""
    offload: Literal["none", "host", "file"] = "none"
    """Where waits what is kept for the backward pass: "host" (pinned memory, for GPUs), "file" (a
    memory-mapped temporary file), or "none": where it is."""
    compile: bool = False
    """Run the parts by torch.compile, where it works."""

    def __post_init__(self) -> None:
        check_options(self)

    def tile_budget(self, device_type: str) -> int:
        """Bytes that a tile may keep on such a device."""
        return self.tile_bytes or (CPU_TILE_BYTES if device_type == "cpu" else GPU_TILE_BYTES)


_simulated: ContextVar[str] = ContextVar("simulated", default="cuda")


@contextmanager
def simulated(device_type: str) -> Iterator[None]:
    """Inside, what runs on the meta device is cut as on such a device."""
    token = _simulated.set(device_type)
    try:
        yield
    finally:
        _simulated.reset(token)


def kind_of(device_type: str) -> str:
    """The device's type; of the meta device the one that it simulates, a GPU's by default."""
    return _simulated.get() if device_type == "meta" else device_type
