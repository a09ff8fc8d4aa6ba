"""What SLURM's and mpirun's variables say of a process, in torchrun's words."""

import re
from collections.abc import Mapping

from data_pipeline.errors import ConfigError

OPEN_MPI = {"RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
            "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
            "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE"}  # fmt: skip
HYDRA = {"RANK": "PMI_RANK", "WORLD_SIZE": "PMI_SIZE", "LOCAL_RANK": "MPI_LOCALRANKID",
         "LOCAL_WORLD_SIZE": "MPI_LOCALNRANKS"}  # fmt: skip
"""The process manager of MPICH and Intel MPI."""


def mpi_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """As far as mpirun's say them; nothing without mpirun or for one rank.

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
    """For a task among several that srun started; else nothing.

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
