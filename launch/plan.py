"""Foresee what a training run takes: python -m launch plan [what train takes] ranks=64 length=...

Everything that `train` takes says which run. Nothing of it is started: one rank's step runs here
with few tokens, in a world of as many ranks that exchanges nothing (scaling/curves/planner.py).
"""

import sys
from dataclasses import dataclass

from data_pipeline.errors import ConfigError
from launch.config import Config, command_line, mesh_sizes, options_of
from launch.train import check_names


@dataclass
class PlanConfig(Config):
    ranks: int = 2
    """Processes of the job."""
    length: int | None = None
    """Tokens of a row; null: the longest sample of the task's training split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("ranks", "length"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value}: must be at least 1")


def main(arguments: list[str]) -> None:
    """Print the memory of one rank by part."""
    about = "Foresee the peak memory of a training run, by part."
    config, _ = command_line(arguments, "plan", PlanConfig, about, check=check_names)
    import torch

    torch.set_num_threads(1)  # as a rank that shares its cores; the step here is a small one
    from data_pipeline.task import build_task
    from scaling.curves.planner import Job, memory_by_part
    from scaling.models import build
    from scaling.parallel.mesh import check_sizes

    dp, sp = mesh_sizes(config.parallel, config.ranks)
    check_sizes(dp, sp, config.ranks)
    task = build_task(config.task["name"], **options_of(config.task))
    model = build(
        config.model["name"],
        vectors=task.vectors,
        scalars=task.scalars,
        **options_of(config.model),
    )
    length = config.length or task.length("train", task.longest("train"))
    deepspeed = config.engine.name == "deepspeed"
    job = Job(
        model,
        task,
        config.execution,
        length,
        rows=config.train.micro_batch_size,
        micro_batches=-(-config.train.batch_size // (dp * config.train.micro_batch_size)),
        sp=sp,
        world=config.ranks,
        zero_stage=config.engine.zero_stage if deepspeed else 0,
    )
    load_what_a_rank_loads(deepspeed)
    parts = memory_by_part(job)
    total = sum(parts.values())
    print(f"a rank of {config.ranks} (dp {dp}, sp {sp}), {job.rows} x {length:,} tokens:")
    for part, size in parts.items():
        print(f"  {part:<28}{size / 2**20:>10,.0f} MiB")
    print(f"  {'peak memory':<28}{total / 2**20:>10,.0f} MiB")


def load_what_a_rank_loads(deepspeed: bool) -> None:
    """Libraries take memory before the first tensor does."""
    import scaling.train.loop  # noqa: F401

    if deepspeed:
        import deepspeed as _  # noqa: F401


if __name__ == "__main__":
    from launch.environment import run_command

    sys.exit(run_command(main, sys.argv[1:]))
