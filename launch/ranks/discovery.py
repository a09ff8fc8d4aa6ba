"""Rank and world under any launcher.

One module runs under `python -m`, torchrun, accelerate, deepspeed, srun and mpirun; all that
differs between them is read from the environment here and nowhere else. torchrun's variables win
over SLURM's, SLURM's over MPI's; each reader says what torchrun would have said.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.errors import ConfigError
from launch.ranks.launchers import mpi_variables, slurm_variables, tasks_not_started


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
    """Rank and world from torchrun, accelerate, deepspeed, srun, mpirun, or one plain process.

    Raises:
        ConfigError: the variables leave the place open, contradict each other, or give no port to
            meet at; or the launcher announced several processes and started only this one.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _ranks(environ)
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        # Its "simple launcher" (distributed_type MULTI_CPU, or --cpu) starts one process without
        # a rank, however many were asked for: training on one would be silently wrong.
        raise ConfigError(
            "accelerate announced several processes but started one without a rank (its MULTI_CPU "
            "launcher does this): use distributed_type: MULTI_GPU with use_cpu: true, DEEPSPEED, "
            "or configs/accelerate/*.yaml"
        )
    theirs = slurm_variables(environ) or mpi_variables(environ)
    for key, missing, alone in (("RANK", "WORLD_SIZE", "0"), ("WORLD_SIZE", "RANK", "1")):
        own = theirs.get(key, alone)
        if environ.get(key, own) != own:
            raise ConfigError(
                f"{key}={environ[key]} is set, but {missing} is not, and without them this would "
                f"be {key} {own}: set both, or unset {key}"
            )
    if not theirs:
        return Ranks()
    return _ranks(theirs | {k: environ[k] for k in ("MASTER_ADDR", "MASTER_PORT") if k in environ})


def _ranks(variables: Mapping[str, str]) -> Ranks:
    """From torchrun's variables, or those of a launcher that sets the same."""
    rank, world = (_number(variables, key) for key in ("RANK", "WORLD_SIZE"))
    address = variables.get("MASTER_ADDR", "127.0.0.1")
    port = variables.get("MASTER_PORT", "29500")
    size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in variables else "LOCAL_SIZE"
    local_world = _number(variables, size) if size in variables else world
    here = address in ("localhost", "::1") or address.startswith("127.")
    if "LOCAL_RANK" in variables:
        local_rank = _number(variables, "LOCAL_RANK")
    elif local_world == 1:
        local_rank = 0
    elif local_world == world and (size in variables or here):
        local_rank = rank
    else:
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={world} on several machines (MASTER_ADDR={address}) do "
            "not say which of its machine's ranks this is: set LOCAL_RANK (0 where each machine "
            "has one process)"
        )
    if not (0 <= rank < world and 0 <= local_rank < local_world):
        raise ConfigError(
            f"rank {rank} of {world}, on its machine {local_rank} of {local_world}, cannot be: "
            "ranks count from 0; check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    if world > 1 and port == "0":
        # Each rank would wait at a free port of its own.
        raise ConfigError(
            f"MASTER_PORT=0 is no port at which {world} ranks can meet: start torchrun with "
            "--standalone, or give --master_port a free port such as 29500"
        )
    return Ranks(rank, world, local_rank, local_world, (address, port))


def _number(variables: Mapping[str, str], key: str) -> int:
    try:
        return int(variables[key])
    except ValueError:
        raise ConfigError(f"{key}={variables[key]!r} is no whole number") from None


def require_ranks(ranks: Ranks, alone: bool, environ: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError for one process where SLURM was asked for several, unless it is `alone`
    on purpose; for commands that srun should have started."""
    tasks = 0 if "RANK" in environ else tasks_not_started(environ)
    if ranks.world == 1 and tasks > 1 and not alone:
        raise ConfigError(
            f"SLURM was asked for {tasks} tasks, and this is one process that srun did not start: "
            "write srun before the command, or parallel.dp=1 parallel.sp=1 for one process"
        )
