"""Ranks from every launcher's variables, and how a process of one begins and ends."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import ConfigError
from launch.config.compose import compose
from launch.config.settings import Config
from launch.ranks.discovery import Ranks, discover, first_host, require_ranks, tasks_per_node
from launch.ranks.process import choose_device, run_command, share_cores
from launch.train import accelerate_overrides
from launch.train import main as train_command

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "node1", "MASTER_PORT": "4000"}  # fmt: skip
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
SLURM = {"SLURM_JOB_ID": "123456", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1",
         "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]",
         "SLURM_TASKS_PER_NODE": "4,3"}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "123456", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "2"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, Ranks()),
        (TORCHRUN, Ranks(3, 4, 1, 2, ("node1", "4000"))),
        (DEEPSPEED, Ranks(1, 2, 1, 2, ("127.0.0.1", "29500"))),
        (SLURM, Ranks(5, 7, 1, 3, ("gpu07", "33456"))),
        (SLURM | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, Ranks(5, 7, 1, 3, ("a", "1"))),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Ranks()),  # a shell by srun
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"},
            Ranks(1, 2, 1, 2, ("127.0.0.1", "10000")),
        ),
        # torchrun inside a SLURM step: its ranks count, not SLURM's
        (SLURM | TORCHRUN, Ranks(3, 4, 1, 2, ("node1", "4000"))),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, Ranks()),  # accelerate with one process
        (BATCH, Ranks()),  # a batch script, not by srun
        (OPEN_MPI, Ranks(1, 2, 1, 2, ("127.0.0.1", "29500"))),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, Ranks()),
        (HYDRA | {"MASTER_ADDR": "node1"}, Ranks(3, 4, 1, 2, ("node1", "29500"))),
        (SLURM | HYDRA, Ranks(5, 7, 1, 3, ("gpu07", "33456"))),  # srun with --mpi=pmi2
        (SLURM | HYDRA | TORCHRUN, Ranks(3, 4, 1, 2, ("node1", "4000"))),
        (BATCH | OPEN_MPI, Ranks(1, 2, 1, 2, ("127.0.0.1", "29500"))),  # mpirun in a batch script
        (  # mpirun that starts its daemons by srun, one a node
            SLURM | HYDRA | {"SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            Ranks(3, 4, 1, 2, ("a", "1")),
        ),
        (BY_HAND, Ranks(1, 2, 1, 2, ("127.0.0.1", "29500"))),
        (
            BY_HAND | {"MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "1"},
            Ranks(1, 2, 0, 1, ("node1", "29500")),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1, ("127.0.0.1", "29500"))),
        ({"WORLD_SIZE": "1"}, Ranks()),
        (SLURM | {"WORLD_SIZE": "7"}, Ranks(5, 7, 1, 3, ("gpu07", "33456"))),
    ],
)
def test_ranks_of_every_launcher(environ: dict[str, str], ranks: Ranks):
    assert discover(environ) == ranks


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (BY_HAND | {"MASTER_ADDR": "node1"}, "on several machines .* set LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not, .* WORLD_SIZE 1"),
        ({"RANK": "1"}, "RANK=1 is set, but WORLD_SIZE is not"),
        (SLURM | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set, but RANK is not, .* WORLD_SIZE 7"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4, on its machine 1 of 2, cannot be"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "on its machine 2 of 2, cannot be"),
        (TORCHRUN | {"RANK": "-1"}, "rank -1 of 4"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is no whole number"),
        (SLURM | {"SLURM_PROCID": "7"}, "rank 7 of 7"),
        (HYDRA, "4 ranks, 2 of .*MASTER_ADDR NAME"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "4 ranks, 2 of .* -x MASTER_ADDR=NAME"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "2 ranks, no known number of them on this machine"),
        (SLURM | {"SLURM_JOB_NODELIST": "gpu[07-"}, r"cannot read SLURM's node list 'gpu\[07-'"),
        (SLURM | {"SLURM_TASKS_PER_NODE": "4(x2"}, "cannot read SLURM's tasks per node"),
    ],
)
def test_a_place_that_is_left_open_is_refused(environ: dict[str, str], said: str):
    with pytest.raises(ConfigError, match=said) as error:
        discover(environ)
    assert "\n" not in str(error.value)


def test_one_process_where_slurm_was_asked_for_several_is_said_at_once():
    with pytest.raises(ConfigError, match=r"asked for 2 tasks.* srun before the command, or"):
        require_ranks(discover(BATCH), False, BATCH)
    shell = {"SLURM_NTASKS": "2"}  # by salloc
    with pytest.raises(ConfigError, match="asked for 2 tasks"):
        require_ranks(discover(shell), False, shell)
    require_ranks(discover(BATCH), True, BATCH)
    for fine in ({}, BATCH | {"SLURM_NTASKS": "1"}, BATCH | OPEN_MPI, SLURM, BATCH | TORCHRUN,
                 BATCH | {"SLURM_STEP_NUM_TASKS": "1"}):  # fmt: skip
        require_ranks(discover(fine), False, fine)


def test_training_in_a_batch_script_needs_srun_and_planning_does_not(monkeypatch):
    for key, value in BATCH.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="asked for 2 tasks"):
        train_command(["experiment=recall", "engine=ddp"])
    assert discover() == Ranks()


def test_accelerate_that_starts_too_few_processes_is_explained():
    environ = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}
    with pytest.raises(ConfigError, match="MULTI_CPU"):
        discover(environ)


def test_ranks_that_could_not_meet_at_port_0_are_told():
    with pytest.raises(ConfigError, match=r"MASTER_PORT=0 is no port .* --standalone, or"):
        discover(TORCHRUN | {"MASTER_PORT": "0"})
    assert discover(TORCHRUN | {"MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0"}).world == 1


def test_compressed_lists_of_slurm():
    for nodes, first in {
        "a": "a", "a1,b2": "a1", "gpu[07-09,12],x": "gpu07", "n[3]-ib,n4": "n3-ib", "b,a": "b",
        "r[1-2]n[01-03],x": "r1n01", "r[03,04]c[2-6/2]z,q[1-2]": "r03c2z", "n[009-011]": "n009",
    }.items():  # fmt: skip
        assert first_host(nodes) == first
    for half in (
        "gpu[07-09",
        "gpu[07-",
        "gpu[",
        "gpu07-09]",
        "a[1-3]b[2",
        "a[]",
        "",
        "a[3-1]",
        "a,,b",
    ):
        with pytest.raises(ConfigError, match="cannot read SLURM's node list"):
            first_host(half)
    assert tasks_per_node("4(x2),3") == [4, 4, 3]


def test_ranks_share_the_cores_unless_told():
    huge = {"THP_MEM_ALLOC_ENABLE": "1"}
    environ: dict[str, str] = {}
    share_cores(Ranks(local_world=10_000, world=10_000), environ)
    assert environ == {"OMP_NUM_THREADS": "1"} | huge
    chosen = {"OMP_NUM_THREADS": "7", "THP_MEM_ALLOC_ENABLE": "0"}
    share_cores(Ranks(local_world=2, world=2), chosen)
    assert chosen == {"OMP_NUM_THREADS": "7", "THP_MEM_ALLOC_ENABLE": "0"}
    alone: dict[str, str] = {}
    share_cores(Ranks(), alone)
    assert alone == huge


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(ConfigError, match="device=cuda, but PyTorch sees no GPU"):
        choose_device("cuda", Ranks())
    assert choose_device("auto", Ranks()).type == "cpu"
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="local rank 1 has no GPU of its own"):
        choose_device("auto", Ranks(rank=1, world=2, local_rank=1, local_world=2))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert choose_device("auto", Ranks(rank=1, world=2, local_rank=1, local_world=2)).type == "cpu"


def test_accelerates_zero_stage_is_followed_unless_one_is_said(tmp_path: Path):
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    theirs = accelerate_overrides({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert compose("train", theirs, Config).engine.zero_stage == 2
    ours = [*theirs, "engine.zero_stage=1"]  # the engine then names both
    assert compose("train", ours, Config).engine.zero_stage == 1
    assert accelerate_overrides({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}) == ["engine.zero_stage=3"]
    for nothing in ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "auto"},
                    {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}):  # fmt: skip
        assert accelerate_overrides(nothing) == []


def test_errors_of_the_user_are_one_line_and_ours_have_a_traceback(capsys):
    def fails(error: BaseException):
        def command(arguments: list[str]) -> None:
            raise error

        return command

    assert run_command(lambda arguments: None, []) == 0
    assert run_command(fails(ConfigError("x=1: no")), []) == 2
    assert capsys.readouterr().err == "error: x=1: no\n"
    assert run_command(fails(KeyError("bug")), []) == 1
    assert "Traceback" in capsys.readouterr().err
    assert run_command(fails(RuntimeError("Connection closed by peer [::1]:1")), []) == 1
    assert "another rank ended first" in capsys.readouterr().err
    assert run_command(fails(RuntimeError("[pair.cc] No route to host [::1]:1\nat")), []) == 1
    said = capsys.readouterr().err
    assert "machine is out of reach ([pair.cc] No route to host [::1]:1); mend its" in said
    assert run_command(lambda _: torch.empty(1 << 60), []) == 1  # pyright: ignore
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: out of memory: can't allocate memory: you tried to allocate 46")
    assert "python -m launch plan" in said and "\n" not in said
    assert run_command(fails(KeyboardInterrupt()), []) == 130


def test_a_process_that_waits_alone_gives_up_with_one_line(tmp_path: Path):
    """Rank 0 of 2 whose partner never starts: no hang, no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(port), "LOCAL_RANK": "0"}  # fmt: skip
    script = (
        "import sys, torch; from launch.ranks.discovery import discover\n"
        "from launch.ranks.process import process_group, run_command\n"
        "def main(a):\n"
        "    with process_group(discover(), torch.device('cpu'), 2.0): pass\n"
        "sys.exit(run_command(main, []))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2, ended.stderr
    assert "error: rank 0 of 2 could not meet the others" in ended.stderr
    assert "Traceback" not in ended.stderr
