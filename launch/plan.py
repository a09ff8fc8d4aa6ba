"""Foresee what a training run takes: python -m launch plan [what train takes] ranks=64 length=...

Everything that `train` takes says which run. Nothing of it is started: one rank's step runs here
with few tokens, in a world of as many ranks that exchanges nothing (scaling/cost/planner.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from data_pipeline.disk import write_atomically
from data_pipeline.errors import ConfigError, RunError
from launch.config.check import options_within
from launch.config.compose import command_line
from launch.config.settings import Config, mesh_sizes
from launch.ranks.discovery import discover
from launch.ranks.process import process_group
from launch.train import task_and_model


@dataclass
class PlanConfig(Config):
    ranks: Annotated[int, Ge(1)] = 2
    """Processes of the job."""
    length: Annotated[int, Ge(1)] | None = None
    """Tokens of a row; null: the longest sample of the task's training split."""
    output: str | None = None
    """Folder, such as a sweep's, that gets plan.json; its report then shows what was foreseen."""

    def __post_init__(self) -> None:
        if self.device == "cuda":
            raise ConfigError("device=cuda: plan foresees ranks on CPUs alone; say device=cpu")
        if self.train.precision == "float64":
            raise ConfigError("train.precision=float64: plan foresees float32 and bf16 alone")


def main(arguments: list[str]) -> None:
    """Print the memory of one rank by part."""
    config, _ = command_line(arguments, "plan", PlanConfig)
    import torch

    torch.set_num_threads(1)  # as a rank that shares its cores; the step here is a small one
    from data_pipeline.stream.stream import check_batches, check_lengths
    from scaling.cost.planner import Job, memory_by_part
    from scaling.parallel.mesh import check_sizes

    dp, sp = mesh_sizes(config.parallel, config.ranks)
    with options_within(config, "train", "parallel"):
        check_sizes(dp, sp, config.ranks)
        check_batches(config.train.batch_size, config.train.micro_batch_size, dp)
        task, model = task_and_model(config)
        check_lengths(task, "train", config.train.max_length)
    length = config.length or task.length("train", task.longest("train"))
    if not sp <= length <= config.train.max_length:
        raise ConfigError(
            f"length={length}: must lie in {sp} (a token a rank) ... {config.train.max_length} "
            "(train.max_length)"
        )
    job = Job(
        model,
        task,
        config.execution,
        length,
        rows=config.train.micro_batch_size,
        micro_batches=config.train.batch_size // (dp * config.train.micro_batch_size),
        sp=sp,
        world=config.ranks,
        zero_stage=config.engine.zero_stage if config.engine.name == "deepspeed" else 0,
        bf16=config.train.precision == "bf16",
    )
    load_what_a_rank_loads(config)
    parts = memory_by_part(job)
    title = f"a rank of {config.ranks} on a CPU (dp {dp}, sp {sp}), {job.rows} x {length:,} tokens:"
    sizes = parts | {"peak memory": sum(parts.values())}
    lines = [f"  {part:<28}{size / 2**20:>10,.0f} MiB" for part, size in sizes.items()]
    text = "\n".join([title, *lines])
    print(text)
    if config.output is not None:
        write_plan(Path(config.output), {"text": text, "ranks": config.ranks, "bytes": sizes})


def write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """plan.json, from which a report tells.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "plan.json", json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"output={folder}: cannot be written ({error.strerror}); choose another "
                       "folder") from error  # fmt: skip


def load_what_a_rank_loads(config: Config) -> None:
    """Libraries take memory before the first tensor does, DeepSpeed's at the first step."""
    import torch
    from torch import nn

    import scaling.train.loop  # noqa: F401
    from scaling.engine.build import build_engine

    if config.engine.name != "deepspeed":
        return
    with process_group(discover(), torch.device("cpu"), config.parallel.timeout_s, needed=True):
        engine = build_engine(
            "deepspeed",
            nn.Linear(1, 1),
            torch.optim.AdamW,
            gradient_clipping=1.0,
            micro_batch_size=1,
            accumulation=1,
            zero_stage=config.engine.zero_stage,
            environment={},
        )
        engine.backward(engine(torch.ones(1, 1)).sum())
        engine.step(0.0)
