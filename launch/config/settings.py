"""The configuration of a training run: which keys there are, and their defaults."""

import math
import typing
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import ConfigError
from launch.config.check import check_folder_name
from scaling.execution import Execution
from scaling.train.settings import EngineSettings, OptimSettings, TrainSettings


@dataclass
class ParallelSettings:
    dp: int | None = None
    """Data-parallel size; null: whatever sp leaves of the world."""
    sp: int | None = None
    """Ranks that share one sequence; null: all that dp leaves of the world."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for another before it gives up."""


@dataclass
class Config:
    """One training run: `python -m launch train`."""

    task: dict[str, Any]
    """`name` and the options of that task's constructor."""
    model: dict[str, Any]
    """`name` and the options of that model's constructor."""
    name: str = "train"
    """The run lives in <runs>/<name>; the same name resumes it."""
    runs: str = "runs"
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    execution: Execution = field(default_factory=Execution)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(config: Config) -> None:
    """First pass: values that no world size makes right."""
    train, optim, parallel = config.train, config.optim, config.parallel
    at_least_one = {
        **{f"train.{key}": getattr(train, key) for key in _COUNTS},
        "train.bucket_steps": train.bucket_steps,
        "parallel.dp": parallel.dp,
        "parallel.sp": parallel.sp,
    }
    for key, value in at_least_one.items():
        _require(value is None or value >= 1, key, value, "must be at least 1")
    _require(math.isfinite(optim.lr) and optim.lr > 0, "optim.lr", optim.lr, "must be positive")
    _require(0 <= config.engine.zero_stage <= 3, "engine.zero_stage", config.engine.zero_stage,
             "DeepSpeed has ZeRO stages 0, 1, 2 and 3")  # fmt: skip
    for key in ("weight_decay", "warmup_steps", "final_lr_ratio", "gradient_clipping"):
        value = getattr(optim, key)
        _require(value >= 0, f"optim.{key}", value, "must not be negative")
    betas = list(optim.betas)
    _require(all(0 <= b < 1 for b in betas), "optim.betas", betas, "must lie in [0, 1)")
    _require(1 <= parallel.timeout_s <= _LONGEST_WAIT_S, "parallel.timeout_s", parallel.timeout_s,
             f"must lie in 1 ... {_LONGEST_WAIT_S} seconds (30 days)")  # fmt: skip
    _require(0 <= train.profile_steps <= _LONGEST_TRACE, "train.profile_steps", train.profile_steps,
             f"must lie in 0 ... {_LONGEST_TRACE} (no viewer opens a longer trace)")  # fmt: skip
    _require(0 <= train.seed < 2**63, "train.seed", train.seed, f"must lie in 0 ... {2**63 - 1}")
    check_folder_name(config.name, "runs")


_COUNTS = ("steps", "batch_size", "micro_batch_size", "max_length", "log_every",
           "evaluate_every", "save_every", "keep")  # fmt: skip


_LONGEST_WAIT_S = 30 * 86400


_LONGEST_TRACE = 20


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value}: {rule}")


def mesh_sizes(parallel: ParallelSettings, world: int) -> tuple[int, int]:
    """(dp, sp) for that many ranks, null filled by what the other leaves; `Mesh` checks them."""
    dp, sp = parallel.dp, parallel.sp
    if sp is None:
        sp = max(world // dp, 1) if dp else world
    return (max(world // sp, 1) if dp is None else dp), sp
