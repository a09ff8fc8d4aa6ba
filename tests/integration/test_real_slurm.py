"""Jobs of two ranks in a real SLURM, one on each of two nodes: make test-slurm."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from psutil import process_iter

from launch import train
from launch.cluster.queue import state_in_queue
from scaling.runs.folder import RunFolder
from tests.integration.test_launchers import curve
from tests.integration.test_node_faults import straight

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SMALL = ["experiment=recall", "task.held_out_size=2", "model.channels=2", "model.hidden=2",
         "model.operators=1", "train.batch_size=2", "train.micro_batch_size=2", "engine=ddp",
         "device=cpu"]  # fmt: skip
JOB = ["cpus_per_task=1", "time=2", "warn_s=60"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.env").write_text("export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu\n")
    return tmp_path


def say(place: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True,
                           timeout=100)  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def submitted(place: Path, *told: str) -> str:
    shape = ["nodes=2", "tasks_per_node=1", "name=job"]
    return submit(place, *SMALL, *shape, *told)


def submit(place: Path, *told: str) -> str:
    out = say(place, sys.executable, "-m", "launch", "submit", *JOB, *told)
    return re.findall(r"^job (\d+)", out)[0]


def power(node: str, switch: str) -> None:
    """Switches a node off or on."""
    folder = Path(os.environ["SLURM_CONF"]).parent
    command = [str(ROOT / "tests/slurm/start_cluster.sh"), f"--power-{switch}", str(folder), node]
    subprocess.run(command, check=True, timeout=60)


def wait_for(what: Callable[[], object], seconds: float, place: Path) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        logs = "".join(path.read_text() for path in place.glob("runs/job/jobs/*/*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(1)


def status_of(place: Path) -> dict:
    path = place / "runs" / "job" / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def log_of(place: Path, job: str) -> str:
    path = place / "runs" / "job" / "jobs" / "1" / f"{job}.log"
    return path.read_text() if path.exists() else ""


def test_a_job_reaches_its_limit_is_queued_again_and_finishes(place: Path):
    job = submitted(place, "train.steps=2000", "train.log_every=10", "train.save_every=2000")
    wait_for(lambda: "queued again" in log_of(place, job), 300, place)
    saved = status_of(place)
    assert saved["state"] == "interrupted" and 0 < saved["step"] < 2000
    wait_for(lambda: say(place, "squeue", "-h", "-j", job, "-o", "%T") == "PENDING\n", 60, place)
    said = say(place, sys.executable, "-m", "launch", "status")
    assert "preempted" in said and f"job {job} is in the queue" in said
    # Not after SLURM's two minutes, and with time enough for the rest.
    say(place, "scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60")
    wait_for(lambda: "finished: not queued again" in log_of(place, job), 450, place)
    assert "Restarts=1" in say(place, "scontrol", "show", "job", job)
    ranks = (place / "runs" / "job" / "jobs" / "1" / f"{job}_0.log").read_text()
    for line in (f"interrupted at step {saved['step']}", f"going on after step {saved['step']}",
                 "finished at step 2000"):  # fmt: skip
        assert line in ranks
    rows = (place / "runs" / "job" / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if row["split"] == "train"]
    assert steps == list(range(10, 2001, 10))


def test_a_cancelled_job_saves_and_says_who_ended_it(place: Path):
    job = submitted(place, "train.steps=100000", "train.log_every=10", "time=60")
    wait_for(lambda: (place / "runs" / "job" / "metrics.jsonl").exists(), 120, place)
    say(place, "scancel", job)
    wait_for(lambda: "stopped by SIGTERM" in log_of(place, job), 60, place)
    assert f"JOB {job} ON" in log_of(place, job) and " CANCELLED AT" in log_of(place, job)
    assert status_of(place)["state"] == "interrupted"
    assert "requeue" not in log_of(place, job)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_the_same_submit_goes_on(place: Path):
    job = submitted(place, "train.steps=400", "train.log_every=10", "train.save_every=20")
    checkpoints = place / "runs" / "job" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("step-*[0-9]")), 120, place)
    ranks = [each for each in process_iter(["cmdline", "cwd"])
             if each.info["cwd"] == str(place) and "launch.train" in (each.info["cmdline"] or ())
             and "python" in each.info["cmdline"][0]]  # fmt: skip
    assert len(ranks) == 2
    ranks[1].kill()
    wait_for(lambda: "stopped (exit code" in log_of(place, job), 100, place)
    assert "queued again" not in log_of(place, job)
    wait_for(lambda: not say(place, "squeue", "-h", "-j", job), 60, place)
    again = submitted(place, "train.steps=400", "train.log_every=10", "train.save_every=20")
    log = place / "runs" / "job" / "jobs" / "2" / f"{again}.log"
    wait_for(lambda: log.exists() and "finished" in log.read_text(), 200, place)
    rows = (place / "runs" / "job" / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if row["split"] == "train"]
    assert steps == list(range(10, 401, 10))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_goes_on_when_its_node_has_power_again(place: Path):
    """Without a word the second node is gone: SLURM queues the job again, and status says so."""
    options = ["train.steps=300", "train.log_every=10", "train.save_every=20",
               "train.evaluate_every=300"]  # fmt: skip
    job = submitted(place, *options, "time=60")
    checkpoints = place / "runs" / "job" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("step-*[0-9]")), 120, place)
    power("node2", "off")
    try:
        wait_for(lambda: state_in_queue(job) == "PENDING", 150, place)
        said = say(place, sys.executable, "-m", "launch", "status")
    finally:
        power("node2", "on")
    assert "killed" in said and f"job {job} is in the queue again" in said
    assert status_of(place)["step"] < 300
    wait_for(lambda: say(place, "sinfo", "-h", "-n", "node2", "-o", "%T") == "idle\n", 60, place)
    say(place, "scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: "finished: not queued again" in log_of(place, job), 450, place)
    assert "Restarts=1" in say(place, "scontrol", "show", "job", job)
    assert curve(place / "runs" / "job") == straight(place / "runs", [*SMALL, *options])


@pytest.mark.slow
def test_a_requeued_task_of_a_sweep_leaves_every_row_once(place: Path):
    job = submit(place, "sweep=first_light", "name=job", "tasks_per_node=2", "device=cpu",
                 "model.channels=2", "model.hidden=2", "steps=2", "scalars=0", "lengths=[64]",
                 "sp=[1,2]", "time=60")  # fmt: skip
    sweep = RunFolder(place / "sweeps" / "job")
    wait_for(lambda: len(list(sweep.path.glob("points/*"))) == 2, 120, place)
    say(place, "scontrol", "requeue", f"{job}_1")
    wait_for(lambda: state_in_queue(f"{job}_1") == "PENDING", 60, place)
    say(place, "scontrol", "update", f"JobId={job}_1", "StartTime=now")
    wait_for(lambda: not state_in_queue(job), 150, place)
    assert sorted(row["point"] for row in sweep.rows()) == ["N64_sp1", "N64_sp2"]
    assert all(row["status"] == "ok" for row in sweep.rows())
    assert sweep.status()["state"] == "finished"
    assert "measured before" not in (sweep.path / "jobs" / "1" / f"{job}_1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "deepspeed"])
def test_a_launcher_on_each_node_gives_the_curve_of_one_process(place: Path, launcher: str):
    options = ["train.steps=4", "train.log_every=1", "engine=deepspeed"]
    job = submitted(place, *options, f"launcher={launcher}", "time=60")
    wait_for(lambda: "not queued again" in log_of(place, job), 150, place)
    assert "finished: not queued again" in log_of(place, job)
    environment = json.loads((place / "runs" / "job" / "environment.json").read_text())
    assert environment["world"] == 2
    train.main([*SMALL, *options, "engine=ddp", f"runs={place / 'runs'}", "name=one"])
    one = [(*at, pytest.approx(x, rel=1e-5)) for *at, x in curve(place / "runs" / "one")]
    assert curve(place / "runs" / "job") == one
