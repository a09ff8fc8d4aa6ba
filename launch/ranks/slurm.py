"""What SLURM's variables say of a process; srun sets them, and no others."""

import re
from collections.abc import Mapping

from data_pipeline.errors import ConfigError
from launch.ranks.mpi import mpi_size


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task among several that srun started; else nothing.

    A batch script, and a shell by srun, are one process. So are the daemons that mpirun starts by
    srun: its ranks are more than the step's tasks.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" not in environ or tasks == "1" or tasks_not_started(environ) > 1:
        return {}
    if int(mpi_size(environ) or 0) > int(environ.get("SLURM_STEP_NUM_TASKS", 1 << 60)):
        return {}
    variables = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(10000 + int(environ.get("SLURM_JOB_ID", "0")) % 50000),
    }
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", tasks))
    counts, node = tasks_per_node(per_node), int(environ.get("SLURM_NODEID", "0"))
    if node < len(counts):
        variables["LOCAL_WORLD_SIZE"] = str(counts[node])
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST"))
    several = environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")) != "1"
    if nodes and several and "MASTER_ADDR" not in environ:
        variables["MASTER_ADDR"] = first_host(nodes)
    return variables


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
