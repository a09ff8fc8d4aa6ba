"""What `doctor` finds, alone and on two ranks; every check can fail, and says what to do."""

import errno
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.disk import locked
from data_pipeline.prepare import ensure_bundled
from data_pipeline.stream.order import DataSlot
from launch import doctor
from launch.checks import data, machine, together
from launch.checks.finding import Check, Finding, Job, combine, failed, ok
from launch.checks.meeting import Meeting
from launch.config.compose import compose
from launch.config.settings import Config
from launch.ranks.discovery import Ranks, who
from launch.ranks.process import run_command
from tests.processes import run

ROOT = Path(__file__).parents[3]
HERE = socket.gethostname()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ["task=recall", "train.batch_size=4", "train.micro_batch_size=2", "engine=ddp"]

Examine = Callable[..., tuple[int, dict[str, str]]]


def table(text: str) -> dict[str, str]:
    """State and text of each check, and the lines below it."""
    found, name = {}, ""
    for line in text.splitlines():
        if line.startswith(" "):
            found[name] += "\n" + line.strip()
        elif line[16:26].strip() in ("ok", "FAILED", "not here"):
            name = line[:16].strip()
            found[name] = line[16:]
    return found


@pytest.fixture
def examine(tmp_path, monkeypatch, capsys) -> Examine:
    """Runs some checks in this process, in an empty folder: the exit code, and the table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "PROBE", 1 << 20)
    for key in ("TORCH_CPP_LOG_LEVEL", "THP_MEM_ALLOC_ENABLE", "DS_ACCELERATOR"):
        monkeypatch.setenv(key, os.environ.get(key, "cpu" if key[0] == "D" else "1"))

    def examine(checks: str, *overrides: str) -> tuple[int, dict[str, str]]:
        wanted = checks.split(", ")
        chosen = tuple(check for check in doctor.CHECKS if check.name in wanted)
        monkeypatch.setattr(doctor, "CHECKS", chosen)
        code = run_command(doctor.main, ["device=cpu", *overrides])
        return code, table(capsys.readouterr().out)

    return examine


def job_of(ranks: Ranks, *overrides: str) -> Job:
    config = compose("doctor", ["device=cpu", *overrides], Config)
    hosts = {rank: f"node{rank // ranks.local_world}" for rank in range(ranks.world)}
    return Job(config, ranks, 1.0, hosts, ExitStack())


def fails(found: tuple[int, dict[str, str]], check: str, text: str, fix: str) -> None:
    code, lines = found
    assert code == 2
    assert lines[check].startswith("FAILED")
    said, _, way_out = lines[check].partition("; fix: ")
    assert text in said and fix in way_out


def test_alone_everything_is_in_order_and_nothing_is_left_behind(examine, tmp_path):
    names = [check.name for check in doctor.CHECKS if check.name != "slurm"]
    code, lines = examine(", ".join(names), *SMALL, "train.batch_size=8")
    assert code == 0 and list(lines) == ["ranks", *names]
    assert not [line for line in lines.values() if line.startswith("FAILED")]
    assert "torch 2" in lines["versions"] and "commit " in lines["versions"]
    assert "recall makes its samples" in lines["store"]
    assert lines["who reads what"].splitlines()[1].startswith("rank 0: samples ")
    assert "3 checkpoints take" in lines["disk of runs"]
    assert not list(tmp_path.iterdir())


def test_bundled_data_that_are_not_built_yet_are_no_failure(examine, tmp_path):
    code, lines = examine("store, who reads what, model")
    assert code == 0 and "training will build it" in lines["store"]
    assert "parameters" in lines["model"]
    assert not list(tmp_path.iterdir())


def test_on_two_ranks_each_reads_its_own(tmp_path):
    (tmp_path / "ranks.py").write_text(
        "import os, sys\n"
        "from launch import doctor\n"
        "from launch.ranks.process import run_command\n"
        "left_out = ('engine', 'slurm', 'model', 'disk of runs')\n"
        "doctor.CHECKS = tuple(c for c in doctor.CHECKS if c.name not in left_out)\n"
        "sys.exit(run_command(doctor.main, sys.argv[1:]))\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*TORCHRUN, "ranks.py", *SMALL, "parallel.sp=2"]
    ended = run(command, timeout=100, cwd=tmp_path, env=os.environ | environment)
    lines = table(ended.stdout)
    wrong = {name for name, line in lines.items() if line.startswith("FAILED")}
    assert wrong <= {"threads"}, ended.stdout  # a machine of one core has too few
    assert bool(ended.returncode) == bool(wrong), ended.stderr
    assert lines["ranks"] == f"ok        2 came: ranks 0-1 ({HERE})"
    *_, first, second = lines["who reads what"].splitlines()
    assert first.startswith("rank 0: samples ") and second.startswith("rank 1: samples ")
    assert first.endswith("tokens 0-15") and second.endswith("tokens 16-31")
    assert "slowest pair ranks 0" in lines["exchange"] and "GB/s" in lines["exchange"]


def test_tokens_that_nobody_reads(examine, monkeypatch):
    monkeypatch.setattr(DataSlot, "tokens", lambda _, length: (0, length // 2))
    found = examine("store, who reads what", *SMALL)
    fails(found, "who reads what", "tokens 16-31 are read by nobody", "the same configuration")


def test_a_folder_that_cannot_be_written(examine, tmp_path):
    (tmp_path / "file").touch()
    found = examine("disk of runs", "runs=file/runs")
    fails(found, "disk of runs", "file is no folder to hold runs", "choose another runs=...")


def test_a_full_disk(examine, monkeypatch):
    def full(_folder: Path) -> tuple[float, float]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(machine, "_speed", full)
    fails(examine("disk of runs"), "disk of runs", "No space left on device", "make room")


def test_checkpoints_that_do_not_fit(examine, monkeypatch):
    """The probe fits, what training keeps does not."""
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    found = examine("store, model, disk of runs", *SMALL)
    fails(found, "disk of runs", "1.0 kB free; 3 checkpoints take", "a smaller train.keep_last")


def test_a_store_that_is_missing_or_damaged(examine, tmp_path):
    found = examine("store", "task.store=nowhere")
    fails(found, "store", "nowhere", "python -m launch prepare")
    ensure_bundled(tmp_path / "mine")
    chunk = max((tmp_path / "mine" / "xyz").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 255
    chunk.write_bytes(content)
    fails(examine("store", "task.store=mine"), "store", "damaged", "delete it (rm -r mine)")


def test_ranks_that_see_different_data():
    findings = {0: ok("", "a" * 64), 1: ok("", "b" * 64)}
    found = data.same_store(job_of(Ranks(0, 2, 0, 1)), findings)
    assert found.state == "FAILED" and "b" * 12 + " on rank 1 (node1)" in found.text


def test_locks(examine, tmp_path):
    """A run that another process writes cannot be written; a lock of nobody is none."""
    lock = tmp_path / "runs" / "train" / ".lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(f"process {os.getpid()} on {HERE}\n")
    assert examine("locks", "name=train")[1]["locks"].startswith("ok")
    with locked(lock):
        found = examine("locks", "name=train")
        fails(found, "locks", f"is being written by process {os.getpid()}", "another name=...")
        lock.write_text(f"process {2**22 + 1} on {HERE}\n")  # more than Linux has
        fails(examine("locks", "name=train"), "locks", "which is gone", "(rm runs/train/.lock)")


def test_locks_of_killed_builds(examine, tmp_path, monkeypatch):
    lock = tmp_path / "built" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    code, lines = examine("extensions", "engine=deepspeed")
    assert code == 0 and "1 being built now" in lines["extensions"]
    long_ago = time.time() - 2 * machine.STALE_S
    os.utime(lock, (long_ago, long_ago))
    found = examine("extensions", "engine=deepspeed")
    fails(found, "extensions", "a killed build left", f"remove it: rm {lock}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock / "below"))
    found = examine("extensions", "engine=deepspeed")
    fails(found, "extensions", "cannot be written", "TORCH_EXTENSIONS_DIR=")


def test_too_many_threads(examine, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 4096)
    fails(examine("threads"), "threads", "4096 threads on", "OMP_NUM_THREADS=")


def test_ranks_that_share_cores_are_counted_together():
    job = job_of(Ranks(0, 4, 0, 2))
    shared = {rank: ok("", [2, [0, 1, 2]]) for rank in range(4)}
    assert is_failed(machine.enough_cores(job, shared), "4 threads on 3 cores: ranks 0-1")
    bound = {rank: ok("2 a rank", [2, [2 * rank, 2 * rank + 1]]) for rank in range(4)}
    assert machine.enough_cores(job, bound) == ok("2 a rank")


def is_failed(found: Finding, text: str) -> bool:
    return found.state == "FAILED" and bool(found.fix) and text in found.text


def test_too_few_open_files_and_too_little_shared_memory(examine, monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (64, 64))
    fails(examine("open files"), "open files", "may open 64 files", "ulimit -n 520")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    job = job_of(Ranks(0, 2, 0, 2))
    job.device = SimpleNamespace(type="cuda")  # pyright: ignore[reportAttributeAccessIssue]
    assert is_failed(machine.shared_memory(job), "/dev/shm has 1.0 MB free")


def test_names(monkeypatch):
    """A name without address, and a machine that calls itself by a loopback address."""
    job = job_of(Ranks(0, 2, 0, 1, ("node0", "29500")))
    monkeypatch.setattr(together.socket, "gethostname", lambda: "node0")
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(key, raising=False)
    known = {"node0": ["10.0.0.1"], "node1": []}
    monkeypatch.setattr(together, "addresses", known.__getitem__)
    assert is_failed(together.names(job), "node1 resolves to no address")
    known["node1"] = ["10.0.0.2"]
    assert together.names(job) == ok("node0 = 10.0.0.1, node1 = 10.0.0.2")
    known["node0"] = ["127.0.1.1"]
    assert is_failed(together.names(job), "node0 is 127.0.1.1 to itself")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert together.names(job).state == "ok"


def test_a_name_that_does_not_resolve_has_no_address():
    assert together.addresses("name.invalid") == []
    assert together.is_loopback("::1") and not together.is_loopback("fe80::1%eth0")


def test_clocks_devices_and_versions_that_differ():
    job = job_of(Ranks(0, 2, 0, 1))
    said = together.same_clock(job, {0: ok("", 100.0), 1: ok("", 160.0)})
    assert is_failed(said, "rank 1 (node1) is 60.0 s ahead of rank 0 (node0)")
    assert together.same_clock(job, {0: ok("", 100.0), 1: ok("", 100.2)}).state == "ok"
    said = machine.same_device(job, {0: ok("cpu", "cpu"), 1: ok("H100", "cuda")})
    assert is_failed(said, "cpu on rank 0 (node0), cuda on rank 1 (node1)")
    said = machine.same_versions(job, {0: ok("torch 2"), 1: ok("torch 1")})
    assert is_failed(said, "rank 1 (node1): torch 1")


@pytest.mark.parametrize("slow, state", [(0.01, "ok"), (1.0, "FAILED")])
def test_a_pair_of_machines_with_a_slow_link_is_named(slow, state):
    times = {(0, 1): 0.01, (0, 2): 0.01, (1, 2): slow}
    findings = {
        rank: ok("", [1e-4, 1e9, [[b if a == rank else a, s] for (a, b), s in times.items()
                                  if rank in (a, b)]])
        for rank in range(3)
    }  # fmt: skip
    found = together.speeds(job_of(Ranks(0, 3, 0, 1)), findings)
    assert found.state == state
    assert ("ranks 1 (node1) and 2 (node2)" in found.text) == (state == "FAILED")


@pytest.mark.parametrize("seats", [2, 4, 6, 8])
def test_everybody_meets_everybody_once(seats):
    for turn in range(seats - 1):
        for rank in range(seats):
            other = together.partner(rank, turn, seats)
            assert other != rank and together.partner(other, turn, seats) == rank
    for rank in range(seats):
        met = {together.partner(rank, turn, seats) for turn in range(seats - 1)}
        assert met == set(range(seats)) - {rank}


def read_by(job: Job, slots: list[DataSlot]) -> Finding:
    """What the check says of ranks that read so."""
    findings = {}
    for rank, slot in enumerate(slots):
        each = Job(job.config, Ranks(rank, len(slots)), 1.0, {}, ExitStack(), {}, task=job.task)
        each.states.update(ranks="ok", store="ok")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data_pipeline.stream.order.DataSlot", lambda *_, slot=slot: slot)
            findings[rank] = data.reading(each)
    return combine(Check("", data.reading, data.complete), job, findings)


def test_what_is_read_twice_or_by_nobody():
    job = job_of(Ranks(0, 4), *SMALL, "parallel.dp=2", "parallel.sp=2")
    assert data.store(job).state == "ok"
    right = [DataSlot(rank // 2, 2, rank % 2, 2) for rank in range(4)]
    found = read_by(job, right)
    assert found.state == "ok" and len(found.lines) == 4
    assert "dp 2 x sp 2" in found.text
    assert is_failed(read_by(job, [*right[:3], right[2]]), "0-15 are read twice, by rank 2")
    assert is_failed(read_by(job, [*right[:2], *right[:2]]), "nobody reads sample")
    other = [*right[:3], DataSlot(1, 2, 2, 3)]
    assert is_failed(read_by(job, other), "tokens 16-20 are read by nobody")


def test_a_mesh_that_does_not_fit_the_ranks(examine):
    found = examine("store, who reads what", *SMALL, "parallel.sp=2")
    fails(found, "who reads what", "parallel.sp=2", "try")


def test_a_process_that_srun_did_not_start(examine, monkeypatch):
    for key, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "PATH": "/nowhere"}.items():
        monkeypatch.setenv(key, value)
    for key in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "RANK"):
        monkeypatch.delenv(key, raising=False)
    fails(examine("slurm"), "slurm", "SLURM was asked for 4 tasks", "")
    code, lines = examine("slurm", "parallel.dp=1", "parallel.sp=1")
    assert code == 0 and "job 7 on ? nodes" in lines["slurm"]


def test_an_error_that_nobody_foresaw_is_a_line(examine, monkeypatch):
    def broken(_job: Job) -> Finding:
        raise RuntimeError("of\nsome kind")

    monkeypatch.setattr(doctor, "CHECKS", (Check("threads", broken),))
    fails(examine("threads"), "threads", "RuntimeError: of some kind", "report it")


def test_a_rank_that_stays_away_or_stays_silent_is_named():
    """It is waited for once, and left out from then on."""
    port = free_port()
    meetings = [partial(Meeting, Ranks(rank, 3, rank, 3, ("127.0.0.1", port)), 2.0, 0.5)
                for rank in range(2)]  # fmt: skip
    check, job = Check("", lambda job: ok("")), job_of(Ranks(0, 3, 0, 3))
    whole = partial(combine, check, job)

    def of_rank(rank: int) -> list[Finding]:
        meeting = meetings[rank]()
        said = [meeting.finding, meeting.agree("one", failed(f"{rank}", "mend"), whole)]
        if rank == 0:  # the other has gone
            said += [meeting.agree(name, ok("fine"), whole) for name in ("two", "three")]
        return said

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(of_rank, range(2))
    assert first[:2] == second
    assert is_failed(first[0], "rank 2 of 3 did not come within 2 s")
    assert is_failed(first[1], "rank 0 (node0): 0 | rank 1 (node0): 1")
    assert is_failed(first[2], f"rank 1 ({HERE}) did not answer within 2.5 s")
    assert first[3] == ok("fine")


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def test_ranks_are_said_shortly():
    hosts = {rank: f"node{rank // 4}" for rank in range(12)}
    assert who([3], hosts) == "rank 3 (node0)"
    assert who([0, 1, 2, 3, 8], hosts) == "ranks 0-3, 8 (node0, node2)"
