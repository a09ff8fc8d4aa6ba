"""The SLURM template, run as it is under a stand-in for srun that sets SLURM's variables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SRUN = """#!/usr/bin/env bash
# Starts 2 tasks on "this node" as srun does: a rank number, no RANK, no WORLD_SIZE.
set -u
echo "$@" > "$TEST_FOLDER/srun.txt"
while [[ $1 == --* ]]; do
  [[ $1 == --output=* ]] && output=${1#--output=}
  shift
done
for task in 0 1; do
  log=${output//%j/$SLURM_JOB_ID}
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 \\
    SLURM_STEP_TASKS_PER_NODE=2 "$@" > "${log//%t/$task}" 2>&1 &
  pids[$task]=$!
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""

SCONTROL = """#!/usr/bin/env bash
[[ $1 == show && $2 == hostnames ]] && echo 127.0.0.1
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch step, srun and scontrol on its PATH."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.env").write_text("export FROM_SITE_ENV=1\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return clean | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TEST_FOLDER": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),  # the port is made from it
        "SLURM_JOB_NODELIST": "node[1-1]",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def test_the_template_trains_with_one_task_a_rank(cluster: dict[str, str], tmp_path: Path):
    overrides = ["experiment=recall", "task.held_out_size=2", "model.channels=2", "model.hidden=2",
                 "model.operators=1", "train.steps=2", "train.batch_size=2",
                 "train.micro_batch_size=2", "engine=ddp", "name=job"]  # fmt: skip
    ended = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), *overrides],
        cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    logs = sorted((tmp_path / "runs" / "logs").glob("*.log"))
    said = [log.read_text() for log in logs]
    assert ended.returncode == 0, ended.stderr + "".join(said)
    assert len(said) == 2 and "finished at step 2" in said[0] and said[1] == ""
    environment = json.loads((tmp_path / "runs" / "job" / "environment.json").read_text())
    assert environment["world"] == 2
    flags = (tmp_path / "srun.txt").read_text()
    for flag in ("--cpus-per-task=1", "--kill-on-bad-exit=1", "python -m launch.train"):
        assert flag in flags


def test_the_template_is_plain_bash_with_one_task_per_gpu():
    """Syntax, and that sbatch sees its options: they must precede the first command."""
    template = ROOT / "slurm" / "train.sbatch"
    assert subprocess.run(["bash", "-n", str(template)]).returncode == 0
    lines = template.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.split()[1] for line in lines[:first_command] if line.startswith("#SBATCH")]
    pairs = [option.removeprefix("--").partition("=") for option in options]
    values = {key: value for key, _, value in pairs}
    assert values["ntasks-per-node"] == values["gpus-per-node"]
    assert {"requeue", "open-mode", "signal"} <= set(values)
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
