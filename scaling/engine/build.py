"""The engine that a configuration names."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from data_pipeline.errors import ConfigError
from scaling.engine.base import Engine
from scaling.engine.ddp import DistributedDataParallelEngine
from scaling.engine.deepspeed_config import check_launcher, deepspeed_config
from scaling.parallel.collectives import Group, group_size


def build_engine(
    name: Literal["ddp", "deepspeed"],
    module: nn.Module,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    gradient_clipping: float,
    micro_batch_size: int,
    accumulation: int,
    precision: str = "float32",
    zero_stage: int = 1,
    deepspeed: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
    group: Group = None,
) -> Engine:
    """The engine of that name around a module whose parameters are the same on every rank.

    Args:
        gradient_clipping: largest global gradient norm; 0 does not clip.
        micro_batch_size, accumulation: rows a rank holds at once, and how often it does before a
            step; DeepSpeed wants to know.
        precision: float64 works with ddp alone.
        deepspeed: further DeepSpeed keys.
        environment: where `accelerate launch` leaves its choices.
        group: the ranks that train together; None is the world.

    Raises:
        ConfigError: a combination that cannot work, or a launcher that was told otherwise.
    """
    check_launcher(name, precision, environment)
    optimizer = make_optimizer(module.parameters())
    if name == "ddp":
        return DistributedDataParallelEngine(module, optimizer, gradient_clipping, group)
    if precision == "float64":
        raise ConfigError(
            "engine.name = 'deepspeed' keeps float32 master weights, so precision = "
            "'float64' would be a lie; say engine=ddp"
        )
    from scaling.engine.deepspeed import DeepSpeedEngine

    ours = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * group_size(group),
        # Always written: DeepSpeed's default clips at 1.
        "gradient_clipping": gradient_clipping,
        "zero_optimization": {"stage": zero_stage},
    }
    config = deepspeed_config(ours, deepspeed or {}, environment)
    # DeepSpeed's own half a billion elements would be the largest buffers of a small model.
    bucket = min(2 * sum(p.numel() for p in module.parameters()), 50_000_000)  # even
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        config["zero_optimization"].setdefault(key, bucket)
    return DeepSpeedEngine(module, optimizer, config, group)
