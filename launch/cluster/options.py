"""What a job asks of a cluster: every key of `submit`, with its default, stands here."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from data_pipeline.errors import OptionError
from data_pipeline.options import check_options

Count = Annotated[int, Ge(1)]
TIME = r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"


@dataclass
class JobOptions:
    """One job; all other keys of `submit` are those of train, or of sweep."""

    action: Literal["submit", "print", "rehearse"] = "submit"
    """submit: into the queue, or on the spot inside an allocation; print: the script, and do
    nothing; rehearse: the job here without SLURM, interrupted in three ways."""
    launcher: Literal["srun", "torchrun", "accelerate", "deepspeed"] = "srun"
    """srun: one task a rank; else one launcher a node."""
    nodes: Count = 1
    tasks_per_node: Count = 8
    """Ranks of a node."""
    gpus_per_node: Annotated[int, Ge(0)] | None = None
    """null: one a rank, or none with device=cpu; 0: none is asked for."""
    cpus_per_task: Count = 8
    """Of each rank."""
    time: str = "24:00:00"
    """Limit: minutes, h:mm:ss or days-hours."""
    mem: str | None = None
    """Of a node, such as 64G; null: as the site has it."""
    partition: str | None = None
    """null: SBATCH_PARTITION of the site's file, or the cluster's default."""
    account: str | None = None
    """null: SBATCH_ACCOUNT of the site's file, or the user's default."""
    signal: Literal["USR2", "HUP", "WINCH"] = "USR2"
    """Warns of the limit. Not USR1, which NCCL uses."""
    warn_s: Annotated[int, Ge(1)] = 180
    """Seconds from the warning to the limit: 60 (SLURM may be as late), a step and a save."""
    requeue: Literal["auto", "never"] = "auto"
    """auto: at the limit a run that has saved is queued again."""
    max_requeues: Annotated[int, Ge(0)] = 100
    """Starts again at most, by SLURM's count."""
    site: str | None = "slurm/site.env"
    """What differs between clusters: modules, environment, network. null: nothing does."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch: ["--exclusive", "--constraint=a100"]."""
    rehearse_steps: Annotated[int, Ge(6)] = 30
    """Steps of a rehearsal."""

    def __post_init__(self) -> None:
        check_options(self)
        if not re.fullmatch(TIME, self.time):
            rule = "SLURM takes minutes (90), h:mm:ss (24:00:00) or days-hours (2-12)"
            raise OptionError("time", repr(self.time), rule)
        for option in self.sbatch:
            if not re.fullmatch(r"--[a-z][a-z-]*(=\S+)?", option):
                rule = 'one option each is written "--name=value" or "--name"'
                raise OptionError("sbatch", repr(option), rule)
        if self.launcher == "accelerate" and self.ranks == 1:
            rule = "accelerate gives a single process no rank; launcher=srun does"
            raise OptionError("launcher", "accelerate with one rank", rule)

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * self.tasks_per_node

    def gpus(self, device: str) -> int:
        """GPUs of a node that the job asks for."""
        if device == "cpu":
            return 0
        return self.tasks_per_node if self.gpus_per_node is None else self.gpus_per_node
