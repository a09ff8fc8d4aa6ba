"""The batch script: slurm/job.sbatch.j2, filled. `python -m launch.cluster.script` prints the one
that is submitted by hand."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster.options import JobOptions

CONTINUED = " \\\n  "


@dataclass(frozen=True)
class Job:
    """What a script runs, and where; all paths absolute."""

    options: JobOptions
    run: Path
    """The run's folder, or the sweep's."""
    folder: Path
    """The job's own inside it."""
    arguments: Sequence[str]
    """Of train, or of sweep."""
    command: str
    """That submits it, for people."""
    device: str = "auto"
    points: int = 0
    """Of a sweep, one a job of an array; 0: a training run."""
    site: Path | None = None

    @property
    def log(self) -> Path:
        """Of the script, as sbatch writes it: %j the job, %A and %a of an array."""
        return self.folder / ("%A_%a.log" if self.points else "%j.log")


def slurm_folder() -> Path:
    """Folder of the templates: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"


def script_of(job: Job) -> str:
    """The script that `submit` hands to sbatch."""
    options = job.options
    quoted = [shlex.quote(each) for each in job.arguments]
    return _rendered(
        options,
        by_hand=False,
        name=shlex.quote(job.run.name),
        command=" ".join(job.command.split()),
        points=job.points,
        gpus=options.gpus(job.device),
        launcher="" if job.points else options.launcher,
        launch=_sweep_line(quoted) if job.points else launch_line(options, quoted),
        output=shlex.quote(str(job.log)),
        programs=shlex.quote(str(Path(sys.executable).parent)),
        site=shlex.quote(str(job.site)) if job.site else "",
        code=shlex.quote(str(job.folder / "code")),
        run=shlex.quote(str(job.run)),
        logs=shlex.quote(str(job.folder)),
        again=shlex.quote(job.command),
    )


def script_by_hand() -> str:
    """The script in the repository: options on sbatch's command line, arguments behind its name."""
    options = JobOptions()
    return _rendered(
        options,
        by_hand=True,
        name="longfold",
        points=0,
        gpus=options.tasks_per_node,
        launcher=options.launcher,
        launch=launch_line(options, ['"$@"'], by_hand=True),
        output="%x-%j.log",
        site=options.site,
    )


def launch_line(options: JobOptions, arguments: Sequence[str], by_hand: bool = False) -> str:
    """The command that starts every rank; srun in front, so that it reaches every node.

    Since 22.05 srun does not inherit --cpus-per-task. One rank that fails ends all.
    """
    alone, tasks = options.launcher == "srun", options.tasks_per_node
    per_node, cpus = (tasks, options.cpus_per_task) if alone else (1, tasks * options.cpus_per_task)
    shape = [f"--nodes={options.nodes}", f"--ntasks={options.nodes * per_node}",
             f"--ntasks-per-node={per_node}", f"--cpus-per-task={cpus}"]  # fmt: skip
    if by_hand:
        shape = ['--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"']
    srun = ["srun", *shape, "--kill-on-bad-exit=1", "--wait=60"]
    output = ["--open-mode=append", '--output="$logs/%j_%t.log"']
    launcher = {
        "srun": ["python -m launch.train"],
        "torchrun": [
            f"torchrun --nnodes={options.nodes} --nproc-per-node={tasks} --rdzv-backend=c10d",
            '--rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" -m launch.train',
        ],
        # Each node says which it is.
        "accelerate": [
            """bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' accelerate""",
            f"--multi_gpu --num_machines {options.nodes} --num_processes {options.ranks}",
            "--mixed_precision no --dynamo_backend no",
            '--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" -m launch.train',
        ],
        "deepspeed": [
            """bash -c 'exec deepspeed --no_ssh --node_rank "$SLURM_NODEID" "$@"' deepspeed""",
            '--no_local_rank --hostfile "$logs/hosts"',
            '--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --module launch.train',
        ],
    }[options.launcher]
    return CONTINUED.join([" ".join(srun), " ".join(output), *launcher, *_wrapped(arguments)])


def _sweep_line(arguments: Sequence[str]) -> str:
    """One point of a sweep, which starts its own ranks on its node."""
    return CONTINUED.join(
        ['python -m launch sweep point="$SLURM_ARRAY_TASK_ID"', *_wrapped(arguments)]
    )


def _wrapped(words: Sequence[str], width: int = 90) -> list[str]:
    """Lines of words."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _rendered(options: JobOptions, launcher: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    one_task = launcher != "srun"  # a launcher, or a sweep, starts the ranks of its node itself
    tasks = options.tasks_per_node
    environment = Environment(
        loader=FileSystemLoader(slurm_folder()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("job.sbatch.j2").render(
        job=options,
        launcher=launcher,
        nodes=options.nodes,
        tasks=1 if one_task else tasks,
        cpus=options.cpus_per_task * (tasks if one_task else 1),
        **values,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


if __name__ == "__main__":
    sys.stdout.write(script_by_hand())
