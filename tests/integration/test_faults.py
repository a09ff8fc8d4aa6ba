"""Faults inside a run: numbers that are not finite, ranks that hang, die or fail.

Ranks are forked from this process, so that none of them imports anything; nobody ends them but
they themselves, and at last this process, as a launcher would.
"""

import json
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch.distributed as dist
from psutil import pid_exists
from torch._C._distributed_c10d import TCPStore

from data_pipeline.errors import RunError
from launch import train as command
from launch.ranks.process import run_command
from scaling.runs.rows import of_split, read_rows
from scaling.train.not_finite import IN_A_ROW
from tests import processes
from tests.small_runs import STEPS, plan, train
from tests.states import assert_same, curve, saved_tensors

TINY = ["experiment=recall", "task.held_out_size=4", "task.tokens=9", "model.channels=2",
        "model.hidden=4", "model.operators=1", f"train.steps={STEPS}", "train.batch_size=4",
        "train.micro_batch_size=4", "train.log_every=1", "train.save_every=2",
        "train.evaluate_every=100", "optim.warmup_steps=0", "device=cpu",
        "engine=ddp", "parallel=sequence"]  # fmt: skip
TIMEOUT_S, PATIENCE_S = 4, 60
FAULTY = 4
"""The step in which something happens; the last checkpoint is that of step 2."""


def spoil(how: str, ranks: Sequence[int] = (0,)) -> Callable[[Any], Any]:
    """Numbers of a model's output, on those ranks."""

    def happens(out: Any) -> Any:
        if dist.is_initialized() and dist.get_rank() not in ranks:
            return None
        if how == "gradient":
            out.vectors.register_hook(lambda gradient: gradient * float("inf"))
            return None
        vectors = out.vectors.clone()
        vectors[1] = vectors[1] * float("nan")  # the second row
        return out.replace(vectors=vectors)

    return happens


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in of_split(curve(folder), "train")]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_its_samples_are_named(tmp_path, how, capsys):
    """Nothing moves in it, the next step takes the next data, and going on counts on."""
    train(tmp_path, step=3, happens=spoil(how), not_finite="skip", save_every=1, keep_last=STEPS)
    said = capsys.readouterr().out
    (row,) = of_split(read_rows(tmp_path / "metrics.jsonl"), "not_finite")
    assert row["step"] == 3 and row["value"] == "nan"
    if how == "loss":
        assert row["what"] == "loss" and row["among"] == 1 and row["ranks"] == [0]
        assert "not finite is that of sequence " in said
    else:
        assert row["what"] == "gradient norm" and row["among"] == 4 and row["ranks"] == []
    assert f"step 3/{STEPS} left out: the {row['what']} of step 3 is nan" in said
    assert all(name in said for name in row["samples"])
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 4, 5, 6]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    rows = of_split(read_rows(tmp_path / "metrics.jsonl"), "train")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    before, after, later = (
        saved_tensors(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (2, 3, 4)
    )
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    assert not all(torch.equal(x, after[name]) for name, x in later.items())
    train(tmp_path, not_finite="skip", steps=STEPS + 1)
    rows = of_split(read_rows(tmp_path / "metrics.jsonl"), "train")
    assert (rows[-1]["step"], rows[-1]["skipped"]) == (STEPS + 1, 1)


def test_ten_in_a_row_end_the_run_also_across_a_restart(tmp_path):
    def always(out: Any) -> Any:
        return out.replace(vectors=out.vectors * float("nan"))

    def run(steps: int) -> None:
        train(
            tmp_path, not_finite="skip", steps=steps, save_every=3, evaluate_every=99, every=always
        )

    run(IN_A_ROW - 1)
    with pytest.raises(RunError, match=rf"step {IN_A_ROW} .* {IN_A_ROW} steps in a row were left"):
        run(IN_A_ROW + 5)
    assert not losses(tmp_path)


def left_out(_group: Any, folder: Path) -> None:
    happens = spoil("loss", ranks=(1,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what DeepSpeed imports
        train(folder, sp=2, engine="deepspeed", step=3, happens=happens, not_finite="skip")


def test_zero_leaves_the_same_step_out(deepspeed_worlds, tmp_path):
    """ZeRO-1; what of DeepSpeed is particular to a stage, test_engine.py asks of all."""
    deepspeed_worlds[2](left_out, 2, tmp_path / "two")
    train(tmp_path / "one", step=3, happens=spoil("loss"), not_finite="skip")
    assert_same(tmp_path / "two", tmp_path / "one", 1e-5)
    (row,) = of_split(read_rows(tmp_path / "two" / "metrics.jsonl"), "not_finite")
    assert row["among"] == 1 and row["ranks"]


FORK: Any = get_context("fork")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Ranks:
    """Forked ranks of a run under no launcher, in the last of which something may happen."""

    def __init__(
        self,
        folder: Path,
        happens: Callable[[], object] | None = None,
        *options: str,
        world: int = 2,
        port: int | None = None,
        **variables: str,
    ) -> None:
        self.folder, port = folder, port or free_port()
        self.processes = [
            FORK.Process(
                target=_rank,
                args=(rank, world, port, folder, happens, options, variables),
                daemon=True,
            )
            for rank in range(world)
        ]

    @contextmanager
    def running(self):
        for process in self.processes:
            process.start()
        try:
            yield self
        finally:
            for process in self.processes:
                process.kill()
                process.join()

    def codes(self, *ranks: int) -> list[int | None]:
        """How these ended."""
        end = time.monotonic() + PATIENCE_S
        for rank in ranks:
            self.processes[rank].join(max(end - time.monotonic(), 0))
        return [self.processes[rank].exitcode for rank in ranks]

    def said(self, rank: int) -> list[str]:
        """Lines on stderr."""
        return (self.folder / f"{rank}.err").read_text().splitlines()


def _rank(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    happens: Any,
    options: Sequence[str],
    variables: dict[str, str],
) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | variables
    warnings.simplefilter("ignore")  # what DeepSpeed imports
    os._exit(train_faulty(happens, [f"runs={folder}", *options]))


def train_faulty(happens: Callable[[], object] | None, options: Sequence[str]) -> int:
    """The training command as a rank; what happens does so in the last. Its exit code."""
    torch.set_num_threads(1)
    make = command.task_and_model

    def faulty(config: Any) -> Any:
        task, model = make(config)
        if dist.get_rank() == dist.get_world_size() - 1:
            plan(model, FAULTY, lambda out: happens and happens())
        return task, model

    command.task_and_model = faulty
    own = [*TINY, "name=run", f"parallel.timeout_s={TIMEOUT_S}"]
    return run_command(command.main, [*own, *options])


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def loops() -> None:
    while True:
        pass


def fails() -> None:
    raise KeyError("nobody foresaw this")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One process; what it imports the forked ranks need not."""
    folder = tmp_path_factory.mktemp("straight")
    command.main([*TINY, f"runs={folder}", "name=run"])
    return folder / "run"


def goes_on(folder: Path, straight: Path) -> None:
    """The same command, without the fault; on one rank."""
    command.main([*TINY, f"runs={folder}", "name=run"])
    assert_same(folder / "run", straight, 1e-5)


@pytest.mark.parametrize(
    ("fault", "said"),
    [(stops, ", stopped by a signal: last in "), (loops, " s: last in forward in step 4")],
)
def test_a_rank_that_hangs_is_named_with_what_it_did(tmp_path, straight, fault, said):
    """A stopped one was last seen half a second before."""
    host = socket.gethostname()
    with Ranks(tmp_path, fault).running() as ranks:
        alive = (0,) if fault is stops else (0, 1)
        assert all(code == 2 for code in ranks.codes(*alive)), ranks.said(0)
        for rank in alive:
            (line,) = ranks.said(rank)
            assert f"error: rank 1 ({host}) has not moved for {TIMEOUT_S} s" in line
            assert re.search(said, line) and f"; rank 0 ({host}) waits in " in line
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "rank 1" in status["error"]
    goes_on(tmp_path, straight)


def test_a_rank_that_fails_is_named_by_the_others(tmp_path, straight):
    with Ranks(tmp_path, fails).running() as ranks:
        assert ranks.codes(0, 1) == [2, 2], ranks.said(0)
    ((theirs,), (own,)) = map(ranks.said, (0, 1))
    assert re.search(r"rank 1 \(.*\) ended first: KeyError: 'nobody foresaw this', at ", theirs)
    log = tmp_path / "run" / "logs" / "rank-00001.jsonl"
    assert own.startswith("rank 1: error: KeyError") and f"rank's log in {log.parent}" in own
    assert "in fails" in json.loads(log.read_text().splitlines()[-1])["traceback"]


def test_deepspeed_killed_on_one_rank_goes_on_as_one_process(deepspeed_worlds, tmp_path, straight):
    """ZeRO-1 on two sequence ranks: its checkpoint is any engine's, any world's. (The pools have
    imported DeepSpeed.)"""
    with Ranks(tmp_path, dies, "engine=deepspeed").running() as ranks:
        assert ranks.codes(0, 1) == [2, -signal.SIGKILL], ranks.said(0)
    (line,) = ranks.said(0)
    assert re.search(r"rank 1 \(.*\) is gone without a word: killed", line), line
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*[0-9]")) == [
        "step-00000002"
    ]
    goes_on(tmp_path, straight)


def serve_store(port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    signal.pause()
    del store


def test_a_store_that_goes_away_costs_nothing(tmp_path, straight):
    """Where the ranks met, as torchrun's agent holds it; it is killed in step 4."""
    store = FORK.Process(target=serve_store, args=(port := free_port(),), daemon=True)
    store.start()
    theirs: dict[str, Any] = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with Ranks(tmp_path, store.kill, port=port, **theirs).running() as ranks:
        assert ranks.codes(0, 1) == [0, 0], ranks.said(0) + ranks.said(1)
    store.join(PATIENCE_S)
    assert store.exitcode == -signal.SIGKILL
    assert ranks.said(0) == ranks.said(1) == []
    assert_same(tmp_path / "run", straight, 1e-5)


def test_a_port_in_use_is_one_line_of_each(tmp_path, monkeypatch):
    """Of one that waits for ever, too: who listens there says nothing."""
    monkeypatch.setattr("launch.ranks.process._GUARD_S", 5.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        Ranks(
            tmp_path, None, "parallel.timeout_s=3", port=(port := taken.getsockname()[1])
        ).running() as ranks,
    ):
        assert ranks.codes(0, 1) == [2, 2]
        ((first,), (second,)) = map(ranks.said, (0, 1))
        assert first.startswith(f"error: rank 0 cannot wait for the others at 127.0.0.1:{port}")
        assert second.startswith("rank 1: error: rank 1 of 2 could not meet the others")


BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "4"],
    "accelerate": [str(BIN / "accelerate"), "launch", "--main_process_port", "0",
                   "--num_processes", "4", "--config_file", "configs/accelerate/cpu_plain.yaml"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("fault", ["stops", "fails"])
def test_a_launcher_ends_all_four_ranks_with_the_cause(launcher, fault, tmp_path):
    """PyTorch's agent kills after 30 s what does not end when it is asked to."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = processes.run(
        [*LAUNCHERS[launcher], __file__, fault, f"runs={tmp_path}"], cwd=ROOT, env=environ
    )
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert lines and all("rank 3 (" in line or "nobody foresaw" in line for line in lines), lines
    assert "frame #" not in ended.stderr
    for word in (tmp_path / "run" / "ranks").glob("*.json"):
        assert not pid_exists(json.loads(word.read_text())["pid"])


if __name__ == "__main__":
    sys.exit(train_faulty(globals().get(sys.argv[1]), sys.argv[2:]))
