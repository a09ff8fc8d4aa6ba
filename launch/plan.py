"""Foresee what a training run takes: python -m launch plan [what train takes] ranks=64 length=...

Everything that `train` takes says which run. Nothing of it is started: one rank's step runs here
without numbers, in a world of as many ranks that exchanges nothing. docs/planning.md has the
formulas and where the presets' figures come from.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from data_pipeline.disk import write_atomically
from data_pipeline.errors import ConfigError, RunError
from launch.config.check import options_within
from launch.config.compose import command_line
from launch.config.settings import Config, mesh_sizes
from launch.ranks.discovery import discover
from launch.ranks.process import process_group
from launch.train import size_of, task_and_model

if TYPE_CHECKING:
    from data_pipeline.tasks.protocol import Task
    from scaling.cost.machine import Machine, Network
    from scaling.cost.planner import Job
    from scaling.cost.search import Way
    from scaling.models import Model


DEFAULT_RANKS = 2


@dataclass
class PlanConfig(Config):
    ranks: Annotated[int, Ge(1)] = DEFAULT_RANKS
    """Processes of the job; on GPUs one each."""
    gpus: Annotated[int, Ge(1)] | None = None
    """The same as ranks."""
    length: Annotated[int, Ge(1)] | None = None
    """Tokens of a row; null: the longest sample of the task's training split."""
    machine: str = "this"
    """What a rank runs on: this (measured by bench=machine), a100, h100, h200, or the folder of a
    bench=machine."""
    network: str | None = None
    """nvlink3, nvlink4, infiniband, ethernet; null: as measured, or a node's NVLink up to 8 GPUs,
    InfiniBand beyond."""
    tokens: Annotated[float, Gt(0)] = 1e9
    """To train on."""
    search: bool = False
    """Look for the fastest way that fits `memory_gib`."""
    memory_gib: Annotated[float, Gt(0)] = 80.0
    """Of a rank, GiB."""
    output: str | None = None
    """Folder, such as a sweep's, that gets plan.json, of which its report tells, and what a search
    finds; null: none, or plans."""

    def __post_init__(self) -> None:
        if self.gpus and self.ranks not in (DEFAULT_RANKS, self.gpus):
            raise ConfigError(f"ranks={self.ranks} and gpus={self.gpus} are one number: give one")
        self.ranks = self.gpus or self.ranks
        if self.train.precision == "float64":
            raise ConfigError("train.precision=float64: plan foresees float32 and bf16 alone")


@dataclass
class Report:
    """What is printed, and written as plan.json."""

    numbers: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def progress(self, line: str) -> None:
        """Said while one waits, and not kept."""
        print(line, file=sys.stderr, flush=True)

    def table(self, parts: dict[str, float], unit: str, total: str, digits: int = 0) -> None:
        """Parts with their shares, and their sum."""
        whole = sum(parts.values())
        for part, value in (parts | {total: whole}).items():
            self.say(f"  {part:<28}{value:>12,.{digits}f} {unit}{value / whole:>7.1%}")


def main(arguments: list[str]) -> None:
    """Print memory and time of one rank's step by part, and what all the tokens take."""
    config, overrides = command_line(arguments, "plan", PlanConfig)
    import torch

    torch.set_num_threads(1)  # as a rank that shares its cores; the step here is a small one
    from scaling.cost.machine import machine_named, network_named
    from scaling.cost.planner import process_bytes
    from scaling.cost.search import ranked

    report, machine = Report(), None
    network = network_named(config.network) if config.network else None
    unmeasured = ""
    try:
        machine = machine_named(config.machine)
    except ConfigError as error:
        if config.machine != "this" or config.search:
            raise
        unmeasured = str(error)
    device = machine.device if machine else "cpu"
    if config.device == "cuda" != device:
        raise ConfigError("device=cuda: name the GPU: machine=a100, h100 or h200")
    task, model = _checked(config)
    jobs = [_job(config, task, model, device, *mesh) for mesh in _meshes(config, overrides)]
    process = (0, 0)
    if device == "cpu":
        load_what_a_rank_loads(config)
        process = process_bytes(jobs[0])
    report.say(size_of(model, config.model))
    if machine and config.search:
        ways = ranked(
            jobs, round(config.memory_gib * 2**30), machine, network, process, report.progress
        )
        _print_ranking(config, ways, machine, report)
        _write_best(config, ways[0], overrides, report)
        jobs = [ways[0].job]
    _describe(config, jobs[0], machine, network, process, report)
    if unmeasured:
        report.say(f"no times: {unmeasured}")
    if config.output or config.search:
        folder = Path(config.output or "plans")
        write_plan(folder, {"text": "\n".join(report.lines)} | report.numbers)
        print(f"numbers   {folder / 'plan.json'}")


def _checked(config: PlanConfig) -> "tuple[Task, Model]":
    """Task and model; the first row's length becomes the configuration's where it has none."""
    from data_pipeline.stream.stream import check_lengths

    with options_within(config, "train"):
        task, model = task_and_model(config)
        check_lengths(task, "train", config.train.max_length)
    config.length = config.length or task.length("train", task.longest("train"))
    return task, model


def _meshes(config: PlanConfig, overrides: list[str]) -> list[tuple[int, int]]:
    """(dp, sp) that is asked for, or in a search all that ranks, batch and length allow."""
    from data_pipeline.stream.stream import check_batches
    from scaling.parallel.mesh import check_sizes

    train, ranks, length = config.train, config.ranks, config.length or 1

    def check(dp: int, sp: int) -> tuple[int, int]:
        check_sizes(dp, sp, ranks)
        check_batches(train.batch_size, train.micro_batch_size, dp)
        if not sp <= length <= train.max_length:
            raise ConfigError(
                f"length={length}: must lie in {sp} (a token a rank) ... {train.max_length} "
                "(train.max_length)"
            )
        return dp, sp

    if not config.search or any(each.startswith("parallel") for each in overrides):
        with options_within(config, "train", "parallel"):
            return [check(*mesh_sizes(config.parallel, ranks))]
    found = []
    for dp in range(1, ranks + 1):
        with suppress(ConfigError):
            found.append(check(dp, ranks // dp))
    if not found:
        raise ConfigError(f"ranks={ranks}: no mesh of these ranks fits rows of {length} tokens and "
                          f"train.batch_size={train.batch_size}")  # fmt: skip
    return found


def _job(config: PlanConfig, task: "Task", model: "Model", device: str, dp: int, sp: int) -> "Job":
    from scaling.cost.planner import Job, sample_bytes

    train, length = config.train, config.length or 1
    micro_batches = train.batch_size // (dp * train.micro_batch_size)
    return Job(
        model,
        config.execution,
        length,
        rows=train.micro_batch_size,
        micro_batches=micro_batches,
        sp=sp,
        world=config.ranks,
        zero_stage=config.engine.zero_stage if config.engine.name == "deepspeed" else 0,
        data_bytes=sample_bytes(task, length, train.micro_batch_size, micro_batches, sp),
        device=device,
        bf16=train.precision == "bf16",
    )


def _describe(
    config: PlanConfig,
    job: "Job",
    machine: "Machine | None",
    network: "Network | None",
    process: tuple[int, int],
    report: Report,
) -> None:
    """Memory and time by part, and the budget."""
    from scaling.cost.planner import memory_by_part
    from scaling.cost.time import budget, networks_of, step_seconds

    trace, where = job.trace(), "a CPU"
    if machine:
        where = f"{machine.name} ({'measured here' if machine.measured else 'not measured'})"
    dp = job.world // job.sp
    report.say(f"a rank of {job.world} on {where}, dp {dp}, sp {job.sp}, "
               f"{job.rows} x {job.length:,} tokens")  # fmt: skip
    memory = memory_by_part(job, trace, process)
    report.say("\nmemory")
    report.table({part: size / 2**20 for part, size in memory.items()}, "MiB", "peak memory")
    sent, calls = job.micro_batches * trace.sent_bytes, job.micro_batches * trace.collectives
    report.say(f"\nsent by a rank and step: {sent / 1e6:,.1f} MB in {calls:,} collectives")
    report.numbers |= {"ranks": job.world, "dp": dp, "sp": job.sp, "length": job.length,
                       "memory": memory, "peak_bytes": sum(memory.values()),
                       "comm_bytes": sent, "collectives": calls}  # fmt: skip
    if machine is None:
        return
    seconds = step_seconds(job, trace, machine, network)
    takes, networks = budget(job, seconds, config.tokens), networks_of(job, machine, network)
    report.say("\ntime of a step")
    report.table({part: 1e3 * s for part, s in seconds.items()}, "ms ", "step", 2)
    report.say()
    for what, each in (("sequence", networks.sequence), ("gradients", networks.world)):
        if job.world > 1:
            measured = "measured" if each.measured else "not measured"
            report.say(f"{what} over {each.name} ({measured}): {1e6 * each.latency_s:,.0f} us, "
                       f"{each.bytes_per_s / 1e9:,.3g} GB/s")  # fmt: skip
    if job.model.neighbours:
        report.say("the search for neighbours is not counted")
    unit = "GPU-hours" if machine.device == "cuda" else "core-hours"
    report.say(
        f"{takes.tokens_per_s:,.0f} tokens/s, {takes.exchange_share:.1%} of a step exchanges"
    )
    report.say(f"{config.tokens:,.0f} tokens: {takes.steps:,} steps, {takes.hours:,.3g} hours, "
               f"{takes.rank_hours:,.3g} {unit}")  # fmt: skip
    report.numbers |= {"machine": machine.name, "measured": machine.measured, "seconds": seconds,
                       "step_s": sum(seconds.values()), "tokens": config.tokens,
                       **asdict(takes)}  # fmt: skip


def _print_ranking(
    config: PlanConfig, ways: "list[Way]", machine: "Machine", report: Report
) -> None:
    from scaling.cost.time import budget

    report.say(f"fits {config.memory_gib:g} GiB on {config.ranks} x {machine.name}, "
               f"{config.length:,} tokens a row, the fastest first")  # fmt: skip
    report.say(f"{'dp':>5}{'sp':>6}{'ZeRO':>6}{'tile':>9}{'workspace':>11}  {'recompute':<11}"
               f"{'offload':<9}{'GiB':>8}{'ms/step':>12}{'hours':>10}")  # fmt: skip
    for way in ways:
        job, run = way.job, way.job.execution
        hours = budget(job, {"step": way.seconds}, config.tokens).hours
        tile, workspace = run.tile_budget(job.device) / 2**20, run.workspace_bytes / 2**20
        report.say(f"{job.world // job.sp:>5}{job.sp:>6}{job.zero_stage:>6}{tile:>5,.0f} MiB"
                   f"{workspace:>7,.0f} MiB  {'yes' if run.recompute_operators else 'no':<11}"
                   f"{run.offload:<9}{way.memory / 2**30:>8,.2f}{1e3 * way.seconds:>12,.1f}"
                   f"{hours:>10,.3g}")  # fmt: skip
    report.say()
    report.numbers["ranking"] = [
        way.overrides() | {"memory": way.memory, "step_s": way.seconds} for way in ways
    ]


def _write_best(config: PlanConfig, best: "Way", overrides: list[str], report: Report) -> None:
    """The overrides of `train`, one a line: the user's own, then what was found."""
    mine = {each.name for each in fields(PlanConfig)} - {each.name for each in fields(Config)}
    found = {key: str(value).lower() if isinstance(value, bool) else value
             for key, value in best.overrides().items()}  # fmt: skip
    own = [each for each in overrides if each.partition("=")[0] not in mine | found.keys()]
    path = Path(config.output or "plans") / "train.args"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*own, *(f"{key}={value}" for key, value in found.items())]) + "\n")
    report.say(f"the first, as train takes it: xargs -d '\\n' -a {path} torchrun "
               f"--nproc-per-node {min(config.ranks, 8)} -m launch.train\n")  # fmt: skip


def write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """plan.json, from which a report tells.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "plan.json", json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"output={folder}: cannot be written ({error.strerror}); choose another "
                       "folder") from error  # fmt: skip


def load_what_a_rank_loads(config: Config) -> None:
    """Libraries take memory before the first tensor does, DeepSpeed's at the first step."""
    import torch
    from torch import nn

    import scaling.train.loop  # noqa: F401
    from scaling.engine.build import build_engine

    if config.engine.name != "deepspeed":
        return
    with process_group(discover(), torch.device("cpu"), config.parallel.timeout_s, needed=True):
        engine = build_engine(
            "deepspeed",
            nn.Linear(1, 1),
            torch.optim.AdamW,
            gradient_clipping=1.0,
            micro_batch_size=1,
            accumulation=1,
            zero_stage=config.engine.zero_stage,
            environment={},
        )
        engine.backward(engine(torch.ones(1, 1)).sum())
        engine.step(0.0)
