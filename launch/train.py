"""Train a model on a task: the entry that every launcher runs.

python -m launch train [group=option] [key=value] ...          one process
torchrun | accelerate launch | deepspeed ... launch.train       the same, on many
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.check import options_of, options_within
from launch.config.compose import command_line
from launch.config.settings import Config, EvalConfig, PredictConfig, mesh_sizes
from launch.ranks.discovery import Ranks, discover, require_ranks
from launch.ranks.process import Unheard, choose_device, process_group, run_command, share_cores
from scaling.runs.log import RankLog
from scaling.train.stop import launcher_chain

if TYPE_CHECKING:
    import torch

    from data_pipeline.tasks.protocol import Task
    from scaling.models import Model


def main(arguments: list[str]) -> None:
    """Train a model on a task; every rank runs this."""
    launcher_chain()  # before anything slow: whoever started this rank may end at any moment
    ranks = discover()
    share_cores(ranks)  # the check of names is the first to import torch
    config, _ = command_line([*accelerate_overrides(), *arguments], "train", Config)
    # Where NCCL's flight recorder leaves what it has seen, when its watchdog ends a rank.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{config.runs}/{config.name}/ranks/nccl_")
    needed = config.engine.name == "deepspeed"
    with RankLog(ranks.rank) as log, on_ranks(ranks, config, needed) as device:
        train(config, device, log)


@contextlib.contextmanager
def on_ranks(
    ranks: Ranks, config: Config | EvalConfig | PredictConfig, needed: bool = False
) -> Iterator["torch.device"]:
    """This rank's device, inside the process group; see there what is `needed`. What is printed
    may find no reader."""
    require_ranks(ranks, alone=config.parallel.dp == config.parallel.sp == 1)
    device = choose_device(config.device, ranks)
    with (
        contextlib.redirect_stdout(Unheard(sys.stdout)),
        process_group(ranks, device, config.parallel.timeout_s, needed),
    ):
        yield device


def train(config: Config, device: "torch.device", log: RankLog) -> None:
    """Build task, mesh and model, and fit; inside the process group, where there is one."""
    import torch

    from data_pipeline.tasks.registry import TASKS
    from launch.ranks.watch import Watch
    from scaling.models import MODELS
    from scaling.ops.tiles import set_execution
    from scaling.parallel.collectives import group_rank, group_size
    from scaling.parallel.mesh import Mesh
    from scaling.runs.identity import Identity
    from scaling.train.loop import fit
    from scaling.train.report import claimed_together
    from scaling.train.settings import OptimSettings, TrainSettings

    with options_within(config, "parallel"):
        mesh = Mesh(*mesh_sizes(config.parallel, group_size(None)))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.train.seed)  # the same parameters on every rank
    task, model = task_and_model(config)
    set_execution(model, config.execution)
    if group_rank(None) == 0:
        print(size_of(model, config.model), flush=True)
    identity = Identity(
        {
            "task": (TASKS[config.task["name"]], config.task),
            "model": (MODELS[config.model["name"]], config.model),
            "train": (TrainSettings, dataclasses.asdict(config.train)),
            "optim": (OptimSettings, dataclasses.asdict(config.optim)),
        }
    )
    folder = Path(config.runs) / config.name
    with (
        claimed_together(folder, identity, dataclasses.asdict(config)) as run,
        log.written_to(run, f"{device.type}, one of {group_size(None)} rank(s)"),
        options_within(config, "train", "optim", "engine", "parallel", "model"),
    ):
        watch = Watch(run, config.parallel.timeout_s, by_device=device.type == "cuda")
        fit(model, task, mesh, config.train, config.optim, config.engine, run, device, watch)


def task_and_model(config: Config | EvalConfig) -> "tuple[Task, Model]":
    """The bundled data's store is built if need be; the model draws its first parameters."""
    from data_pipeline.prepare import ensure_bundled
    from data_pipeline.tasks.denoising import BUNDLED
    from data_pipeline.tasks.registry import build_task
    from scaling.models import build
    from scaling.parallel.collectives import first_rank_says

    if config.task.get("store") == BUNDLED:
        first_rank_says(lambda: ensure_bundled(BUNDLED))
    with options_within(config, "task"):
        task = build_task(config.task["name"], **options_of(config.task))
    channels = {"vectors": task.vectors, "scalars": task.scalars}
    with options_within(config, "model"):
        model = build(config.model["name"], **channels, **options_of(config.model))
        if len(lengths := task.lengths("train")):
            model.check_longest(int(lengths.max()))
    return task, model


def size_of(model: "Model", options: Mapping[str, Any]) -> str:
    """Its number of parameters, and the widths beside it where `parameters` is missed by 3 %."""
    from scaling.models import reachable_widths

    count, wanted = sum(p.numel() for p in model.parameters()), options.get("parameters")
    said = f"{options['name']}: {count:,} parameters"
    if wanted and abs(count - wanted) > 0.03 * wanted:
        others = options_of(options) | {"vectors": model.vectors, "scalars": model.scalars}
        del others["parameters"]
        width, nearest = reachable_widths(options["name"], wanted, others)
        near = " and ".join(f"{width}={value} has {n:,}" for value, n in nearest.items())
        said += f"; {wanted:,} are out of reach: {near}"
    return said


def accelerate_overrides(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The ZeRO stage that `accelerate launch` was given, for the command line's own to win over.

    The engine reads accelerate's other keys, and refuses what contradicts the configuration.
    """
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "auto")
    if path := environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        with contextlib.suppress(OSError, ValueError):  # the engine says so
            stage = json.loads(Path(path).read_text()).get("zero_optimization", {}).get("stage")
    return [] if stage in (None, "auto") else [f"engine.zero_stage={stage}"]


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
