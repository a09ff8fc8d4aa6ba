"""Rank and world under any launcher.

One module runs under `python -m`, torchrun, accelerate, deepspeed, srun and mpirun; all that
differs between them is read from the environment here and nowhere else. torchrun's variables win
over SLURM's, SLURM's over MPI's; each reader says what torchrun would have said.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.errors import ConfigError

OPEN_MPI = {"RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
            "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
            "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE"}  # fmt: skip
HYDRA = {"RANK": "PMI_RANK", "WORLD_SIZE": "PMI_SIZE", "LOCAL_RANK": "MPI_LOCALRANKID",
         "LOCAL_WORLD_SIZE": "MPI_LOCALNRANKS"}  # fmt: skip
"""The process manager of MPICH and Intel MPI."""


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


def mpi_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, as far as mpirun's say them; nothing without mpirun or for one rank.

    Raises:
        ConfigError: several machines, and MASTER_ADDR does not say where the ranks meet.
    """
    names = OPEN_MPI if OPEN_MPI["WORLD_SIZE"] in environ else HYDRA
    variables = {ours: environ[theirs] for ours, theirs in names.items() if theirs in environ}
    world, local_world = (variables.get(key) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world in (None, "1"):
        return {}
    if local_world != world and "MASTER_ADDR" not in environ:
        give = "-x MASTER_ADDR=" if names is OPEN_MPI else "-genv MASTER_ADDR "
        raise ConfigError(f"mpirun started {world} ranks, {local_world or 'no known number'} of "
                          "them on this machine, and they cannot know where to meet: give it the "
                          f"first machine's name, mpirun {give}NAME")  # fmt: skip
    return variables


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task among several that srun started; else nothing.

    A batch script, and a shell by srun, are one process. So are the daemons that mpirun starts by
    srun: its ranks are more than the step's tasks.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" not in environ or tasks == "1" or tasks_not_started(environ) > 1:
        return {}
    mpi_ranks = environ.get(OPEN_MPI["WORLD_SIZE"], environ.get(HYDRA["WORLD_SIZE"], "0"))
    if "SLURM_STEP_NUM_TASKS" in environ and int(mpi_ranks) > int(tasks):
        return {}
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", tasks))
    counts, node = tasks_per_node(per_node), int(environ.get("SLURM_NODEID", "0"))
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    several = nodes and len(counts) > 1 and "MASTER_ADDR" not in environ
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(counts[node]) if node < len(counts) else tasks,
        "MASTER_ADDR": first_host(nodes) if several else "127.0.0.1",
        "MASTER_PORT": str(10000 + int(environ.get("SLURM_JOB_ID", "0")) % 50000),
    }


def tasks_not_started(environ: Mapping[str, str]) -> int:
    """Tasks of the job, for a process that srun did not start (a batch script); else 0."""
    started = "SLURM_STEP_NUM_TASKS" in environ or environ.get("SLURM_PROCID", "0") != "0"
    return 0 if started else int(environ.get("SLURM_NTASKS", "0"))


def first_host(nodes: str) -> str:
    """First name of SLURM's compressed list: `gpu[07-09,12],login` -> `gpu07`.

    Raises:
        ConfigError: the list is not whole.
    """
    # Names alone: no group of ClusterShell's configuration.
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    first = re.split(r",(?![^\[]*\])", nodes)[0]  # NodeSet sorts what SLURM has put in order
    try:
        if NodeSet(nodes, resolver=RESOLVER_NOGROUP):
            return str(NodeSet(first, resolver=RESOLVER_NOGROUP)[0])
    except NodeSetException:
        pass
    raise ConfigError(f"cannot read SLURM's node list {nodes!r}; set MASTER_ADDR to the first node")


def tasks_per_node(text: str) -> list[int]:
    """SLURM's compressed counts: `4(x2),3` -> [4, 4, 3]."""
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        raise ConfigError(f"cannot read SLURM's tasks per node {text!r}")
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]


def who(ranks: list[int], hosts: Mapping[int, str]) -> str:
    """Ranks and their machines: rank 3 (node1), ranks 0-3, 8 (node1, node2)."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    numbers = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    machines = list(dict.fromkeys(hosts[rank] for rank in sorted(ranks) if rank in hosts))
    more = ", ..." if len(machines) > 4 else ""
    where = f" ({', '.join(machines[:4])}{more})" if machines else ""
    return f"rank{'s' * (len(ranks) > 1)} {numbers}{where}"
