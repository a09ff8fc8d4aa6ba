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

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SMALL = ["experiment=recall", "task.held_out_size=2", "model.channels=2", "model.hidden=2",
         "model.operators=1", "train.batch_size=2", "train.micro_batch_size=2", "engine=ddp",
         "device=cpu", "nodes=2", "tasks_per_node=1", "cpus_per_task=1", "time=2",
         "warn_s=60"]  # fmt: skip


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
    out = say(place, sys.executable, "-m", "launch", "submit", *SMALL, "name=job", *told)
    return re.findall(r"^job (\d+)", out)[0]


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
