"""Train on a cluster by SLURM: python -m launch submit [what train takes] nodes=2 [key=value ...]

With sweep=... the points of that sweep, one a job of an array. The job's folder, in the run's,
holds the script, the resolved configuration, the logs and a copy of the program: what is changed
later changes no job. docs/slurm.md says what happens at the time limit.
"""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from time import time

from data_pipeline.disk import write_atomically
from data_pipeline.errors import ConfigError, RunError
from launch.cluster.options import JobOptions
from launch.cluster.queue import (
    inside_allocation,
    require_sbatch,
    state_in_queue,
    submit_script,
)
from launch.cluster.script import Job, script_of
from launch.cluster.snapshot import copy_program
from launch.config.check import suggest
from launch.config.compose import command_line, compose, config_folder, to_yaml
from launch.config.settings import Config
from launch.sweep import SweepConfig, sweep_of
from scaling.runs.folder import RunFolder


@dataclass(frozen=True)
class Work:
    """What the job does: a run, or a sweep of so many points."""

    config: Config | SweepConfig
    arguments: list[str]
    run: Path
    points: int = 0


def main(arguments: list[str]) -> None:
    """Write the job, and do what `action` says with it."""
    ours, theirs = _divided(arguments)
    if "--cfg" in ours:
        _work(theirs)  # its mistakes are said, too
    options, _ = command_line(ours, "submit", JobOptions)
    work = _work(theirs)
    if work.points and (options.nodes > 1 or options.launcher != "srun"):
        key = f"nodes={options.nodes}" if options.nodes > 1 else f"launcher={options.launcher}"
        raise ConfigError(f"{key} with sweep=...: each point starts its own ranks on one node; "
                          "leave it out")  # fmt: skip
    if options.action == "rehearse":
        from launch.cluster.rehearse import rehearse

        if not isinstance(work.config, Config):
            raise ConfigError("action=rehearse runs one training run: leave sweep=... out; "
                              "action=print shows its script")  # fmt: skip
        rehearse(options, work.config, work.arguments, work.run)
        return
    told = [each for each in arguments if not each.startswith("action=")]
    command = shlex.join(["python", "-m", "launch", "submit", *told])
    job = planned_job(options, work.config, work.arguments, work.run, command, work.points)
    if options.action == "print":
        print(script_of(job), end="")
        return
    _refuse_needless(work)
    _check_site(job)
    if not inside_allocation():
        require_sbatch()
    script = write_job(job, work.config)
    if inside_allocation():
        sys.stdout.flush()
        os.execvp("bash", ["bash", str(script)])
    number = submit_script(script, options, job.site)
    write_atomically(job.folder / "job.json", json.dumps({"id": number, "time": time()}) + "\n")
    log = str(job.log).replace("%j", number).replace("%A", number)
    print(f"job {number}" + (f", an array of {work.points}" if work.points else ""))
    print(f"log  {log}")
    if not work.points:
        print(f"rank {job.folder / f'{number}_0.log'}")


def planned_job(
    options: JobOptions,
    config: Config | SweepConfig,
    arguments: Sequence[str],
    run: Path,
    command: str,
    points: int = 0,
) -> Job:
    """The next job of a run; nothing is written. An allocation is never queued again."""
    if inside_allocation() and options.action == "submit":
        options = dataclasses.replace(options, requeue="never")
    taken = [int(path.name) for path in run.glob("jobs/*") if path.name.isdecimal()]
    folder = run / "jobs" / str(max(taken, default=0) + 1)
    site = Path(options.site).absolute() if options.site else None
    return Job(options, run, folder, arguments, command, config.device, points, site)


def write_job(job: Job, config: Config | SweepConfig) -> Path:
    """The job's folder; its script.

    Raises:
        RunError: it cannot be written.
    """
    script = job.folder / "job.sbatch"
    try:
        job.folder.mkdir(parents=True)
        (job.folder / "config.yaml").write_text(to_yaml(config))
        script.write_text(script_of(job))
        if not job.points and not (job.run / "config.yaml").exists():  # for `status`
            shutil.copyfile(job.folder / "config.yaml", job.run / "config.yaml")
    except OSError as error:
        key = "sweeps" if job.points else "runs"
        raise RunError(
            f"the job's folder {job.folder} cannot be written ({error.strerror}); choose another "
            f"by {key}=..., or change its permissions"
        ) from error
    copy_program(job.folder / "code")
    return script


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Keys of the job and flags; the rest, which is of train or sweep.

    Raises:
        ConfigError: a key that neither has.
    """
    own = {each.name for each in fields(JobOptions)}
    sweeping = any(argument.startswith("sweep=") for argument in arguments)
    schema = SweepConfig if sweeping else Config
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    known = own | {each.name for each in fields(schema)} | groups
    ours, theirs = [], []
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+")
        root = key.partition(".")[0].partition("@")[0]
        if argument.startswith("-") or "=" not in argument or key in own:
            ours.append(argument)
        elif root in known:
            theirs.append(argument)
        else:
            raise ConfigError(f"unknown key {root}{suggest(root, known)}; the job has "
                              f"{', '.join(sorted(own))}; others are those of "
                              f"{'sweep' if sweeping else 'train'}")  # fmt: skip
    return ours, theirs


def _work(arguments: list[str]) -> Work:
    """Of the arguments that are not the job's; every key and value checked."""
    if any(argument.startswith("sweep=") for argument in arguments):
        config = compose("sweep", arguments, SweepConfig)
        run = Path(config.sweeps, config.name).absolute()
        return Work(config, arguments, run, len(list(sweep_of(config).points())))
    config = compose("train", arguments, Config)
    return Work(config, arguments, Path(config.runs, config.name).absolute())


def _check_site(job: Job) -> None:
    if job.site and not job.site.is_file():
        raise ConfigError(f"site={job.options.site} is not there: cp slurm/site.env.example "
                          f"{job.options.site} and edit it, or site=null where a job needs "
                          "nothing loaded")  # fmt: skip
    if job.site:
        told = subprocess.run(["bash", "-n", str(job.site)], capture_output=True, text=True)
        if told.returncode:
            reason = " ".join(told.stderr.split())[:200]
            raise ConfigError(f"site={job.options.site} is no bash: {reason}; mend it")


def _refuse_needless(work: Work) -> None:
    """Raises RunError for a run that has finished, or whose job is still in the queue."""
    run = RunFolder(work.run)
    if (number := run.job()) and (state := state_in_queue(number)):
        raise RunError(f"{work.run} has job {number} in the queue ({state}): wait, scancel "
                       f"{number}, or choose another name=...")  # fmt: skip
    if not isinstance(work.config, Config):
        return
    status, steps = run.status(), work.config.train.steps
    if status.get("state") == "finished" and status.get("step", 0) >= steps:
        raise RunError(f"{work.run} has finished its {steps:,} steps: train.steps={2 * steps} goes "
                       "on (on the longer schedule), another name=... starts another "
                       "run")  # fmt: skip
