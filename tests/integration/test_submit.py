"""`submit`, without SLURM: the repository's stand-ins for srun and scontrol, own ones for the rest.

Where no training matters, a small program in the job's copy takes the place of launch.train.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, LongfoldError, RunError
from launch import status, submit
from launch.cluster.script import script_by_hand

ROOT = Path(__file__).parents[2]
SMALL = ["experiment=recall", "task.held_out_size=2", "model.channels=2", "model.hidden=2",
         "model.operators=1", "train.steps=2", "train.batch_size=2", "train.micro_batch_size=2",
         "engine=ddp", "device=cpu", "tasks_per_node=2", "cpus_per_task=1"]  # fmt: skip
LAUNCHERS = ("srun", "torchrun", "accelerate", "deepspeed")

SBATCH = """#!/usr/bin/env bash
echo "partition ${SBATCH_PARTITION:-none} site ${FROM_SITE:-none}" > "$TEST_FOLDER/sbatch.txt"
if [[ -e $TEST_FOLDER/refuse ]]; then echo "error: invalid partition" >&2; exit 1; fi
echo 4242
"""
SQUEUE = """#!/usr/bin/env bash
cat "$TEST_FOLDER/queue" 2> /dev/null && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""
FAKE = """
import json, os, pathlib, sys, time
run = pathlib.Path(os.environ["FAKE_RUN"])
say = lambda state: (run / "status.json").write_text(json.dumps({"state": state}, indent=1))
say("running")
while os.environ["FAKE"] != "finish" and not (run / "STOP").exists():
    time.sleep(0.02)
if os.environ["FAKE"] == "crash":
    sys.exit(3)
if os.environ["FAKE"] != "nothing saved":
    (run / "checkpoints" / f"step-{time.time_ns()}").mkdir(parents=True)
say("finished" if os.environ["FAKE"] == "finish" else "interrupted")
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A login node: this folder, with a site.env, and SLURM's commands on PATH."""
    programs = tmp_path / "bin"
    shutil.copytree(ROOT / "slurm" / "stand_in", programs)
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.env").write_text("export FROM_SITE=1 SBATCH_PARTITION=gpu\n")
    for key in os.environ:
        if key.startswith(("SLURM", "SBATCH")):
            monkeypatch.delenv(key)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("STAND_IN_REQUEUED", str(tmp_path / "requeued"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    submit.main([*arguments, "action=print"])
    return capsys.readouterr().out


def options_of(script: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.M)
    return dict(found)


def assert_is_bash(script: str) -> None:
    told = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert told.returncode == 0, told.stderr
    if shutil.which("shellcheck"):
        told = subprocess.run(["shellcheck", "-"], input=script, text=True, capture_output=True)
        assert told.returncode == 0, told.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launchers_script_is_bash_and_asks_for_a_gpu_a_rank(launcher, cluster, capsys):
    script = printed(capsys, "name=a b", f"launcher={launcher}", "tasks_per_node=4")
    assert_is_bash(script)
    options = options_of(script)
    assert options["gpus-per-node"] == "4"
    assert options["ntasks-per-node"] == ("4" if launcher == "srun" else "1")
    assert options["cpus-per-task"] == ("8" if launcher == "srun" else "32")
    assert options["signal"] == "B:USR2@180" and options["open-mode"] == "append"
    assert {"requeue", "time", "nodes"} <= options.keys() and "partition" not in options
    assert "launch.train" in script and "'name=a b'" in script
    assert not (cluster / "runs").exists()


def test_keys_of_the_job_reach_the_script(cluster, capsys):
    told = ["nodes=3", "time=2-12", "mem=64G", "partition=big", "account=me", "signal=HUP",
            "warn_s=300", "requeue=never", "sbatch=[--exclusive]"]  # fmt: skip
    script = printed(capsys, *told)
    assert_is_bash(script)
    expected = {"nodes": "3", "time": "2-12", "mem": "64G", "partition": "big", "account": "me",
                "signal": "B:HUP@300", "no-requeue": "", "exclusive": ""}  # fmt: skip
    assert expected.items() <= options_of(script).items()
    assert "--nodes=3 --ntasks=24" in script and "max_requeues=0" in script


@pytest.mark.parametrize("told", ["device=cpu", "gpus_per_node=0"])
def test_a_cluster_of_cpus_is_not_asked_for_gpus(told, cluster, capsys):
    assert "gpu" not in printed(capsys, told).replace("gpus_per_node=0", "")
    assert "gpu" not in printed(capsys, told, "launcher=deepspeed").replace("gpus_per_node=0", "")


def test_a_sweep_is_an_array_of_its_points(cluster, capsys):
    script = printed(capsys, "sweep=first_light", "device=cpu")
    assert_is_bash(script)
    assert options_of(script)["array"] == "0-5"  # 3 lengths, 2 numbers of ranks
    assert 'sweep point="$SLURM_ARRAY_TASK_ID"' in script
    assert "task=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" in script
    assert 'scontrol requeue "$task"' in script


def test_the_script_by_hand_is_the_templates():
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    assert text == script_by_hand(), "python -m launch.cluster.script > slurm/train.sbatch"
    assert_is_bash(text)


def test_a_job_is_submitted_once_and_status_knows_it(cluster, capsys):
    submit.main([*SMALL, "name=job"])
    job = cluster / "runs" / "job" / "jobs" / "1"
    said = capsys.readouterr().out
    assert said.startswith(f"job 4242\nlog  {job}/4242.log\n")
    assert (cluster / "sbatch.txt").read_text() == "partition gpu site 1\n"
    assert "steps: 2" in (job / "config.yaml").read_text()
    assert (job / "code" / "COMMIT").exists() and (job / "code" / "configs" / "train.yaml").exists()
    (cluster / "queue").write_text("PENDING\n")
    status.main(["runs/job"])
    assert capsys.readouterr().out == "runs/job  pending     job 4242 is in the queue\n"
    with pytest.raises(RunError, match=r"has job 4242 in the queue \(PENDING\): wait, scancel"):
        submit.main([*SMALL, "name=job"])
    path = cluster / "runs" / "job" / "status.json"
    path.write_text('{"state": "interrupted", "step": 1}')
    status.main(["runs/job"])
    assert "preempted   step 1 of 2, job 4242 is in the queue" in capsys.readouterr().out
    path.write_text('{"state": "running", "step": 1, "host": "elsewhere"}')
    status.main(["runs/job"])  # a node failed
    assert "killed      step 1 of 2, without a word; job 4242 is in the queue again" in (
        capsys.readouterr().out
    )
    (cluster / "queue").write_text("RUNNING\n")
    status.main(["runs/job"])
    assert "running     step 1 of 2, job 4242" in capsys.readouterr().out
    (cluster / "queue").unlink()
    status.main(["runs/job"])
    assert "killed      step 1 of 2, job 4242 has left the queue" in capsys.readouterr().out
    submit.main([*SMALL, "name=job", "partition=other"])
    assert (cluster / "sbatch.txt").read_text() == "partition none site 1\n"
    path.write_text('{"state": "finished", "step": 2}')
    with pytest.raises(RunError, match=r"has finished its 2 steps: train\.steps=4 goes on"):
        submit.main([*SMALL, "name=job"])


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (["nodes=0"], "nodes=0: must be greater than or equal to 1"),
        (["launcher=mpirun"], "launcher='mpirun': must be 'srun', 'torchrun'"),
        (["signal=USR1"], "signal='USR1': must be 'USR2'"),
        (["time=tomorrow"], "time='tomorrow': SLURM takes minutes"),
        (["sbatch=[exclusive]"], "sbatch='exclusive': one option each"),
        (["launcher=accelerate", "tasks_per_node=1"], "launcher=srun does"),
        (["node=2"], "unknown key node, did you mean nodes?"),
        (["train.stops=2"], "unknown key train.stops, did you mean train.steps?"),
        (["site=none.env"], "site=none.env is not there: cp slurm/site.env.example none.env"),
        (["sweep=first_light", "nodes=2"], "nodes=2 with sweep=...: each point starts its own"),
        (["runs=/proc/none"], "cannot be written"),
        (["refused"], "takes no path"),
    ],
)
def test_mistakes_are_one_line(told, error, cluster):
    with pytest.raises(LongfoldError, match=re.escape(error)) as raised:
        submit.main([*told, "name=a"] if told != ["refused"] else told)
    assert "\n" not in str(raised.value)


def test_no_sbatch_and_a_refusal_are_one_line(cluster, monkeypatch):
    (cluster / "refuse").touch()
    with pytest.raises(RunError, match=r"sbatch refuses .*job\.sbatch: error: invalid partition"):
        submit.main(["name=a"])
    (cluster / "bin" / "sbatch").unlink()
    (cluster / "bin" / "bash").symlink_to(str(shutil.which("bash")))
    monkeypatch.setenv("PATH", str(cluster / "bin"))
    with pytest.raises(ConfigError, match="there is no sbatch on PATH"):
        submit.main(["name=b"])


def batch(cluster: Path, **variables: str) -> subprocess.Popen[str]:
    """The newest job of runs/job, as SLURM starts it, but for its ranks' program."""
    job = sorted((cluster / "runs" / "job" / "jobs").iterdir())[-1]
    environment = os.environ | {
        "FAKE_RUN": str(cluster / "runs" / "job"),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "localhost",
    }
    return subprocess.Popen(
        ["bash", str(job / "job.sbatch")], env=environment | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fake", "restarts", "sent", "says", "requeued"),
    [
        ("stop", "0", signal.SIGUSR2, "stopped at the time limit: queued again", True),
        ("stop", "100", signal.SIGUSR2, "after 100 restarts of at most 100; to go on:", False),
        ("nothing saved", "1", signal.SIGUSR2, "nothing was saved: not queued again", False),
        ("stop", "0", signal.SIGTERM, "(slurmstepd's line says why); to go on: python", False),
        ("finish", "0", None, "finished: not queued again", False),
        ("crash", "0", signal.SIGTERM, "stopped by SIGTERM", False),
    ],
)  # fmt: skip
def test_what_the_script_does_in_the_end(cluster, fake, restarts, sent, says, requeued):
    submit.main([*SMALL, "name=job"])
    job = cluster / "runs" / "job" / "jobs" / "1"
    (job / "code" / "launch" / "train.py").write_text(FAKE)
    with batch(cluster, FAKE=fake, SLURM_RESTART_COUNT=restarts) as shell:
        if sent:
            while not (cluster / "runs" / "job" / "status.json").exists():
                time.sleep(0.02)
            shell.send_signal(sent)
        out, _ = shell.communicate(timeout=60)
    assert says in out, out
    assert (cluster / "requeued").exists() == requeued
    assert shell.returncode == (3 if fake == "crash" else 0)
    if requeued:
        assert (cluster / "requeued").read_text() == "4242\n"


def test_inside_an_allocation_the_job_runs_at_once_and_never_requeues(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    ran = []
    monkeypatch.setattr(os, "execvp", lambda program, command: ran.extend(command))
    monkeypatch.setattr(submit, "submit_script", lambda *_: "1")
    submit.main([*SMALL, "name=job"])
    assert ran[0] == "bash" and "max_requeues=0" in Path(ran[1]).read_text()


def test_the_copy_is_what_trains(cluster):
    """Two ranks, though the folder it is started in holds another `launch`."""
    submit.main([*SMALL, "name=job"])
    (cluster / "launch").mkdir()
    (cluster / "launch" / "train.py").write_text("raise SystemExit('the wrong one')")
    copied = cluster / "runs" / "job" / "jobs" / "1" / "code" / "launch" / "train.py"
    copied.write_text("print('the copy')\n" + copied.read_text())
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
                   "SLURM_JOB_ID": str(os.getpid())}  # fmt: skip
    with batch(cluster, **environment) as shell:
        out, _ = shell.communicate(timeout=100)
    log = (copied.parents[2] / f"{os.getpid()}_0.log").read_text()
    assert shell.returncode == 0 and "finished: not queued again" in out, out + log
    assert log.startswith("the copy\n") and "finished at step 2" in log
    environment = json.loads((cluster / "runs" / "job" / "environment.json").read_text())
    assert environment["world"] == 2
    assert environment["git"] == (copied.parents[1] / "COMMIT").read_text().strip()


@pytest.mark.slow
def test_a_rehearsal_ends_on_the_straight_curve_in_every_case(cluster, capsys):
    submit.main([*SMALL, "name=job", "action=rehearse", "rehearse_steps=12"])
    lines = capsys.readouterr().out.splitlines()
    cases = [line.split() for line in lines if line.endswith("  yes")]
    assert [case[0] for case in cases] == ["straight", "preempted", "timed_out", "killed"]
    for case in cases[1:]:
        stopped, saved, after = map(int, case[-5:-2])
        assert 4 <= saved <= stopped < 12 and saved + after == 12
    assert not (cluster / "runs" / "job" / "jobs").exists()
