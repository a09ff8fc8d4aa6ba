"""Which ways to run a job fit the memory of its ranks, the fastest first."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import ConfigError
from scaling.cost.machine import Machine, Network
from scaling.cost.planner import Job, memory_by_part
from scaling.cost.time import step_seconds
from scaling.execution import Execution

SMALLER = 8
"""Tiles and workspace are divided by it where they do not fit."""
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Way:
    """A job that fits, or the one that comes nearest."""

    job: Job
    memory: int
    """Of a rank, bytes."""
    seconds: float
    """Of a step."""

    def overrides(self) -> dict[str, Any]:
        """What `train` has to be told."""
        job, run = self.job, self.job.execution
        return {
            "parallel.dp": job.world // job.sp,
            "parallel.sp": job.sp,
            "engine": "deepspeed",
            "engine.zero_stage": job.zero_stage,
            "execution.tile_bytes": run.tile_budget(job.device),
            "execution.workspace_bytes": run.workspace_bytes,
            "execution.recompute_operators": run.recompute_operators,
            "execution.offload": run.offload,
        }


def ranked(
    jobs: Iterable[Job],
    memory_bytes: int,
    machine: Machine,
    network: Network | None,
    process: tuple[int, int],
    say: Callable[[str], None],
) -> list[Way]:
    """The ways that fit, by time.

    Args:
        jobs: one for every mesh that the ranks and the batch allow.
        process: see `memory_by_part`.

    Raises:
        ConfigError: none fits; it says by how much.
    """
    fitting, nearest = list[Way](), None
    for job in jobs:
        say(f"dp {job.world // job.sp}, sp {job.sp}")
        for way in _ways(job, machine, network, process):
            if nearest is None or way.memory < nearest.memory:
                nearest = way
            if way.memory <= memory_bytes:
                fitting.append(way)
                break
    if not fitting:
        assert nearest is not None  # there is one job at least
        lacking = (nearest.memory - memory_bytes) / 2**30
        job = nearest.job
        raise ConfigError(
            f"memory_gib={memory_bytes / 2**30:.4g}: nothing fits; dp {job.world // job.sp}, sp "
            f"{job.sp} comes nearest and needs {nearest.memory / 2**30:.3g} GiB a rank, "
            f"{lacking:.3g} GiB more: give more ranks or more memory, or a shorter length"
        )
    return sorted(fitting, key=lambda way: way.seconds)


def _ways(
    job: Job, machine: Machine, network: Network | None, process: tuple[int, int]
) -> Iterator[Way]:
    """A mesh's ways from the fastest to the one that takes least memory."""
    for execution in _executions(job.execution, job.device):
        tried = replace(job, execution=execution)
        trace = tried.trace()
        for stage in STAGES:
            one = replace(tried, zero_stage=stage)
            memory = sum(memory_by_part(one, trace, process).values())
            yield Way(one, memory, sum(step_seconds(one, trace, machine, network).values()))


def _executions(asked: Execution, device: str) -> Iterator[Execution]:
    """As asked for; then less and less memory."""
    yield asked
    small = replace(
        asked,
        tile_bytes=max(asked.tile_budget(device) // SMALLER, 1),
        workspace_bytes=max(asked.workspace_bytes // SMALLER, 1),
    )
    yield small
    if not asked.recompute_operators:
        yield replace(small, recompute_operators=True)
    if asked.offload == "none":
        yield replace(small, offload="host" if device == "cuda" else "file")
