"""Rank and world under any launcher.

One module runs under `python -m`, torchrun, accelerate, deepspeed and srun; all that differs
between them is read from the environment here and nowhere else.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.errors import ConfigError
from launch.ranks.slurm import slurm_place


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """Processes on this machine."""
    master: tuple[str, str] | None = None
    """Address and port where the ranks meet; None for one process."""


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Rank and world from torchrun, accelerate, deepspeed, srun, or one plain process.

    Raises:
        ConfigError: a launcher that announced several processes started only this one, or gave no
            port to meet at.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        world = int(environ["WORLD_SIZE"])
        local = environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", world))
        master = environ.get("MASTER_ADDR", "127.0.0.1"), environ.get("MASTER_PORT", "29500")
        rank, local_rank = int(environ["RANK"]), int(environ.get("LOCAL_RANK", environ["RANK"]))
        if world > 1 and master[1] == "0":
            # Each rank would wait at a free port of its own.
            raise ConfigError(
                f"MASTER_PORT=0 is no port at which {world} ranks can meet: start torchrun with "
                "--standalone, or give --master_port a free port such as 29500"
            )
        return Ranks(rank, world, local_rank, int(local), master)
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        # Its "simple launcher" (distributed_type MULTI_CPU, or --cpu) starts one process without
        # a rank, however many were asked for: training on one would be silently wrong.
        raise ConfigError(
            "accelerate announced several processes but started one without a rank (its MULTI_CPU "
            "launcher does this): use distributed_type: MULTI_GPU with use_cpu: true, DEEPSPEED, "
            "or configs/accelerate/*.yaml"
        )
    if "SLURM_PROCID" in environ:
        world = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
        if world > 1:
            return Ranks(**slurm_place(environ, world))
    return Ranks()
