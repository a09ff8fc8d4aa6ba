"""Examine machines, ranks and data before a run: python -m launch doctor [what train takes]

torchrun | accelerate launch | deepspeed | srun | mpirun ... launch.doctor       on many ranks

One line a check: what was found, and what to do where it failed. The lines are made to be pasted
into a report. The exit code is not 0 if any check failed, on any rank.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from data_pipeline.errors import RunError
from launch.checks import data, machine, together
from launch.checks.finding import Check, Finding, Job, combine, failed, look
from launch.checks.meeting import LOST, Meeting
from launch.config.compose import command_line
from launch.config.settings import Config
from launch.ranks.discovery import Ranks, discover
from launch.ranks.process import Unheard, run_command, share_cores
from launch.train import accelerate_overrides

PATIENCE_S = 120.0
"""Longest that one rank waits for another, whatever parallel.timeout_s says."""
LOOK_S = 60.0
"""Longest that a check takes by itself."""

CHECKS = (
    Check("versions", machine.versions, machine.same_versions),
    Check("device", machine.device, machine.same_device),
    Check("threads", machine.threads, machine.enough_cores),
    Check("open files", machine.open_files),
    Check("shared memory", machine.shared_memory, once_a_machine=True),
    Check("slurm", machine.slurm, once_a_machine=True),
    Check("names", together.names, once_a_machine=True),
    Check("clocks", together.clocks, together.same_clock),
    Check("store", data.store, data.same_store),
    Check("who reads what", data.reading, data.complete),
    Check("model", data.model, once_a_machine=True),
    Check("disk of store", data.disk_of_store, once_a_machine=True),
    Check("disk of runs", machine.disk_of_runs, once_a_machine=True),
    Check("locks", machine.locks, once_a_machine=True),
    Check("extensions", machine.extensions, once_a_machine=True),
    Check("backend", together.backend, together.connected),
    Check("exchange", together.exchange, together.speeds),
    Check("engine", together.engine, together.started),
)


def main(arguments: list[str]) -> None:
    """Print what every check found; every rank runs this.

    Raises:
        RunError: a check failed.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # our lines say it without C++ frames
    ranks = discover()
    share_cores(ranks)
    config, _ = command_line([*accelerate_overrides(), *arguments], "doctor", Config)
    with contextlib.redirect_stdout(Unheard(sys.stdout)):
        examine(config, ranks)


def examine(config: Config, ranks: Ranks) -> None:
    """All checks, one after the other and on all ranks at once."""
    patience = min(config.parallel.timeout_s, PATIENCE_S)
    meeting = Meeting(ranks, patience, LOOK_S)
    with ExitStack() as stack:
        job = Job(config, ranks, patience, meeting.hosts, stack)
        wrong = ["ranks"] * _report("ranks", meeting.finding, job)
        for check in CHECKS:
            with _no_longer_than(patience + LOOK_S, check.name, ranks):
                here = ranks.local_rank == 0 or not check.once_a_machine
                finding = look(check, job) if here else None
            agreed = meeting.agree(check.name, finding, partial(combine, check, job))
            wrong += [check.name] * _report(check.name, agreed, job)
        meeting.leave()
        if wrong:
            raise RunError(f"{len(wrong)} of {len(job.states)} checks failed "
                           f"({', '.join(wrong)}); their lines say what to do")  # fmt: skip


def _report(name: str, finding: Finding, job: Job) -> bool:
    """A line of the table, and the state for later checks; whether it failed."""
    job.states[name] = finding.state
    if finding.data == LOST:
        job.states["ranks"] = "FAILED"
    if job.ranks.rank == 0:
        print("\n".join(table_lines(name, finding)), flush=True)
    return finding.state == "FAILED"


def table_lines(name: str, finding: Finding) -> list[str]:
    """name, state, what was found, what to do."""
    fix = f"; fix: {finding.fix}" if finding.state == "FAILED" else ""
    first = f"{name:<16}{finding.state:<10}{finding.text}{fix}"
    return [first, *(f"{'':<26}{line}" for line in finding.lines)]


@contextlib.contextmanager
def _no_longer_than(seconds: float, check: str, ranks: Ranks) -> Iterator[None]:
    """Ends this process if the body does not: a dead network disk lets nobody go on."""

    def give_up() -> None:
        found = failed(f"rank {ranks.rank}: did not end within {seconds:g} s",
                       "look at what it reads, writes or waits for on this machine")  # fmt: skip
        stream = sys.stdout if ranks.rank == 0 else sys.stderr
        print("\n".join(table_lines(check, found)), file=stream, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
