"""Checks of one machine: versions, device, threads, limits, SLURM, disks, locks, extensions."""

import os
import resource
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from psutil import pid_exists

from data_pipeline.disk import locked
from launch.checks.finding import Finding, Job, failed, not_here, ok, who
from launch.ranks.discovery import require_ranks
from launch.ranks.process import choose_device
from scaling.runs.environment import describe_environment

PROBE = 64 << 20
"""Bytes that a disk is tried with."""
BLOCK = 1 << 20
NUMBERS = 3
"""float32 numbers of a checkpoint for each parameter: itself, and two moments of AdamW."""
STALE_S = 600.0
"""A build of an extension that is older has been killed."""
SLURM = ("sbatch", "squeue", "scontrol")


def versions(job: Job) -> Finding:
    """Of everything that decides what a run does."""
    about = describe_environment()
    found = {"python": about["python"], **about["versions"]}
    if found["deepspeed"] is None and job.config.engine.name == "deepspeed":
        return failed("DeepSpeed is not installed", "pip install deepspeed, or engine=ddp")
    commit, dash, more = (about["git"] or "unknown").partition("-")
    own = found.pop("longfold") or "not installed, a source tree"
    said = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    return ok(f"Longfold {own}, commit {commit[:12]}{dash}{more}, {said}")


def same_versions(job: Job, findings: dict[int, Finding]) -> Finding:
    texts: dict[str, list[int]] = {}
    for rank, each in findings.items():
        texts.setdefault(each.text, []).append(rank)
    if len(texts) == 1:
        return ok(next(iter(texts)))
    said = " | ".join(f"{who(ranks, job.hosts)}: {text}" for text, ranks in texts.items())
    return failed(f"ranks differ: {said}", "start every rank in the same environment and checkout")


def device(job: Job) -> Finding:
    """What this rank computes on, and what it exchanges by."""
    import torch

    job.device = choose_device(job.config.device, job.ranks)
    here = f"{job.ranks.local_world} rank{'s' * (job.ranks.local_world > 1)} on this machine"
    if job.device.type == "cpu":
        return ok(f"cpu, gloo, {here}", "cpu")
    name, gpus = torch.cuda.get_device_name(job.device), torch.cuda.device_count()
    return ok(f"{name}, nccl, {gpus} GPUs for {here}", "cuda")


def same_device(job: Job, findings: dict[int, Finding]) -> Finding:
    kinds: dict[str, list[int]] = {}
    texts: dict[str, list[int]] = {}
    for rank, each in findings.items():
        kinds.setdefault(each.data, []).append(rank)
        texts.setdefault(each.text, []).append(rank)
    if len(kinds) > 1:
        said = ", ".join(f"{kind} on {who(ranks, job.hosts)}" for kind, ranks in kinds.items())
        return failed(f"ranks do not meet: {said}", "device=cpu, or GPUs on every machine")
    said = texts if len(texts) == 1 else [f"{who(r, job.hosts)}: {t}" for t, r in texts.items()]
    return ok(" | ".join(said))


def threads(job: Job) -> Finding:
    """How many this rank computes with, and the cores that it may use."""
    import torch

    cores = sorted(os.sched_getaffinity(0))
    text = f"{torch.get_num_threads()} a rank, {len(cores)} core{'s' * (len(cores) > 1)}"
    return ok(text, [torch.get_num_threads(), cores])


def enough_cores(job: Job, findings: dict[int, Finding]) -> Finding:
    """Threads of all ranks of a machine against the cores of all of them."""
    machines: dict[str, list[int]] = {}
    for rank in findings:
        machines.setdefault(job.hosts[rank], []).append(rank)
    for ranks in machines.values():
        started = sum(findings[rank].data[0] for rank in ranks)
        cores = len({core for rank in ranks for core in findings[rank].data[1]})
        if started > cores:
            text = f"{started} threads on {cores} cores: {who(ranks, job.hosts)}"
            best = max(cores // len(ranks), 1)
            return failed(text, f"OMP_NUM_THREADS={best}, or unset it; or fewer ranks a machine")
    return ok(" | ".join(dict.fromkeys(each.text for each in findings.values())))


def open_files(job: Job) -> Finding:
    """A rank holds connections to all others, and files of the store."""
    most, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 512 + 8 * job.ranks.world
    if 0 <= most < needed:
        return failed(f"a process may open {most} files, it needs {needed}", f"ulimit -n {needed}")
    return ok(f"{'any number' if most < 0 else f'{most:,}'} a process (ulimit -n)")


def shared_memory(job: Job) -> Finding:
    """NCCL exchanges through it between the GPUs of a machine."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return not_here("this system has no /dev/shm")
    free, needed = shutil.disk_usage(folder).free, 0
    if job.device is not None and job.device.type == "cuda" and job.ranks.local_world > 1:
        needed = job.ranks.local_world * PROBE
    if free < needed:
        return failed(
            f"/dev/shm has {_bytes(free)} free, {job.ranks.local_world} ranks want "
            f"{_bytes(needed)}",
            "make it larger (docker run --shm-size=8g), or NCCL_SHM_DISABLE=1, which is slower",
        )
    return ok(f"/dev/shm has {_bytes(free)} free")


def slurm(job: Job) -> Finding:
    """Its programs, and what it says of this job."""
    parallel, job_id = job.config.parallel, os.environ.get("SLURM_JOB_ID")
    require_ranks(job.ranks, alone=parallel.dp == parallel.sp == 1)
    programs = [name for name in SLURM if shutil.which(name)]
    if not programs and job_id is None:
        return not_here("neither its programs nor a job of it")
    said = [f"{', '.join(programs) or 'none of its programs'} on the PATH"]
    if "scontrol" in programs:
        said.append(_output("scontrol", "--version"))
    if job_id is None:
        return ok(", ".join([*said, "not inside a job"]))
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "?"), os.environ.get("SLURM_JOB_NODELIST", "?")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "?"))
    said.append(f"job {job_id} on {nodes[0]} nodes ({nodes[1]}), {tasks} tasks")
    if "squeue" in programs and (left := _output("squeue", "-h", "-j", job_id, "-o", "%L")):
        said.append(f"time left {left}")
    return ok(", ".join(said))


def _output(*command: str) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return f"{command[0]} does not answer"
    return ended.stdout.strip() or f"{command[0]} cannot answer"


def disk_of_runs(job: Job) -> Finding:
    """Speed and room where the run writes, and whether its checkpoints fit."""
    folder = existing(Path(job.config.runs) / job.config.name)
    if not folder.is_dir():
        return failed(f"{folder} is no folder to hold runs", "choose another runs=...")
    try:
        written, read = _speed(folder)
    except OSError as error:
        fix = "make room, change the permissions, or choose another runs=..."
        return failed(f"{folder} cannot be written: {error.strerror}", fix)
    free = shutil.disk_usage(folder).free
    text = f"{folder}: writes {written:,.0f} MB/s, reads {read:,.0f} MB/s, {_bytes(free)} free"
    if job.parameters is None:
        return ok(text)
    kept = job.config.train.keep_last + job.config.train.keep_best + 1
    needed = job.parameters * NUMBERS * 4 * kept
    if free < needed:
        fix = "make room, choose another runs=..., or a smaller train.keep_last"
        return failed(f"{text}; {kept} checkpoints take {_bytes(needed)}", fix)
    return ok(f"{text}; {kept} checkpoints take {_bytes(needed)}")


def _speed(folder: Path) -> tuple[float, float]:
    """MB/s of writing to the disk and of reading back, with a file that is gone afterwards."""
    block = os.urandom(BLOCK)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(PROBE // BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):  # else it would come from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while found := file.read(BLOCK):
            if found != block:
                raise OSError(0, "what was written is not what is read back")
        return PROBE / 1e6 / written, PROBE / 1e6 / (time.perf_counter() - began)


def locks(job: Job) -> Finding:
    """Whether folders can be locked, and whether this run is being written.

    A lock of ours ends with its holder; only a network file system may keep it.
    """
    run = Path(job.config.runs) / job.config.name
    lock = run / ".lock"
    path = lock if lock.exists() else existing(run)
    if path.is_dir() or path == lock:
        try:
            with locked(path, wait=False) as sure:
                if not sure:
                    fix = "choose another runs=... on a disk with locks"
                    return failed(f"the file system of {path} has no locks", fix)
        except BlockingIOError:
            return _held(lock) if path == lock else ok(f"{path} is locked by another process")
    return ok(f"{run} can be locked and is not being written")


def _held(lock: Path) -> Finding:
    owner = lock.read_text().strip() or "another process"  # process 5 on node1
    here = owner.endswith(f" on {os.uname().nodename}")
    with suppress(IndexError, ValueError):
        if here and not pid_exists(int(owner.split()[1])):
            text = f"{lock} is held for {owner}, which is gone"
            return failed(text, f"its file system keeps the lock: remove it (rm {lock})")
    text = f"{lock.parent} is being written by {owner}"
    return failed(text, "wait for it, stop it, or choose another name=...")


def extensions(job: Job) -> Finding:
    """DeepSpeed's folder for what it compiles, and locks that killed builds left there."""
    if job.config.engine.name != "deepspeed":
        return not_here(f"engine={job.config.engine.name} compiles nothing")
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")
    above = existing(root)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        fix = "TORCH_EXTENSIONS_DIR=a folder that can be written"
        return failed(f"{root} cannot be written", fix)
    found = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    now = time.time()
    old = [path for path in found if now - path.stat().st_mtime > STALE_S]
    if old:
        age = (now - old[0].stat().st_mtime) / 60
        text = f"a killed build left {old[0]} {age:,.0f} minutes ago: the next waits for ever"
        return failed(text, f"remove it: rm {' '.join(map(str, old))}")
    building = f", {len(found)} being built now" if found else ""
    return ok(f"{root} can be written{building}")


def existing(path: Path) -> Path:
    """The path, or of the folders around it the nearest that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _bytes(size: float) -> str:
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if size >= one:
            return f"{size / one:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"
