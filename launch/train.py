"""Train a model on a task: the entry that every launcher runs.

python -m launch train [group=option] [key=value] ...          one process
torchrun | accelerate launch | deepspeed ... launch.train       the same, on many
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import ConfigError
from launch.config.check import check_choice, options_of
from launch.config.compose import command_line
from launch.config.settings import Config, mesh_sizes
from launch.ranks.discovery import discover
from launch.ranks.exit import run_command
from launch.ranks.group import choose_device, process_group, share_cores

if TYPE_CHECKING:
    import torch


def main(arguments: list[str]) -> None:
    """Train a model on a task; every rank runs this."""
    ranks = discover()
    share_cores(ranks)  # the check of names is the first to import torch
    about = "Train a model on a task."
    config, overrides = command_line(arguments, "train", Config, about, check=check_names)
    follow_accelerate(config, overrides)
    device = choose_device(config.device, ranks)
    uses_deepspeed = config.engine.name == "deepspeed"
    if uses_deepspeed and device.type == "cpu":
        from launch.ranks.extension import require_extension

        require_extension()
    with process_group(ranks, device, config.parallel.timeout_s, needed=uses_deepspeed):
        train(config, device)


def train(config: Config, device: "torch.device") -> None:
    """Build task, mesh and model, and fit; inside the process group, where there is one."""
    import torch

    from data_pipeline.prepare import ensure_bundled
    from data_pipeline.tasks.denoising import BUNDLED
    from data_pipeline.tasks.registry import build_task
    from scaling.models import build
    from scaling.ops.tiles import set_execution
    from scaling.parallel.collectives import group_size
    from scaling.parallel.mesh import Mesh
    from scaling.train.loop import fit
    from scaling.train.run import RunDirectory

    mesh = Mesh(*mesh_sizes(config.parallel, group_size(None)))
    if config.task.get("store") == BUNDLED:
        if mesh.rank == 0:
            ensure_bundled(BUNDLED)
        if mesh.world > 1:
            torch.distributed.barrier()
    task = build_task(config.task["name"], **options_of(config.task))
    torch.manual_seed(config.train.seed)  # every rank begins with the same parameters
    model = build(
        config.model["name"],
        vectors=task.vectors,
        scalars=task.scalars,
        **options_of(config.model),
    )
    set_execution(model, config.execution)
    values = dataclasses.asdict(config)
    identity = {key: values[key] for key in ("task", "model", "train", "optim")}
    run = RunDirectory(Path(config.runs) / config.name, identity, values)
    fit(model, task, mesh, config.train, config.optim, config.engine, run, device)


def check_names(config: Config) -> None:
    """Task and model sections against the constructors that they name."""
    from data_pipeline.tasks.registry import TASKS
    from scaling.models import MODELS

    check_choice("task", config.task, TASKS)
    check_choice("model", config.model, MODELS, given=("vectors", "scalars"))


def follow_accelerate(
    config: Config, overrides: Sequence[str], environ: Mapping[str, str] = os.environ
) -> None:
    """Take the ZeRO stage that `accelerate launch` was given, unless the command line says one.

    The engine reads accelerate's other keys, and refuses one that contradicts the configuration.
    """
    if any(each.lstrip("+").startswith("engine.zero_stage=") for each in overrides):
        return
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if path := environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        try:
            stage = json.loads(Path(path).read_text()).get("zero_optimization", {}).get("stage")
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read accelerate's DeepSpeed file {path}: {error}") from None
    if stage not in (None, "auto"):
        config.engine.zero_stage = int(stage)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
