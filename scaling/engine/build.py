"""The engine that a configuration names, and DeepSpeed's own configuration.

That is one out of ours, the user's keys and the file that accelerate names. Ours decides. A foreign
key that says the same, or "auto", is welcome; one that says something else is an error that names
both values; one that we do not set is passed on.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn
from torch.optim import Optimizer

from data_pipeline.errors import ConfigError
from scaling.engine.base import DistributedDataParallelEngine, Engine
from scaling.engine.late import import_dynamo_late
from scaling.parallel.collectives import Group, group_size

# DeepSpeed believes every rank to be data-parallel: its own switches for sequence parallelism
# scale gradients by the number of sequence ranks or let ranks drift apart.
FORBIDDEN = {
    "optimizer": "choose it by optim.*",
    "scheduler": "choose it by optim.*",
    "sequence_parallel_size": "sequence parallelism is parallel.sp, DeepSpeed must not know it",
    "data_parallel_size": "data parallelism is parallel.dp",
    "tensor_parallel": "there is no tensor parallelism here",
}
# What our values are called where the user writes them.
OUR_NAMES = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size / (dp · micro_batch_size)",
    "train_batch_size": "DeepSpeed's count (every rank a data-parallel one)",
    "gradient_clipping": "optim.gradient_clipping",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_allow_untested_optimizer": "Longfold",
    "fp16.enabled": "precision",
    "bf16.enabled": "precision",
}
ENVIRONMENT = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_optimization.stage",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
}


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
    import_dynamo_late()
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


def deepspeed_config(
    ours: Mapping[str, Any], user: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        ours: what this run has decided, nested as DeepSpeed's JSON is.
        user: further keys (`engine.deepspeed_config`).
        environment: where `accelerate launch` leaves its choices.

    Raises:
        ConfigError: a key contradicts ours, or is about something that DeepSpeed must not know.
    """
    config = {
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        **deepcopy(dict(ours)),
    }
    for source, keys in _foreign(user, environment):
        _join(config, keys, source)
    return config


def _join(config: dict[str, Any], keys: Mapping[str, Any], source: str, within: str = "") -> None:
    """Adds a source's keys to what is there already, which they may not contradict."""
    for name, value in keys.items():
        key = within + name
        if value == "auto":
            continue
        if key in FORBIDDEN:
            raise ConfigError(f"{source} sets {key}; leave it out: {FORBIDDEN[key]}")
        if isinstance(value, Mapping) and isinstance(config.setdefault(name, {}), dict):
            _join(config[name], value, source, f"{key}.")
        elif config.setdefault(name, value) != value:
            ours = OUR_NAMES.get(key, "another source's")
            raise ConfigError(
                f"{source} says {key} = {value!r}, but {ours} = {config[name]!r}; make them "
                'equal, or write "auto" there'
            )


def check_launcher(engine: str, precision: str, environment: Mapping[str, str]) -> None:
    """What `accelerate launch` was told must be what this run does.

    Raises:
        ConfigError: it names another engine or another precision; both are named.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true" and engine != "deepspeed":
        raise ConfigError(
            f"accelerate was told to use DeepSpeed, but engine.name = {engine!r}; "
            "say engine=deepspeed, or launch without --use_deepspeed"
        )
    check_precision(precision, environment)


def check_precision(precision: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError if `accelerate launch` was told another precision."""
    mixed = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed != "no" and mixed != precision:
        raise ConfigError(
            f"accelerate says mixed_precision = {mixed!r}, but precision = {precision!r}; "
            "say --mixed_precision no, or precision=bf16"
        )


def _foreign(
    user: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every source of keys besides our own, by the name a user knows it by."""
    yield "engine.deepspeed_config", user
    if path := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        try:
            yield f"accelerate's deepspeed_config_file {path!r}", json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"accelerate's deepspeed_config_file {path!r} cannot be read ({error}); "
                "correct the path or the JSON"
            ) from error
    for variable, key in ENVIRONMENT.items():
        if (value := environment.get(variable, "none")) != "none":
            with suppress(ValueError):  # numbers, true, false; else text
                value = json.loads(value)
            for name in reversed(key.split(".")):
                value = {name: value}
            yield f"accelerate ({variable})", cast(dict[str, Any], value)
