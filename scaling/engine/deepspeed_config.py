"""One DeepSpeed configuration out of ours, the user's keys and the file that accelerate names.

Ours decides. A foreign key that says the same, or "auto", is welcome; one that says something
else is an error that names both values; one that we do not set is passed on.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from data_pipeline.errors import ConfigError

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
