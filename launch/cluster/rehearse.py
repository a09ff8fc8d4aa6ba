"""A job on the spot, without SLURM: interrupted in three ways, and gone on with each time.

The script is the one that sbatch would get, on one node; two stand-ins in front of PATH take the
place of srun and scontrol. Every case is a run of its own in <run>/rehearsal.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from psutil import Error, NoSuchProcess, Process

from data_pipeline.errors import RunError
from launch.cluster.options import JobOptions
from launch.cluster.script import Job, script_of, slurm_folder
from launch.cluster.snapshot import copy_program
from launch.config.settings import Config
from scaling.runs.folder import RunFolder
from scaling.runs.rows import Row, of_split

PATIENCE_S = 1800
"""Longest part of a rehearsal."""
TOLERANCE = 1e-5
"""Of a loss against the straight run's; the same ranks give the same bits."""


@dataclass(frozen=True)
class Case:
    """A way to be interrupted."""

    name: str
    what: str
    interrupt: Callable[[Process, JobOptions], None] | None = None


def _preempt(shell: Process, options: JobOptions) -> None:
    """As SLURM does where another job takes the nodes: everyone hears SIGTERM."""
    for process in (shell, *shell.children(recursive=True)):
        with suppress(NoSuchProcess):
            process.send_signal(signal.SIGTERM)


def _warn(shell: Process, options: JobOptions) -> None:
    """The warning before the limit: the script's shell alone hears it."""
    shell.send_signal(getattr(signal, f"SIG{options.signal}"))


def _kill(shell: Process, options: JobOptions) -> None:
    """The last rank, without a word."""
    ranks = [each for each in shell.children(recursive=True) if _is_rank(each)]
    max(ranks, key=lambda each: each.pid).kill()


def _is_rank(process: Process) -> bool:
    """A process of launch.train, and none of a launcher, which has such below it."""
    try:
        words = process.cmdline()
        below = process.children()
    except Error:
        return False
    return "launch.train" in words and "python" in Path(words[0]).name and not any(
        "launch.train" in each.cmdline() for each in below
    )  # fmt: skip


CASES = (
    Case("straight", "nothing"),
    Case("preempted", "SIGTERM to all", _preempt),
    Case("timed_out", "warned of the limit", _warn),
    Case("killed", "SIGKILL of a rank", _kill),
)


def rehearse(options: JobOptions, config: Config, arguments: Sequence[str], run: Path) -> None:
    """Print a table: what was done, where it stopped, and how far the loss is from the straight's.

    Raises:
        RunError: a case did not end as it must; its log is named.
    """
    folder, steps = run / "rehearsal", options.rehearse_steps
    options = dataclasses.replace(options, nodes=1, gpus_per_node=0, requeue="auto")
    shutil.rmtree(folder, ignore_errors=True)
    copy_program(folder / "code")
    shutil.copytree(slurm_folder() / "stand_in", folder / "bin")
    for program in (folder / "bin").iterdir():
        program.chmod(0o755)  # an installed wheel's may have lost it
    print(f"rehearsing in {folder}: {options.tasks_per_node} ranks, {steps} steps, "
          f"launcher={options.launcher}", flush=True)  # fmt: skip
    print(f"{'case':<12}{'what was done':<22}{'stopped':>8}{'saved':>7}{'steps after':>13}"
          f"{'loss differs by':>17}  ok", flush=True)  # fmt: skip
    straight: list[Row] = []
    for case in CASES:
        told = [*arguments, f"runs={folder}", f"name={case.name}", f"train.steps={steps}",
                "train.log_every=1", f"train.save_every={max(steps // 6, 1)}",
                f"train.evaluate_every={steps}"]  # fmt: skip
        site = Path(options.site).absolute() if options.site else None
        site = site if site and site.is_file() else None
        job = Job(options, folder / case.name, folder, told, "submit the same again",
                  config.device, site=site)  # fmt: skip
        rows = _run_case(case, job, steps, straight)
        straight = straight or rows
    print("every case went on to the end", flush=True)


def _run_case(case: Case, job: Job, steps: int, straight: list[Row]) -> list[Row]:
    """Its rows of training, after a line of the table."""
    script = job.folder / f"{case.name}.sbatch"
    script.write_text(script_of(job))
    run, log = RunFolder(job.run), job.folder / f"{case.name}.log"
    at, saved = "-", 0
    if case.interrupt:
        _start(script, job, log, 0, lambda shell: _after(run, steps // 3 + 2, shell, case, job))
        at, saved = str(_last(run)), _saved(run)
        if run.status().get("state") == "finished":
            raise RunError(f"{case.name}: the run had finished before it was interrupted; give it "
                           f"rehearse_steps={4 * steps}")  # fmt: skip
    code = _start(script, job, log, 1 if case.interrupt else 0)
    rows = of_split(run.rows(), "train")
    same = [row["step"] for row in rows] == list(range(1, steps + 1))
    pairs = zip(rows, straight or rows, strict=False)
    differ = max((abs(a["loss"] / b["loss"] - 1) for a, b in pairs), default=float("nan"))
    ok = code == 0 and same and differ <= TOLERANCE and run.status().get("state") == "finished"
    if case.name == "timed_out":
        ok = ok and (job.folder / "requeued").exists()
    print(f"{case.name:<12}{case.what:<22}{at:>8}{saved:>7}{steps - saved:>13}{differ:>17.1e}  "
          f"{'yes' if ok else 'NO'}", flush=True)  # fmt: skip
    if not ok:
        raise RunError(f"{case.name} did not go on to the straight run's end (exit code {code}, "
                       f"{len(rows)} of {steps} steps): see {log} and its ranks' logs "
                       f"{job.folder}/*_0.log")  # fmt: skip
    return rows


def _start(
    script: Path,
    job: Job,
    log: Path,
    restarts: int,
    meanwhile: Callable[[Process], None] = lambda shell: None,
) -> int:
    """Runs the script as a batch step would; its exit code."""
    tasks = str(job.options.tasks_per_node if job.options.launcher == "srun" else 1)
    clean = {key: x for key, x in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
    environment = clean | {
        "PATH": f"{job.folder / 'bin'}:{clean.get('PATH', '')}",
        "STAND_IN_REQUEUED": str(job.folder / "requeued"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": tasks,
        "SLURM_NNODES": "1",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    with (
        log.open("a") as file,
        subprocess.Popen(
            ["bash", str(script)], env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        ) as shell,
    ):  # fmt: skip
        try:
            meanwhile(Process(shell.pid))
            return shell.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise RunError(f"{script} took longer than {PATIENCE_S} s: fewer rehearse_steps=...; "
                           f"its log is {log}") from None  # fmt: skip
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)


def _after(run: RunFolder, step: int, shell: Process, case: Case, job: Job) -> None:
    """Interrupts the job once its run has made that many steps; not at all if it ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while _last(run) < step and time.monotonic() < deadline:
        if not shell.is_running() or shell.status() == "zombie":
            return
        time.sleep(0.05)
    if case.interrupt:
        case.interrupt(shell, job.options)


def _last(run: RunFolder) -> int:
    return max((row["step"] for row in of_split(run.rows(), "train")), default=0)


def _saved(run: RunFolder) -> int:
    names = (path.name for path in run.checkpoints.glob("step-*[0-9]"))
    return max((int(name.removeprefix("step-")) for name in names), default=0)
