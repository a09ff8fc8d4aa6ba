"""A run over two nodes of this machine: the network fails, a node is lost, launchers on each."""

import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import train
from launch.config.compose import command_line
from launch.config.settings import Config
from scaling.experiments.ranks import PORT, on_nodes
from scaling.experiments.two_nodes import Link, Node, two_nodes
from scaling.runs.log import RankLog
from tests.conftest import RankPool
from tests.integration.test_launchers import BIN, ROOT, TINY, curve, rows_of, wait_until

Launcher = Callable[[Sequence[Node], int, Path], list[str]]
"""Of nodes, a rank and a file of the nodes' addresses: what starts it there."""
PATIENCE = 12
"""parallel.timeout_s: a network that is cut for 5 s is heard again after 6 s."""

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(500)]


def by_nobody(nodes: Sequence[Node], rank: int, hosts: Path) -> list[str]:
    return list(on_nodes(nodes, ["-m", "launch.train"]))[rank]


def by_torchrun(nodes: Sequence[Node], rank: int, hosts: Path) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--nnodes",
               str(len(nodes)), "--node-rank", str(rank), "--master-addr", nodes[0].address,
               "--master-port", str(PORT), "-m", "launch.train"]  # fmt: skip
    return nodes[rank].command(command)


def by_accelerate(nodes: Sequence[Node], rank: int, hosts: Path) -> list[str]:
    command = [str(BIN / "accelerate"), "launch", "--config_file",
               "configs/accelerate/cpu_deepspeed_zero1.yaml", "--num_machines", "2",
               "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip",
               nodes[0].address, "--main_process_port", str(PORT), "-m",
               "launch.train"]  # fmt: skip
    return nodes[rank].command(command)


def by_deepspeed(nodes: Sequence[Node], rank: int, hosts: Path) -> list[str]:
    command = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--node_rank",
               str(rank), "--master_addr", nodes[0].address, "--master_port", str(PORT),
               "--no_local_rank", "--module", "launch.train"]  # fmt: skip
    return nodes[rank].command(command)


class Launchers:
    """One on each node, their words in <folder>/<rank>.log."""

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path) -> None:
        environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                                "GLOO_SOCKET_IFNAME": "eth0"}  # fmt: skip
        self._logs = [folder / f"{rank}.log" for rank in range(len(commands))]
        self._processes = []
        for command, log in zip(commands, self._logs, strict=True):
            with log.open("w") as file:
                options: dict[str, Any] = {"cwd": ROOT, "env": environ, "stdout": file}
                self._processes.append(subprocess.Popen(command, stderr=file, **options))

    def codes(self) -> list[int]:
        return [process.wait(150) for process in self._processes]

    def said(self) -> list[str]:
        return [log.read_text() for log in self._logs]

    def errors(self) -> list[list[str]]:
        """What the ranks of each node said of their end, and where they have a traceback."""
        form = r"^(?:rank \d+: )?error: .*|.* in run_command$"
        return [re.findall(form, said, re.M) for said in self.said()]


@contextmanager
def started(
    launcher: Launcher, nodes: Sequence[Node], folder: Path, options: Sequence[str]
) -> Iterator[Launchers]:
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
    commands = [[*launcher(nodes, rank, hosts), *options] for rank in range(len(nodes))]
    launchers = Launchers(commands, folder)
    try:
        yield launchers
    finally:
        for node in nodes:
            node.power_off()
        launchers.codes()


def straight(folder: Path, options: list[str]) -> list[tuple[int, str, float]]:
    """The curve of two ranks that nothing happens to."""
    pool = RankPool(folder, 2)
    try:
        pool(left_alone, 2, [*options, f"runs={folder}", "name=straight"])
    finally:
        pool.stop()
    return curve(folder / "straight")


def left_alone(group: Any, arguments: list[str]) -> None:
    config, _ = command_line(arguments, "train", Config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's
        train.train(config, torch.device("cpu"), RankLog(dist.get_rank()))


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (by_nobody, ["engine=ddp"]),  # parallel=sequence: they wait within the model, too
        pytest.param(by_torchrun, ["engine=deepspeed", "parallel=data"], marks=pytest.mark.slow),
    ],
)
def test_a_cut_is_survived_and_one_for_ever_ends_all_and_nothing_is_lost(
    launcher: Launcher, engine: list[str], tmp_path: Path
):
    """5 s without a network; then none any more: one line a rank, and the same command goes on."""
    options = [*TINY, *engine, "train.steps=60", "train.save_every=3",
               "train.evaluate_every=60", f"runs={tmp_path}",
               f"parallel.timeout_s={PATIENCE}"]  # fmt: skip
    run = tmp_path / "cut"
    with two_nodes(Link()) as nodes:
        with started(launcher, nodes, tmp_path, [*options, "name=cut"]) as launchers:
            wait_until(lambda: rows_of(run) > 2)
            with nodes[1].unplugged():
                last = rows_of(run) + 2  # what had arrived, and the row that is being written
                time.sleep(5)
                assert rows_of(run) <= last, launchers.said()
            wait_until(lambda: rows_of(run) > last)
            with nodes[1].unplugged():
                assert all(launchers.codes()), launchers.said()
        for rank, errors in enumerate(launchers.errors()):
            (line,) = errors
            assert line.startswith("error: " if rank == 0 else "rank 1: error: ")
            assert f"has not moved for {PATIENCE} s" in line and "is the network between" in line
        assert rows_of(run) < 60
        with started(launcher, nodes, tmp_path, [*options, "name=cut"]) as launchers:
            assert launchers.codes() == [0, 0], launchers.said()
    assert len(curve(run)) == 61 and curve(run) == straight(tmp_path, options)


@pytest.mark.slow
def test_a_run_goes_on_without_the_node_that_it_lost(tmp_path: Path):
    """Two data-parallel ranks, one a node; the same command on one node has the same batches."""
    options = [*TINY, "engine=ddp", "parallel=data", "train.steps=60", "train.save_every=5",
               f"runs={tmp_path}", f"parallel.timeout_s={PATIENCE}"]  # fmt: skip
    run = tmp_path / "lost"
    with two_nodes(Link()) as nodes:
        with started(by_torchrun, nodes, tmp_path, [*options, "name=lost"]) as launchers:
            wait_until(lambda: list((run / "checkpoints").glob("step-*[0-9]")) != [])
            with nodes[1].unplugged():
                nodes[1].power_off()
                assert all(launchers.codes())
        assert [len(errors) for errors in launchers.errors()] == [1, 0], launchers.said()
        saved = max(path.name for path in (run / "checkpoints").glob("step-*[0-9]"))
        at = int(saved.removeprefix("step-"))
        assert at < 40
        told = [*options, "name=lost"]
        with started(by_torchrun, nodes[:1], tmp_path, [*told, "parallel.dp=2"]) as launchers:
            assert launchers.codes() == [1]
        ((line,),) = launchers.errors()
        assert "dp(2) * sp(1) = 2, but the world has 1 rank; try dp=1" in line
        with started(by_torchrun, nodes[:1], tmp_path, told) as launchers:
            assert launchers.codes() == [0], launchers.said()
    assert f"going on after step {at}" in launchers.said()[0]
    assert json.loads((run / "environment.json").read_text())["world"] == 1
    train.main([*options, "name=one"])
    ours, theirs = curve(run), curve(tmp_path / "one")
    assert [place for *place, _ in ours] == [place for *place, _ in theirs]
    for (step, _, loss), (*_, expected) in zip(ours, theirs, strict=True):
        assert step > at + 20 or loss == pytest.approx(expected, rel=1e-5)
    state = json.loads((run / "checkpoints" / "step-00000060" / "state.json").read_text())
    assert state["stream"]["cursor"] == 60 * 4  # each sample of its batches once


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_accelerate, by_deepspeed])
def test_launchers_on_two_nodes_give_the_curve_of_one_process(launcher, tmp_path: Path):
    with (
        two_nodes(Link()) as nodes,
        started(launcher, nodes, tmp_path, [*TINY, f"runs={tmp_path}", "name=two"]) as launchers,
    ):
        assert launchers.codes() == [0, 0], launchers.said()
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["world"] == 2
    train.main([*TINY, "engine=ddp", f"runs={tmp_path}", "name=one"])
    one = [(*place, pytest.approx(loss, rel=1e-5)) for *place, loss in curve(tmp_path / "one")]
    assert curve(tmp_path / "two") == one
