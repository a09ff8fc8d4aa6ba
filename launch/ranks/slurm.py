"""What SLURM's variables say of a process; srun sets them, and no others."""

import re
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import ConfigError


def slurm_place(environ: Mapping[str, str], world: int) -> dict[str, Any]:
    """The fields of `Ranks`."""
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    several = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1"))) > 1
    address = first_host(nodes) if several and nodes else "127.0.0.1"
    port = 10000 + int(environ.get("SLURM_JOB_ID", "0")) % 50000
    counts = tasks_per_node(
        environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", str(world)))
    )
    node = int(environ.get("SLURM_NODEID", "0"))
    return dict(
        rank=int(environ["SLURM_PROCID"]),
        world=world,
        local_rank=int(environ.get("SLURM_LOCALID", "0")),
        local_world=counts[node] if node < len(counts) else 1,
        master=(environ.get("MASTER_ADDR", address), environ.get("MASTER_PORT", str(port))),
    )


def first_host(nodes: str) -> str:
    """First name of SLURM's compressed list: `gpu[07-09,12],login` -> `gpu07`."""
    name = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if name is None:
        raise ConfigError(f"cannot read SLURM's node list {nodes!r}; set MASTER_ADDR")
    return "".join(part or "" for part in name.groups())


def tasks_per_node(text: str) -> list[int]:
    """SLURM's compressed counts: `4(x2),3` -> [4, 4, 3]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]
