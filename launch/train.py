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
from launch.config.compose import Config, check_choice, command_line, mesh_sizes, options_of
from launch.ranks.environment import (
    choose_device,
    discover,
    process_group,
    run_command,
    share_cores,
)

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
    from data_pipeline.tasks.registry import TASKS, build_task
    from scaling.models import MODELS, build
    from scaling.ops.tiles import set_execution
    from scaling.parallel.collectives import group_size
    from scaling.parallel.mesh import Mesh
    from scaling.runs.identity import Identity
    from scaling.train.loop import fit
    from scaling.train.report import claimed_together
    from scaling.train.settings import OptimSettings, TrainSettings

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
    identity = Identity(
        {
            "task": (TASKS[config.task["name"]], config.task),
            "model": (MODELS[config.model["name"]], config.model),
            "train": (TrainSettings, dataclasses.asdict(config.train)),
            "optim": (OptimSettings, dataclasses.asdict(config.optim)),
        }
    )
    folder = Path(config.runs) / config.name
    with claimed_together(folder, identity, dataclasses.asdict(config)) as run:
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
