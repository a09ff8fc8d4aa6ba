"""Evaluate a trained model: python -m launch eval FOLDER [split=...] [store=...] [key=value] ...

torchrun | accelerate launch | deepspeed ... launch.eval       the same, on many ranks

The run may be going on: it is read without its lock, and its metrics.jsonl is left alone. No engine
takes part, whichever trained it: every rank holds all parameters, and no optimiser state.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.chains import SPLITS
from data_pipeline.errors import ConfigError, RunError
from launch.config.check import options_within
from launch.config.compose import command_line
from launch.config.settings import EvalConfig, mesh_sizes
from launch.ranks.discovery import discover
from launch.ranks.process import run_command, share_cores
from launch.train import on_ranks, task_and_model
from scaling.runs.exported import is_exported, read_config
from scaling.runs.folder import RunFolder, add_evaluation
from scaling.train.settings import EvaluationSettings

if TYPE_CHECKING:
    import torch

    from data_pipeline.tasks.protocol import Task
    from scaling.models import Model


def main(arguments: list[str]) -> None:
    """Evaluate a trained run; every rank runs this."""
    ranks = discover()
    share_cores(ranks)
    config, _ = command_line(arguments, "eval", EvalConfig, sections_of_run)
    with on_ranks(ranks, config) as device:
        evaluate(config, device)


def sections_of_run(paths: list[str]) -> dict[str, Any]:
    """What the run in a folder says of an evaluation.

    Raises:
        ConfigError: not one path.
        RunError: no training run lies there.
    """
    if len(paths) != 1:
        raise ConfigError(f"eval takes one path, the folder of a run, before the first key=value, "
                          f"and not {len(paths)}: python -m launch eval runs/NAME")  # fmt: skip
    run = trained_with(paths[0])
    known = EvaluationSettings.__dataclass_fields__
    train = {key: value for key, value in run["train"].items() if key in known}
    kept = {section: run[section] for section in ("task", "model", "execution") if section in run}
    return kept | {"train": train}


def trained_with(path: str) -> dict[str, Any]:
    """The configuration of the run in a folder, or of the one that a model there comes from.

    Raises:
        RunError: neither is there, it cannot be read, or it is no training run's.
    """
    exported = is_exported(Path(path))
    run = read_config(Path(path))["run"] if exported else RunFolder(path).config()
    for section in ("task", "model", "train"):
        if not isinstance(run.get(section), dict):
            raise RunError(f"{path} is no training run: its config.yaml has no {section}")
    return run


def evaluate(config: EvalConfig, device: "torch.device") -> None:
    """Print the errors on the split, and add their row; inside the process group, if any."""
    from scaling.checkpoint.checkpoint import load_exported, load_model
    from scaling.engine.build import check_precision
    from scaling.ops.tiles import set_execution
    from scaling.parallel.collectives import first_rank_says, group_size
    from scaling.parallel.mesh import Mesh
    from scaling.train.evaluate import Evaluation
    from scaling.train.objective import Objective
    from scaling.train.report import evaluation_lines

    check_precision(config.train.precision)
    with options_within(config, "parallel"):
        mesh = Mesh(*mesh_sizes(config.parallel, group_size(None)))
    run = RunFolder(config.paths[0])
    task, model = task_and_model_of_run(config, trained_with(config.paths[0]))
    set_execution(model, config.execution)
    objective = Objective.for_run(model, mesh, config.train, device)
    digest, fix = task.digest, "use the version of the program that wrote it"
    if config.store is not None:
        digest = None
        fix = (f"store={config.store} gives {task.vectors} vector and {task.scalars} scalar "
               "channels: choose one that gives those of the run's data")  # fmt: skip
    if is_exported(run.path):
        step, damage = load_exported(run.path, model, digest, fix), ""
    else:
        step, damage = load_model(run.checkpoints, model, digest, fix)
    with options_within(config, "train"):
        row = Evaluation(objective, objective, task, config.train).row(step, config.split)
    row |= {"store": config.task.get("store"), "precision": config.train.precision}

    def tell() -> None:
        if damage:
            print(f"{damage}: this is step {step} instead")
        baselines = task.baselines(config.split)
        print(*evaluation_lines(run.path, row, baselines), sep="\n")
        print(f"  added to {add_evaluation(run, row | {'baselines': baselines})}")

    first_rank_says(tell)


def task_and_model_of_run(config: EvalConfig, run: Mapping[str, Any]) -> "tuple[Task, Model]":
    """Those of a run of that configuration; on another store, if one was named.

    Raises:
        ConfigError: task or model contradict the run's, the store is of another kind, or the split
            is empty.
    """
    from data_pipeline.tasks.registry import TASKS
    from scaling.models import MODELS
    from scaling.runs.identity import Identity

    taken = TASKS[config.task["name"]], MODELS[config.model["name"]]
    identity = Identity({"task": (taken[0], config.task), "model": (taken[1], config.model)})
    if differing := identity.differences(run):
        raise ConfigError(f"{config.paths[0]} was trained otherwise: {'; '.join(differing)}; leave "
                          "that out (store=... chooses other data)")  # fmt: skip
    if config.store is None:
        task, model = task_and_model(config)
    else:
        options = taken[0].__dataclass_fields__
        config.task |= {"store": config.store} | ({"weights": None} if "weights" in options else {})
        try:
            if "store" not in options:
                raise ConfigError(f"{config.task['name']} makes its samples")
            task, model = task_and_model(config)
        except ConfigError as error:
            rule = f"store={config.store} does not suit the run's task: {error}"
            raise ConfigError(rule) from error
    sizes = {split: task.size(split) for split in SPLITS}
    if not sizes[config.split]:
        there = ", ".join(f"{split} ({size} samples)" for split, size in sizes.items() if size)
        raise ConfigError(f"split={config.split} is empty; there are {there}")
    return task, model


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
