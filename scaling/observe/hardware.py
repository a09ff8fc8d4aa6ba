"""What torch knows of the machine."""

from typing import Any

import torch
import torch.distributed as dist


def hardware() -> dict[str, Any]:
    """For `describe_environment`."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
    }
